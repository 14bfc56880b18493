"""What a kill order does to jobs, tasks and executors."""

from hive_common.contracts.events import JobCancelRequested
from hive_common.control.kill_log import KillLog
from hive_common.control.orders import target_of

from hive_scheduler.dispatch import Dispatcher
from hive_scheduler.engine import Engine


def enforce(engine: Engine, dispatcher: Dispatcher, kills: KillLog) -> None:
    """Make what is stopped now stop: may be called after every order, and when a leader takes over.

    A stopped job is cancelled. A task of a stopped agent fails, and so does its job. What a stopped executor has is
    lost to it, and the tasks wait for another executor, or for the order to be lifted.
    """
    dispatcher.order_taken()
    stopped = kills.verifier.stopped
    if stopped:
        for job in list(engine.jobs.values()):
            entry = stopped.job(job.id)
            if entry is not None and job.end is None and job.cancel_reason is None:
                engine.apply(job, job.id, [JobCancelRequested(f"stopped {kills.words(entry)}")])
        if any(target_of(entry)[0] == "agent" for entry in stopped):
            _fail_tasks(engine, kills)
        dispatcher.stop_executors()
    engine.settle()


def _fail_tasks(engine: Engine, kills: KillLog) -> None:
    for job in list(engine.jobs.values()):
        if job.closing(engine.now_us()) is not None:
            continue
        # The first one ends the job, which takes the others with it.
        for task in job.tasks.values():
            if not task.ended and engine.fail_if_stopped(job, task, kills):
                break
