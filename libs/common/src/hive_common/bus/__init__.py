"""NATS: one way to connect, to answer requests and to ask."""

import sys
from importlib import import_module

# nats-py would load aiohttp for WebSockets, which nobody here speaks, and that is a third of what a service loads
# when it starts. None makes an import fail, which nats-py takes for "not installed".
if not {"aiohttp", "nats"} & sys.modules.keys():
    sys.modules["aiohttp"] = None  # type: ignore[assignment]
    try:
        # Bound to no name: `nats` is a module of this package, too.
        import_module("nats")
    finally:
        del sys.modules["aiohttp"]
