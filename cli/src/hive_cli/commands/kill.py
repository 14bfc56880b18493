"""`hive kill` and `hive unkill`: orders, signed here, that stop what runs, or lift such an order."""

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from hive_common.kernel.errors import Conflict, FailedPrecondition, HiveError, InvalidArgument, Unavailable
from rich.markup import escape

from hive_cli.home import Home, find_home
from hive_cli.options import HomeOption, JsonOption
from hive_cli.output import clean, err, out, print_json, print_table
from hive_cli.session import connect_to

if TYPE_CHECKING:
    from hive_common.contracts.messages import KillOrder
    from hive_common.control.orders import Order

    from hive_cli.api import Api

TRIES_MAX = 5
"""How often an order is made anew when another one came at the same time."""

LOOK_PATIENCE_S = 2.0
"""An order is given although nobody can say whether its job exists."""

ENDED = frozenset({"succeeded", "failed", "cancelled"})

app = typer.Typer(invoke_without_command=True)
AllOption = Annotated[bool, typer.Option("--all", help="Everything.")]
AgentOption = Annotated[
    str, typer.Option("--agent", metavar="NAME[@VERSION]", help="An agent, in all versions or in one.")
]
ExecutorOption = Annotated[str, typer.Option("--executor", metavar="EXECUTOR", help="A device, by name or id.")]
JobOption = Annotated[str, typer.Option("--job", metavar="JOB", help="A job, by its id.")]
ReasonOption = Annotated[str, typer.Option("--reason", help="For people. Kept in the log.")]


@app.callback()
def kill(
    context: typer.Context,
    everything: AllOption = False,
    agent: AgentOption = "",
    executor: ExecutorOption = "",
    job: JobOption = "",
    reason: ReasonOption = "",
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Stop everything, an agent, a device or a job, now and on every device, until `hive unkill`.

    What runs of it ends within two seconds, and nothing of it starts until the order is lifted.

    A job ends as cancelled; tasks of an agent fail with the code killed; what a device had waits for another one.
    """
    if context.invoked_subcommand is None:
        _give("kill", everything, agent, executor, job, reason, as_json, find_home(home))


def unkill(
    everything: AllOption = False,
    agent: AgentOption = "",
    executor: ExecutorOption = "",
    job: JobOption = "",
    reason: ReasonOption = "",
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Lift a kill order, named by the same option. What it has ended stays so."""
    _give("lift", everything, agent, executor, job, reason, as_json, find_home(home))


@app.command("list")
def list_orders(as_json: JsonOption = False, home: HomeOption = None) -> None:
    """List what is stopped, and by which order."""
    with connect_to(find_home(home)) as api:
        found = api.get("/v1/control/kill")
    if as_json:
        print_json(found)
        return
    if not found["stops"]:
        out.print("nothing is stopped")
        return
    print_table(("stopped", "order", "since", "reason", "lifted by"), [_row(one) for one in found["stops"]])


def stop_sentence(one: dict[str, Any]) -> str:
    """Return what `hive status` says of something that is stopped."""
    reason = f" ({clean(one['reason'])})" if one["reason"] else ""
    return f"{_what(one)}, by order {one['epoch']}{reason}; lift it with: {_lifted_by(one)}"


def _row(one: dict[str, Any]) -> tuple[str, ...]:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one["issued_us"] / 1e6))
    return _what(one), str(one["epoch"]), since, clean(one["reason"]), _lifted_by(one)


def _what(one: dict[str, Any]) -> str:
    if one["scope"] == "all":
        return "everything"
    return f"{one['scope']} {clean(one['name'] or one['target'])}"


def _lifted_by(one: dict[str, Any]) -> str:
    return "hive unkill " + ("--all" if one["scope"] == "all" else f"--{one['scope']} {one['target']}")


