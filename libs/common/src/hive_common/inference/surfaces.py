"""Both APIs as one ASGI application, as a device serves them on its loopback port."""

from hive_common.inference.calls import Completer
from hive_common.inference.errors import openai_refusal
from hive_common.inference.exchange import App, Caller, Callers, Exchange, Receive, Refusal, Scope, Send
from hive_common.inference.loopback import LoopbackOnly
from hive_common.inference.ollama import Ollama
from hive_common.inference.ollama_answers import refusal_of
from hive_common.inference.openai import OpenAI
from hive_common.kernel.errors import HiveError, body_of


def loopback_surfaces(completer: Completer, caller: Caller) -> App:
    """Return both APIs without a key, for programs of this machine only.

    Args:
        completer: serves the calls.
        caller: whoever uses this machine; keys are not asked for, and whatever is shown is not looked at.
    """
    return LoopbackOnly(Surfaces(completer, lambda _: caller), _refuse)


class Surfaces:
    """Answers OpenAI's and Ollama's paths, and nothing else.

    Args:
        completer: serves the calls.
        callers: says who calls.
    """

    def __init__(self, completer: Completer, callers: Callers) -> None:
        self._openai = OpenAI(completer, callers)
        self._ollama = Ollama(completer, callers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if Ollama.route(scope["path"]):
            await self._ollama(scope, receive, send)
        else:
            # What is unknown is answered in OpenAI's language.
            await self._openai(scope, receive, send)


def refusal(path: str, error: HiveError) -> Refusal:
    """Return the answer for `error` in the language of a path of either API."""
    return refusal_of(error) if Ollama.route(path) else openai_refusal(body_of(error))


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    told = refusal(scope["path"], scope["hive.refusal"])
    await Exchange(scope, receive, send).send(told.status, told.body, told.content_type, told.headers)
