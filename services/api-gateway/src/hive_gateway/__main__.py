"""`python -m hive_gateway --config FILE [--supervised]`."""

from hive_common.ops.config import ServiceConfig
from hive_common.ops.lifecycle import run_process

from hive_gateway.bootstrap import main

if __name__ == "__main__":
    run_process("hive_gateway", ServiceConfig, main)
