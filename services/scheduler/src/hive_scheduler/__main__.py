"""`python -m hive_scheduler --config FILE`."""

from hive_common.ops.config import ServiceConfig
from hive_common.ops.lifecycle import run_process

from hive_scheduler.bootstrap import main

if __name__ == "__main__":
    run_process("scheduler", ServiceConfig, main)
