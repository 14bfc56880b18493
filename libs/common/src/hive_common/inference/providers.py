"""Providers of models outside, as configurations name them: where they are, what they serve, and what it costs."""

from collections.abc import Iterable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Final, Literal, NoReturn
from urllib.parse import urlsplit

import msgspec

from hive_common.kernel.errors import InvalidArgument
from hive_common.kernel.money import Price, pico_usd_per_token
from hive_common.ops.config import read_secret
from hive_common.ops.tls import is_loopback

PROVIDERS_MAX: Final = 32
MODELS_MAX: Final = 200
_NAME_CHARACTERS: Final = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_.")
_TOKENS_MAX: Final = 100_000_000


class ProviderModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A model of a provider.

    Attributes:
        name: as the provider calls it.
        input_usd, output_usd: of a million tokens; 0 where it costs nothing, and never left out.
        context_tokens: what prompt and answer may have together.
        max_output_tokens: what an answer may have whose call names no limit.
        aliases: other names under which it may be called here, such as that of a model on a device.
        limit_field: in which the provider takes the limit of an answer.
        tools: it takes tools.
        embeds: it makes embeddings, and nothing else.
    """

    name: str
    input_usd: Decimal | None = None
    output_usd: Decimal | None = None
    context_tokens: int = 0
    max_output_tokens: int = 4_096
    aliases: tuple[str, ...] = ()
    limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    tools: bool = True
    embeds: bool = False

    @property
    def price(self) -> Price:
        """What it costs. Only of a model that was checked."""
        assert self.input_usd is not None
        assert self.output_usd is not None
        return Price(
            pico_usd_per_token(self.input_usd, "input_usd"), pico_usd_per_token(self.output_usd, "output_usd")
        )


class ProviderConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A provider in a configuration.

    Attributes:
        name: for people, and in what is recorded.
        base_url: ends in `/v1`, as for OpenAI's clients.
        key_file: of mode 0600, with the key to show there.
        models: that may be called; no others are.
    """

    name: str
    base_url: str
    key_file: str
    models: tuple[ProviderModel, ...]


def check_providers(providers: Sequence[ProviderConfig], where: str, *, keys: bool = True) -> None:
    """Refuse what could not be called, or what would spend money that nobody counts.

    Args:
        providers: of a configuration.
        where: the file and the path in it, for errors, such as `hive.json: providers`.
        keys: also see to it that the files of the keys can be read.

    Raises:
        InvalidArgument: with the path, and what is to be done.
    """
    if len(providers) > PROVIDERS_MAX:
        _refuse(where, f"{len(providers)} of them; expected at most {PROVIDERS_MAX}")
    _check_names((one.name for one in providers), where)
    for number, provider in enumerate(providers):
        at = f"{where}[{number}]"
        if not provider.name or set(provider.name) - _NAME_CHARACTERS:
            _refuse(f"{at}.name", f"got {provider.name[:40]!r}; expected small letters, digits, `-`, `_` and `.`")
        _check_url(provider.base_url, f"{at}.base_url")
        if not provider.models or len(provider.models) > MODELS_MAX:
            _refuse(f"{at}.models", f"{len(provider.models)} of them; expected 1 to {MODELS_MAX}")
        names = [name for model in provider.models for name in (model.name, *model.aliases)]
        _check_names(names, f"{at}.models")
        for place, model in enumerate(provider.models):
            _check_model(model, provider.name, f"{at}.models[{place}]")
        if keys:
            try:
                read_secret(Path(provider.key_file))
            except InvalidArgument as error:
                _refuse(f"{at}.key_file", error.message)


def _check_model(model: ProviderModel, provider: str, at: str) -> None:
    if not model.name:
        _refuse(f"{at}.name", f"is empty; expected a model's name as {provider} has it")
    for name in ("input_usd", "output_usd"):
        price = getattr(model, name)
        if price is None:
            _refuse(
                f"{at}.{name}",
                f"is missing: the price of `{model.name}`; expected USD for a million tokens as {provider} lists"
                f' it, such as "{name}": 0.15, and 0 where it costs nothing',
            )
        pico_usd_per_token(price, f"{at}.{name}")
    if not 0 < model.context_tokens <= _TOKENS_MAX:
        _refuse(
            f"{at}.context_tokens",
            f"got {model.context_tokens}; expected how many tokens prompt and answer of `{model.name}` may have",
        )
    if not 0 < model.max_output_tokens <= model.context_tokens:
        _refuse(
            f"{at}.max_output_tokens",
            f"got {model.max_output_tokens}; expected 1 to {model.context_tokens}, its context_tokens",
        )


def _check_url(url: str, at: str) -> None:
    parts = urlsplit(url)
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or parts.query
        or parts.fragment
        or parts.username
    ):
        _refuse(at, f"got {url[:80]!r}; expected a base URL such as https://api.openai.com/v1")
    if parts.scheme == "http" and not is_loopback(parts.hostname):
        _refuse(at, f"{url[:80]}: prompts and the key would go unencrypted; expected https")
    if not parts.path.rstrip("/").endswith("/v1"):
        _refuse(at, f"{url[:80]}: expected a base URL that ends in /v1, below which is /chat/completions")


def _check_names(names: Iterable[str], where: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            _refuse(where, f"`{name}` stands there twice")
        seen.add(name)


def _refuse(path: str, problem: str) -> NoReturn:
    raise InvalidArgument(f"{path}: {problem}", path=path)
