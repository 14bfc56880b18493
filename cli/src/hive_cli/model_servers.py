"""Where servers of models answer, as options name it: URLs, and files of what is needed there."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from hive_common.inference.config import BackEndConfig
from hive_common.kernel.errors import InvalidArgument
from hive_common.ops.config import read_secret

Urls = tuple[str | BackEndConfig, ...]

ModelUrlOption = Annotated[
    list[str] | None,
    typer.Option("--model-url", metavar="URL", help="Where a server of models answers; else Ollama's. Kept."),
]
ModelKeyOption = Annotated[
    list[str] | None,
    typer.Option("--model-key", metavar="URL=FILE", help="The key to show at that --model-url; mode 0600. Kept."),
]
ModelCaOption = Annotated[
    list[str] | None,
    typer.Option(
        "--model-ca",
        metavar="URL=FILE",
        help="Whom to trust at that --model-url over https. Kept.",
    ),
]


def chosen_urls(urls: Iterable[str] | None, keys: Iterable[str] | None, cas: Iterable[str] | None) -> Urls | None:
    """Return what the three options say together, or None where none is given.

    Raises:
        InvalidArgument: a URL is none, a file cannot be used, or it is for a URL that is not named.
    """
    if not (urls or keys or cas):
        return None
    chosen = [_checked_url(url) for url in urls or ()]
    key_of, ca_of = _files("--model-key", keys, chosen), _files("--model-ca", cas, chosen)
    for file in key_of.values():
        read_secret(file)
    return tuple(_server(url, key_of.get(url, ""), ca_of.get(url, "")) for url in chosen)


def _server(url: str, key_file: str, ca_file: str) -> str | BackEndConfig:
    if not key_file and not ca_file:
        return url
    if ca_file:
        # Loaded where it is used, as all that costs time and few commands need.
        from hive_common.ops.tls import client_context

        if not url.startswith("https://"):
            raise InvalidArgument(f"--model-ca: {url} has no certificate to check; expected an https URL")
        client_context(ca_file)
    return BackEndConfig(url, key_file, ca_file)


def _files(option: str, given: Iterable[str] | None, urls: list[str]) -> dict[str, str]:
    files = {}
    for text in given or ():
        url, equals, file = text.partition("=")
        url = url.rstrip("/")
        if not equals or not file:
            raise InvalidArgument(f"{option}: got {text!r}; expected URL=FILE")
        if url not in urls:
            raise InvalidArgument(f"{option}: {url} is not among the URLs of --model-url; name it there as well")
        files[url] = str(Path(file).expanduser().absolute())
    return files


def _checked_url(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise InvalidArgument(f"--model-url: got {url!r}; expected a base URL such as http://127.0.0.1:11434")
    return url.rstrip("/")