def _give(
    action: str,
    everything: bool,
    agent: str,
    executor: str,
    job: str,
    reason: str,
    as_json: bool,
    home: Home,
) -> None:
    chosen = [(scope, value) for scope, value in (("agent", agent), ("executor", executor), ("job", job)) if value]
    if everything:
        chosen.append(("all", ""))
    if len(chosen) != 1:
        raise InvalidArgument("expected one of --all, --agent, --executor and --job")
    (scope, target), *_ = chosen
    key = _key(home)
    try:
        with connect_to(home) as api:
            meant = _resolved(api, home, action, scope, target)
            epoch, answer = _ordered(api, key, action, scope, meant, reason)
    except Unavailable as error:
        raise Unavailable(
            f"{error.message}; whether it was ordered is said by: hive kill list. "
            "To stop all that runs on this machine: hive down"
        ) from error
    _say(answer, epoch, action, scope, target, as_json)


def _say(answer: Any, epoch: int, action: str, scope: str, target: str, as_json: bool) -> None:
    from hive_common.control.orders import entry_of, in_words, options_of

    entry = entry_of(scope, target)
    if as_json:
        print_json(answer)
    elif epoch == 0:
        out.print(f"{escape(in_words(entry))} is stopped already; see: hive kill list")
    elif action == "kill":
        out.print(f"{escape(in_words(entry))} is stopped, by order {epoch}")
        err.print(f"[dim]lift it with: hive unkill {escape(options_of(entry))}[/dim]")
    else:
        out.print(f"{escape(in_words(entry))} may run again, by order {epoch}")


def _key(home: Home) -> Any:
    from hive_common.control.keys import private_key
    from hive_common.ops.config import read_secret

    if not home.exists() or home.is_joined():
        connect_to(home)  # says what is wrong
    file = home.kill_key_file
    if not file.exists():
        raise FailedPrecondition(
            f"{file} is not here: orders are given on the machine that has it. A home from before there were kill "
            "orders gets one with: hive down, and hive up",
            file=str(file),
        )
    return private_key(read_secret(file), str(file))


def _resolved(api: "Api", home: Home, action: str, scope: str, target: str) -> str:
    """Return the target as an order names it. Raises HiveError, in one sentence, where there is no such thing."""
    if scope == "executor":
        return str(api.get(f"/v1/executors/{target}")["executor_id"])
    if scope == "job" and action == "kill":
        _check_job(home, target)
    return target


def _check_job(home: Home, job: str) -> None:
    from hive_common.kernel.ids import is_id

    if not is_id(job):
        raise InvalidArgument(f"--job: got {job!r}; expected the id of a job, as `hive job list` shows it")
    try:
        with connect_to(home, LOOK_PATIENCE_S) as api:
            state = api.get(f"/v1/jobs/{job}")["state"]
    except HiveError as error:
        if error.retryable:
            return
        raise
    if state in ENDED:
        raise FailedPrecondition(f"job {job} is over, {state}: nothing of it runs")


def _ordered(api: "Api", key: Any, action: Any, scope: Any, target: str, reason: str) -> tuple[int, Any]:
    """Sign and send the next order; return its epoch, 0 where its target is stopped already, and what stands."""
    from hive_common.control.keys import sign
    from hive_common.control.orders import following

    for tries_left in reversed(range(TRIES_MAX)):
        found = api.get("/v1/control/kill")
        known = _newest(found, key)
        try:
            order = following(known, action, scope, target, reason, time.time_ns() // 1000)
        except Conflict:
            return 0, found
        try:
            return order.epoch, api.post("/v1/control/kill", _body(sign(key, order)))
        except Conflict:
            # Somebody else gave one at the same time: this one is made anew, after that.
            if not tries_left:
                raise
    raise AssertionError


def _newest(found: Any, key: Any) -> "Order | None":
    """Return the newest order, which this home's key has signed. Raises PermissionDenied where it has not."""
    from hive_common.contracts.messages import KillOrder
    from hive_common.control.keys import public_text
    from hive_common.control.verifier import Verifier

    if not found["order"]:
        return None
    return Verifier(public_text(key)).take(KillOrder(order=found["order"], signature=found["signature"]))


def _body(signed: "KillOrder") -> dict[str, str]:
    return {"order": signed.order, "signature": signed.signature}
