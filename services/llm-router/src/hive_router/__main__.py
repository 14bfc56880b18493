"""`python -m hive_router --config FILE [--supervised]`."""

from hive_common.ops.config import ServiceConfig
from hive_common.ops.lifecycle import run_process

from hive_router.bootstrap import main

if __name__ == "__main__":
    run_process("hive_router", ServiceConfig, main)
