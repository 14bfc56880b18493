"""Providers outside: the same back ends as on devices, with models that are named beforehand and cost money.

Nothing is asked of a provider but calls: what it serves is what the configuration says.
"""

from typing import Final

import msgspec
from hive_common.contracts.events import Model
from hive_common.inference.abilities import COMPLETION, EMBEDDING, OPENAI, TOOLS
from hive_common.inference.backend import BackEnd as Server
from hive_common.inference.backends import BackEnds
from hive_common.inference.bodies import decode
from hive_common.inference.calls import Answer, ModelCall
from hive_common.inference.config import BackEndConfig
from hive_common.inference.providers import ProviderConfig, ProviderModel
from hive_common.kernel.errors import (
    HiveError,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    RateLimited,
    Unavailable,
)
from hive_common.kernel.money import Price

from hive_router.bodies import LIMITS, Fields, answers_of, given, limit_of, prompts_of
from hive_router.domain.budgets import Amount
from hive_router.domain.selection import BackEnd
from hive_router.fleet import Fleet

PREFIX: Final = "cloud:"
FREE: Final = Price(0, 0)
# They let a call cost something else than the price that was configured.
_CHANGE_THE_PRICE: Final = ("service_tier", "web_search_options", "models", "plugins", "provider", "audio")


class Bounded(msgspec.Struct, frozen=True):
    """A call as it goes to a provider, and the most that it can use there."""

    call: ModelCall
    price: Price
    input_tokens: int
    output_tokens: int

    @property
    def need(self) -> Amount:
        """What is reserved for it."""
        return self.cost(self.input_tokens, self.output_tokens)

    def cost(self, input_tokens: int, output_tokens: int) -> Amount:
        """Return what so many tokens cost."""
        return Amount(self.price.nano_usd(input_tokens, output_tokens), input_tokens + output_tokens)


class Providers:
    """All providers.

    Args:
        configs: checked.
        calls_max: at each of them at once.
    """

    def __init__(self, configs: tuple[ProviderConfig, ...], calls_max: int) -> None:
        self._calls_max = calls_max
        self._models = {
            PREFIX + one.name: {name: model for model in one.models for name in (model.name, *model.aliases)}
            for one in configs
        }
        self._prices = {(PREFIX + one.name, model.name): model.price for one in configs for model in one.models}
        urls = [BackEndConfig(one.base_url, one.key_file) for one in configs]
        self._names = [one.name for one in configs]
        self._servers = BackEnds(urls, calls_max, looks=False)
        self._by_id: dict[str, Server] = {}

    async def open(self, fleet: Fleet) -> None:
        """Read the keys, and put the providers into the fleet. Raises InvalidArgument where one cannot be read."""
        await self._servers.open()
        for name, server in zip(self._names, self._servers.all, strict=True):
            key = PREFIX + name
            models = self._models[key]
            server.found = tuple(_model(model) for model in {one.name: one for one in models.values()}.values())
            self._by_id[key] = server
            served = {called: _model(model) for called, model in models.items()}
            fleet.put(
                BackEnd(
                    id=key,
                    executor="",
                    name=name,
                    owner="",
                    is_host=False,
                    models=served,
                    slots=self._calls_max,
                    provider=name,
                )
            )

    async def close(self) -> None:
        """Close all connections."""
        await self._servers.close()

    def bounded(self, call: ModelCall, backend: BackEnd) -> Bounded:
        """Return a call as its provider gets it: by its name there, and with a limit of what it may generate.

        Raises:
            InvalidArgument: the body asks for what nobody could tell the price of.
        """
        model = self._models[backend.id][call.model]
        return bounded(call, model, self._prices[backend.id, model.name])

    async def complete(self, call: ModelCall, backend: BackEnd) -> Answer:
        """Begin a call that `bounded` has returned (`Completer.complete`)."""
        return await self._by_id[backend.id].complete(call)


def bounded(call: ModelCall, model: ProviderModel, price: Price) -> Bounded:
    """Return a call with its bounds (`Providers.bounded`)."""
    fields = decode(call.body, Fields)
    for name in _CHANGE_THE_PRICE:
        if given(fields, name):
            raise InvalidArgument(
                f"body.{name}: a call that costs money cannot have this: its price would be another one",
                path=name,
            )
    fields["model"] = msgspec.Raw(msgspec.json.encode(model.name))
    output = 0
    if call.endpoint != "embeddings":
        limit = min(limit_of(fields) or model.max_output_tokens, model.context_tokens)
        for name in LIMITS:
            fields.pop(name, None)
        fields[model.limit_field] = msgspec.Raw(msgspec.json.encode(limit))
        output = limit * answers_of(fields, call.endpoint)
    body = msgspec.json.encode(fields)
    return Bounded(
        call=msgspec.structs.replace(call, model=model.name, body=body),
        price=price,
        input_tokens=_input_bound(body, model, prompts_of(fields)),
        output_tokens=output,
    )


def metered(call: ModelCall, model: Model | None) -> Bounded:
    """Return a call whose tokens are counted, and cost no money, with its bounds."""
    fields = decode(call.body, Fields)
    room = 0 if model is None else model.context_tokens
    prompt = _prompt_bound(call.body, room, prompts_of(fields))
    return Bounded(call=call, price=FREE, input_tokens=prompt, output_tokens=call.tokens_max)


def cost_nothing(error: HiveError) -> bool:
    """Say whether a call that failed so cannot have generated anything: it was refused, or never arrived."""
    if isinstance(error, InvalidArgument | NotFound | RateLimited | PermissionDenied):
        return True
    return isinstance(error, Unavailable) and ("status" in error.fields or error.fields.get("reached") is False)


def _input_bound(body: bytes, model: ProviderModel, prompts: int) -> int:
    """Return the most tokens that a body can be read as: none has less than a byte, and a model reads no more than
    its context. What an image or a sound amounts to its size does not say.
    """
    return _prompt_bound(body, model.context_tokens, prompts)


def _prompt_bound(body: bytes, context_tokens: int, prompts: int) -> int:
    if b'"image_url"' in body or b'"input_audio"' in body or b'"file"' in body:
        return context_tokens or len(body)
    return min(len(body), context_tokens * prompts) if context_tokens else len(body)


def _model(model: ProviderModel) -> Model:
    abilities = (EMBEDDING,) if model.embeds else (COMPLETION, TOOLS) if model.tools else (COMPLETION,)
    return Model(
        name=model.name, backend=OPENAI, context_tokens=model.context_tokens, loaded=True, abilities=abilities
    )
