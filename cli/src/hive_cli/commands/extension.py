"""`hive extension`: programs beside the installation that read what it publishes."""

import time
from pathlib import Path
from typing import Annotated

import typer
from hive_common.artifacts.quantities import parse_duration
from hive_common.ops.files import replace_file

from hive_cli.home import find_home
from hive_cli.options import HomeOption, JsonOption
from hive_cli.output import err, print_json

app = typer.Typer(no_args_is_help=True, help="Let a program read the published events.")


@app.command("token")
def token(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the extension: letters, digits, '-' and '_'.")],
    expires: Annotated[
        str, typer.Option("--expires", metavar="DURATION", help="How long it is good, such as 12h or 90d.")
    ] = "30d",
    out_file: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write the credentials there, mode 0600.")
    ] = None,
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Make credentials for NATS that read `hive.events.>`, now and from the first event on, and do nothing else.

    They are printed, for a `.creds` file as every NATS client takes it. They cannot be taken back before they
    expire.
    """
    from hive_common.bus.jwt import credentials_text
    from hive_common.bus.policy import EXTENSION, policy

    from hive_cli.supervisor.identities import authority_of
    from hive_cli.supervisor.public import nats_for_others

    place = find_home(home)
    settings = place.settings()
    now_s = int(time.time())
    expires_s = now_s + max(1, parse_duration(expires, path="--expires") // 1000)
    text = credentials_text(authority_of(place).extension(name, now_s, expires_s))
    inbox = policy()[EXTENSION].named(name).inbox
    if out_file is not None:
        replace_file(out_file, text.encode(), mode=0o600)
    if as_json:
        print_json(
            {
                "name": name,
                "url": settings.endpoints.nats,
                "url_for_others": nats_for_others(settings),
                "ca_file": str(place.ca_file) if settings.public else "",
                "inbox_prefix": inbox,
                "expires_us": expires_s * 1_000_000,
                **({"file": str(out_file)} if out_file else {"credentials": text}),
            }
        )
    elif out_file is None:
        typer.echo(text, nl=False)
    else:
        err.print(f"{out_file}: for NATS at {nats_for_others(settings)}, inbox prefix {inbox}")
