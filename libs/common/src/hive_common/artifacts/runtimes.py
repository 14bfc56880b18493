"""What a Python agent is built on: the layer that all of them share, by digest.

The CPython component itself is built on the device that runs it (ADR 5), and no machine code of others is loaded.
So the layer is the contract that a device fulfils: which Python, and which world of imports. It changes when an
agent that was written for one could not run on the other, and a device can tell by the digest.
"""

from typing import Final

PYTHON_RUNTIME_TYPE: Final = "application/vnd.hivefabric.runtime.python.v1+json"
PYTHON_RUNTIME: Final = b'{"python":"3.14","world":"hive:agent@0.1.0"}'
"""The layer, byte for byte. `executor/tests/sandbox/test_python_agents.py` holds it against the component."""
