"""`hive model`: what can be called, why a call went where it went, and a conversation on the terminal."""

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer
from hive_common.kernel.errors import InvalidArgument
from hive_common.kernel.money import show_usd

from hive_cli.commands import spending
from hive_cli.options import HomeOption, JsonOption
from hive_cli.output import clean, err, out, print_json, print_table
from hive_cli.session import connect

if TYPE_CHECKING:
    from hive_cli.api import Api

app = typer.Typer(no_args_is_help=True, help="List models, talk to them, and see where calls went.")
_CHAT = "/v1/chat/completions"
_MIB = 2**20


@app.command("list")
def list_models(as_json: JsonOption = False, home: HomeOption = None) -> None:
    """List the models that can be called, and where they are served."""
    with connect(home) as api:
        found = api.get("/v1/models")["data"]
        if as_json:
            print_json({"models": found})
            return
        names = _executor_names(api)
    columns = ("name", "family", "quantisation", "size", "context", "loaded", "served by")
    print_table(columns, (_row(one, names) for one in found))


def _executor_names(api: "Api") -> dict[str, str]:
    return {one["executor_id"]: one["name"] for one in api.pages("/v1/executors", "executors", "after", limit=1000)}


def _row(one: dict[str, Any], names: dict[str, str]) -> tuple[str, ...]:
    size = f"{one['size_bytes'] / _MIB:,.0f} MiB" if one["size_bytes"] else ""
    context = str(one["context_tokens"] or "")
    outside = [f"cloud: {name}" for name in one["providers"]]
    devices = [names.get(key, key) for key in one["executors"]]
    served = ", ".join([*devices, *outside]) or "this host"
    return one["id"], one["family"], one["quantisation"], size, context, "yes" if one["loaded"] else "", served


@app.command("explain")
def explain(
    call: Annotated[str, typer.Argument(metavar="ID", help="The call's `x-request-id`.")],
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Show where a call went, and why not elsewhere."""
    with connect(home) as api:
        found = api.get(f"/v1/model-calls/{call}/explain")
        if as_json:
            print_json(found)
            return
        names = _executor_names(api)
    served = names.get(found["executor"], found["executor"])
    where = f"{found['route']} on {served}" if served else found["route"] or "nowhere"
    if found["provider"]:
        about = ", at most, since the answer did not say" if found["estimated"] else ""
        where = f"{found['route']} at {found['provider']}, for {show_usd(found['nano_usd'])}{about}"
    out.print(clean(f"{found['model']}: {found['outcome'] or 'under way'}, {where}, pinned to {found['pin']}"))
    print_table(
        ("candidate", "route", "back end", "score", "verdict"),
        (_candidate(one, names) for one in found["candidates"]),
    )


def _candidate(one: dict[str, Any], names: dict[str, str]) -> tuple[str, ...]:
    verdict = one["rejected"] or one["tried"] or "fit"
    detail = f": {one['detail']}" if one["detail"] else ""
    return (
        names.get(one["executor"], one["executor"]),
        one["route"],
        one["backend"],
        f"{one['score']:.2f}",
        verdict + detail,
    )


@app.command("chat")
def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As `hive model list` names it.")],
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="Without one: a conversation, or what is piped in.")
    ] = None,
    system: Annotated[str, typer.Option("--system", help="What the model is told beforehand.")] = "",
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Of one answer; else as many as the model likes.")
    ] = None,
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Talk to a model; its answer is shown as it comes."""
    messages = [{"role": "system", "content": system}] if system else []
    asked: dict[str, Any] = {"model": model, "messages": messages}
    if max_tokens is not None:
        asked["max_tokens"] = max_tokens
    with connect(home) as api:
        if prompt is None and sys.stdin.isatty() and not as_json:
            _converse(api, asked)
            return
        said = sys.stdin.read() if prompt is None else prompt
        if not said.strip():
            raise InvalidArgument("PROMPT: expected a text, as an argument or on standard input")
        messages.append({"role": "user", "content": said})
        if as_json:
            print_json(api.post(_CHAT, asked))
        else:
            _say(api, asked)


def _converse(api: "Api", asked: dict[str, Any]) -> None:
    err.print("an empty line or Ctrl-D ends it", style="dim")
    while True:
        try:
            said = input("> ")
        except (EOFError, KeyboardInterrupt):
            err.print()
            return
        if not said.strip():
            return
        asked["messages"].append({"role": "user", "content": said})
        asked["messages"].append({"role": "assistant", "content": _say(api, asked)})


def _say(api: "Api", asked: dict[str, Any]) -> str:
    """Show an answer as it comes and return it."""
    said = []
    with api.answer_events(_CHAT, asked | {"stream": True}) as (headers, events):
        try:
            for text in _texts(events):
                said.append(text)
                # What a model says is data: nothing of it may steer the terminal.
                sys.stdout.write(clean(text))
                sys.stdout.flush()
        except KeyboardInterrupt:
            # Leaving the stream ends the generation; the conversation goes on.
            err.print(" …", style="dim")
        finally:
            sys.stdout.write("\n")
            sys.stdout.flush()
    served = " on ".join(filter(None, (headers.get("x-hive-route"), headers.get("x-hive-executor"))))
    err.print(clean(f"{served}   hive model explain {headers.get('x-request-id', '')}"), style="dim")
    return "".join(said)


def _texts(events: Iterator[Any]) -> Iterator[str]:
    """Yield the pieces of an answer. Raises the error that ends it where it breaks off."""
    from hive_cli.api import openai_error

    for event in events:
        if event.data == "[DONE]":
            return
        chunk = json.loads(event.data)
        if "error" in chunk:
            raise openai_error(chunk["error"])
        for choice in chunk.get("choices") or ():
            if text := choice.get("delta", {}).get("content"):
                yield text


app.command("usage")(spending.usage)
app.add_typer(spending.app, name="budget")
