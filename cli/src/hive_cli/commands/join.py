"""`hive executor join`: makes this machine a device of an installation that runs on another one."""

import contextlib
import platform
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from hive_common.contracts.joining import parse_token
from hive_common.kernel.errors import Conflict, InvalidArgument
from hive_common.ops.config import write_config
from rich.markup import escape

from hive_cli.home import ExecutorEntry, Home, JoinedSettings, find_home
from hive_cli.model_servers import ModelCaOption, ModelKeyOption, ModelUrlOption, chosen_urls
from hive_cli.options import HomeOption
from hive_cli.output import err
from hive_cli.placing import LabelOption, TierOption, chosen_labels, chosen_tier, with_labels

if TYPE_CHECKING:
    from hive_cli.joining import Admission

REGION = "region"
STDIN = "-"


def join(
    token: Annotated[
        str, typer.Argument(metavar="TOKEN", help="What `hive executor token` printed; - reads it from stdin.")
    ],
    name: Annotated[str, typer.Option("--name", help="Of this machine, for people; else its host name.")] = "",
    slots: Annotated[
        int,
        typer.Option("--slots", min=0, max=1024, help="Tasks at the same time; else one for each core."),
    ] = 0,
    region: Annotated[str, typer.Option("--region", help="Label for placement, and for data that stays.")] = "",
    tier: TierOption = None,
    label: LabelOption = None,
    model_url: ModelUrlOption = None,
    model_key: ModelKeyOption = None,
    model_ca: ModelCaOption = None,
    counts_only: Annotated[
        bool,
        typer.Option(
            "--counts-only", help="The log keeps of this machine's model calls only how much they used, no texts."
        ),
    ] = False,
    with_model: Annotated[
        bool,
        typer.Option("--with-model", help="Serve a small real model here; needs the extra hivefabric\\[model]."),
    ] = False,
    free_ports: Annotated[
        bool, typer.Option("--free-ports", help="Any free port instead of 8500 for models: for one home of many.")
    ] = False,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Return once it works, and leave it running.")
    ] = False,
    home: HomeOption = None,
) -> None:
    """Join this machine to an installation, and start its executor. `hive up` starts it again later.

    The key is made here and stays here; all connections go out from here. A token admits one machine, once.
    """
    from hive_cli.joining import admitted, check_address, trusted_ca

    place = find_home(home)
    shown = parse_token(typer.get_text_stream("stdin").read() if token == STDIN else token)
    chosen = _chosen_name(name)
    urls = chosen_urls(model_url, model_key, model_ca) or ()
    chosen_as = chosen_tier(tier) or "worker"
    labels = with_labels({REGION: region}, chosen_labels(label))
    if with_model:
        from hive_executor.small_model import require_small_model

        require_small_model()
    check_address(shown)
    with _new_home(place):
        ca = trusted_ca(shown) if shown.fingerprint else ""
        admission = admitted(shown, ca, chosen)
        _install(place, admission)
        settings = JoinedSettings(
            gateway=admission.credentials.blobs_url,
            nats=admission.credentials.nats_url,
            owner=admission.credentials.owner,
            executor=ExecutorEntry(chosen, admission.credentials.executor_id, tier=chosen_as),
            ports=_ports(free_ports),
            slots=slots,
            labels=labels,
            model_urls=urls,
            token_public_key=admission.credentials.token_public_key,
            kill_public_key=admission.credentials.kill_public_key,
            counts_only=counts_only,
        )
        write_config(place.joined_file, settings)
    err.print(escape(f"joined {shown.url} as {chosen} ({admission.credentials.executor_id})"))
    raise typer.Exit(_start(place, detach, with_model))


@contextlib.contextmanager
def _new_home(home: Home) -> Iterator[None]:
    """Hold a folder that becomes a home in the block, and leave nothing of it where that fails.

    Raises:
        Conflict: something else is in it.
    """
    if home.is_joined():
        raise Conflict(
            f"{home.root} has joined {home.joined().gateway} already; start it with `hive up`, "
            "or choose another folder with --home"
        )
    if home.exists():
        raise Conflict(f"{home.root} is an installation of its own; choose another folder with --home")
    was_there = home.root.exists()
    if was_there and any(home.root.iterdir()):
        raise _occupied(home)
    with home.locked():
        # Whoever else had it until now has left something in it, which is not ours to remove.
        if any(path != home.run_dir for path in home.root.iterdir()):
            raise _occupied(home)
        try:
            yield
        except BaseException:
            _clear(home, was_there)
            raise


def _occupied(home: Home) -> Conflict:
    return Conflict(f"{home.root} is not empty; choose another folder with --home")


def _clear(home: Home, was_there: bool) -> None:
    if not was_there:
        shutil.rmtree(home.root, ignore_errors=True)
        return
    for path in home.root.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _install(home: Home, admission: "Admission") -> None:
    from hive_common.bus.jwt import Credentials, credentials_text

    from hive_cli.supervisor.provision import write_private

    for folder in (home.secrets_dir, home.tls_dir, home.config_dir, home.logs_dir):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if admission.ca:
        home.ca_file.write_text(admission.ca)
    held = Credentials(admission.credentials.nats_jwt, admission.seed)
    write_private(home.credentials_file, credentials_text(held))


def _ports(free_ports: bool) -> dict[str, int]:
    from hive_cli.supervisor import names, ports
    from hive_cli.supervisor.joined import EXECUTOR, MODELS

    return ports.pick([names.ops_port(EXECUTOR), MODELS], {}, preferred=not free_ports)


def _chosen_name(name: str) -> str:
    chosen = name.strip() or platform.node().split(".")[0]
    if not chosen or not chosen.isprintable():
        raise InvalidArgument("--name: expected a name that people recognise, such as desktop")
    return chosen


def _start(home: Home, detach: bool, with_model: bool) -> int:
    from hive_cli.supervisor.progress import to_console
    from hive_cli.supervisor.wishes import Wishes

    report = to_console(err)
    wishes = Wishes(small_model=with_model or None)
    if detach:
        from hive_cli.supervisor.detach import start_detached

        return start_detached(home, wishes, report)
    from hive_cli.supervisor.supervisor import supervise

    return supervise(home, wishes, report)
