"""`python -m hive_audit --config FILE`."""

from hive_common.ops.config import ServiceConfig
from hive_common.ops.lifecycle import run_process

from hive_audit.bootstrap import main

if __name__ == "__main__":
    run_process("hive_audit", ServiceConfig, main)
