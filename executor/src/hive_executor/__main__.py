"""`python -m hive_executor --config FILE [--supervised]`."""

from hive_common.ops.lifecycle import run_process

from hive_executor.bootstrap import main
from hive_executor.config import ExecutorConfig

if __name__ == "__main__":
    run_process("hive_executor", ExecutorConfig, main)
