"""The permission `model`: calls of language models by a guest, and the limit on what they generate together."""

from contextlib import aclosing
from typing import Any, Final

import msgspec
from hive_common.contracts.budgets import SharedBudget
from hive_common.contracts.permissions import ModelPermission, Permissions
from hive_common.inference.bodies import decode
from hive_common.inference.calls import PIN_ANY, Completer, Endpoint, ModelCall
from hive_common.kernel.errors import (
    BudgetExhausted,
    HiveError,
    InvalidArgument,
    NotFound,
    PayloadTooLarge,
    Unavailable,
)
from hive_common.kernel.ids import new_id
from hive_common.permissions import check_model
from hive_common.permissions.actions import model_action

from hive_executor.host.approval import Approvals
from hive_executor.sandbox.model import HOST_ANSWER_BYTES_MAX

Body = dict[str, msgspec.Raw]

ANY_MODEL: Final = "*"
_ENDPOINTS: Final[dict[str, Endpoint]] = {"chat": "chat", "complete": "completions", "embed": "embeddings"}
_LIMITS: Final = ("max_tokens", "max_completion_tokens", "n_predict")
"""What back ends take for the most that an answer may have; `n_predict` is llama.cpp's, where -1 is without end."""
_CHOICES: Final = ("n", "best_of")
CHOICES_MAX: Final = 128


class _Usage(msgspec.Struct, frozen=True):
    completion_tokens: int | None = None


class _Answered(msgspec.Struct, frozen=True):
    usage: _Usage | None = None


class ModelAccess:
    """Calls models for one attempt.

    Args:
        completer: serves the calls.
        permission: what the manifest asks for.
        pin: where the data may go.
        counts_only: keep no prompt and no completion.
        job, task, attempt: on whose account; empty and 0 for a try-out.
        approvals: of the attempt, with its token.
        budgets: what its calls share with others. The router counts.

    Attributes:
        spent: tokens that were generated, or may have been.
    """

    def __init__(
        self,
        completer: Completer,
        permission: ModelPermission,
        *,
        pin: str = PIN_ANY,
        counts_only: bool = False,
        job: str = "",
        task: str = "",
        attempt: int = 0,
        approvals: Approvals | None = None,
        budgets: tuple[SharedBudget, ...] = (),
    ) -> None:
        self._budgets = budgets
        self._completer = completer
        self._permission = permission
        self._pin = pin
        self._counts_only = counts_only
        self._job = job
        self._task = task
        self._attempt = attempt
        self._approvals = approvals or Approvals()
        self.spent = 0

    async def call(self, operation: str, request: bytes, left_ms: int) -> bytes:
        """Answer one call; see `Capability`.

        Raises:
            PermissionDenied: the manifest does not name the model.
            BudgetExhausted: the tokens of the attempt are used up.
            InvalidArgument: the request is no JSON object, asks for a stream, or the back end refuses it.
            HiveError: what the completer raises.
        """
        endpoint = _ENDPOINTS.get(operation)
        if endpoint is None:
            raise InvalidArgument(f"model.{operation} does not exist; expected one of {', '.join(_ENDPOINTS)}")
        body = decode(request, Body)
        if _value(body, "stream", bool, "true or false"):
            raise InvalidArgument("stream: an answer comes whole here; expected no `stream`", path="stream")
        body.pop("stream", None)
        model = await self._model(body)
        body["model"] = _raw(model)
        await self._approvals.need(
            "model", lambda agent: model_action(agent, endpoint, model, body, self._counts_only)
        )
        reserved = 0 if endpoint == "embeddings" else self._bound(body)
        call = ModelCall(
            id=new_id(),
            endpoint=endpoint,
            model=model,
            body=msgspec.json.encode(body),
            stream=False,
            deadline_ms=left_ms,
            pin=self._pin,
            counts_only=self._counts_only,
            job=self._job,
            task=self._task,
            attempt=self._attempt,
            tokens_max=reserved,
            token=self._approvals.token,
            budgets=self._budgets,
        )
        return await self._complete(call, reserved)

    async def _model(self, body: Body) -> str:
        asked: str | None = _value(body, "model", str, "the name of a model")
        names = self._permission.names
        if asked:
            check_model(Permissions(model=self._permission), asked)
            return asked
        if names[0] != ANY_MODEL:
            return names[0]
        served = await self._completer.models()
        if not served:
            raise NotFound("no model is served at present", nearest=[])
        return next((one for one in served if one.loaded), served[0]).name

    def _bound(self, body: Body) -> int:
        """Lower what the request may generate to what is left; return how many tokens that are at most."""
        choices = _choices(body)
        left = (self._permission.max_tokens - self.spent) // choices
        if left < 1:
            raise BudgetExhausted(
                f"{self.spent} of the {self._permission.max_tokens} tokens of this attempt are used up "
                "(`permissions.model.max_tokens`)",
                limit=self._permission.max_tokens,
                spent=self.spent,
            )
        asked: dict[str, int | None] = {name: _value(body, name, int, "a whole number from 1") for name in _LIMITS}
        lowered = {name: min(count, left) for name, count in asked.items() if count is not None}
        for name, count in lowered.items():
            if count < 1:
                raise InvalidArgument(f"{name} is {count}; expected a whole number from 1", path=name)
        if not lowered.keys() - {"n_predict"}:
            lowered["max_tokens"] = min(lowered.get("n_predict", left), left)
        body.update({name: _raw(count) for name, count in lowered.items()})
        return max(lowered.values()) * choices

    async def _complete(self, call: ModelCall, reserved: int) -> bytes:
        self.spent += reserved
        try:
            answer = await self._completer.complete(call)
        except HiveError:
            self.spent -= reserved
            raise
        data = bytearray()
        # What is not read to its end may have been generated to its end, so it stays reserved.
        async with aclosing(answer.chunks) as chunks:
            async for chunk in chunks:
                data += chunk
                if len(data) > HOST_ANSWER_BYTES_MAX:
                    raise PayloadTooLarge(f"the answer has more than {HOST_ANSWER_BYTES_MAX} bytes")
        generated = _generated(data)
        if generated is not None:
            self.spent += generated - reserved
        return bytes(data)


def _generated(answer: bytearray) -> int | None:
    """Return the tokens that an answer says it has; None where it does not say."""
    try:
        usage = msgspec.json.decode(answer, type=_Answered).usage
    except (msgspec.DecodeError, RecursionError) as error:
        raise Unavailable(f"what the back end answered is no answer of OpenAI's API: {error}") from error
    if usage is None or usage.completion_tokens is None:
        return None
    return max(0, usage.completion_tokens)


def _choices(body: Body) -> int:
    """Return how many answers a request asks for; each may have as many tokens as the request allows."""
    count = 1
    for name in _CHOICES:
        asked: int | None = _value(body, name, int, f"1 to {CHOICES_MAX}")
        if asked is not None:
            if not 1 <= asked <= CHOICES_MAX:
                raise InvalidArgument(f"{name} is {asked}; expected 1 to {CHOICES_MAX}", path=name)
            count = max(count, asked)
    prompts = _value(body, "prompt", str | list[Any], "a text or a list")
    if isinstance(prompts, list) and any(isinstance(prompt, str | list) for prompt in prompts):
        count *= len(prompts)
    return count


def _value(body: Body, name: str, kind: Any, expected: str) -> Any:
    """Return a parameter as a `kind`; None where it is absent or null."""
    raw = body.get(name)
    if raw is None:
        return None
    try:
        return msgspec.json.decode(raw, type=kind | None)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidArgument(f"{name}: {error}; expected {expected}", path=name) from error


def _raw(value: str | int) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))
