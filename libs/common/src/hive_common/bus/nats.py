"""A connection to NATS that reconnects for ever, and responders that cannot be made to publish elsewhere.

nats-py is used directly: the hot path needs its callbacks (measured several times faster than wrappers).
"""

import asyncio
import base64
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final, TypeVar

import msgspec
import nats.errors
import nkeys  # type: ignore[import-untyped]
from nats.aio.client import Client
from nats.aio.msg import Msg

from hive_common.bus.allowance import REQUESTS as EXECUTOR_REQUESTS
from hive_common.bus.intake import Intake
from hive_common.bus.jwt import Credentials, read_credentials
from hive_common.bus.policy import service_inbox
from hive_common.contracts.messages import Message, inbox_prefix
from hive_common.kernel.errors import DeadlineExceeded, InvalidArgument, RateLimited, Unavailable, body_of
from hive_common.ops.config import NatsConfig
from hive_common.ops.telemetry import DURATION, IN_FLIGHT, REQUESTS
from hive_common.ops.tls import client_context

log = logging.getLogger(__name__)
Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)
REPEATED_S: Final = 60.0
"""After so long, a trouble that goes on is told again."""


class _Lasting(Client):
    """A client that no word of the server ends, and whose `flush` means what was said before it.

    nats-py closes for good when the server says that credentials have run out or were revoked. Renewed ones may
    be in the file by the next attempt.

    It writes its PING ahead of commands that still wait to be written. The PONG would come before the server has a
    subscription, or before it knows the end of one, and what it brings until then is lost.

    It stops reading at the PONG of a `flush` that was cancelled.

    It connects in `asyncio.wait_for`, which until Python 3.12 may swallow a cancellation, and takes the error of an
    attempt that failed meanwhile for one more server that is away.
    """

    async def _connect_to_server(self, s: Any) -> None:
        try:
            await super()._connect_to_server(s)
        finally:
            if _is_cancelled():
                if self._transport is not None:
                    self._transport.close()  # type: ignore[no-untyped-call]
                raise asyncio.CancelledError

    async def _send_ping(self, future: asyncio.Future[bool] | None = None) -> None:
        if self._pending and self.is_connected:
            assert self._transport is not None
            self._transport.writelines(self._pending)
            self._pending, self._pending_data_size = [], 0
        await super()._send_ping(future)

    async def _process_pong(self) -> None:
        if self._pongs and self._pongs[0].done():
            self._pongs[0] = asyncio.get_running_loop().create_future()
        await super()._process_pong()

    async def _process_err(self, err_msg: str) -> None:
        if "permissions violation" in err_msg.lower():
            await super()._process_err(err_msg)
            return
        error = nats.errors.Error(f"the server says {err_msg}")
        await self._error_cb(error)
        await self._process_op_err(error)


async def connect(
    config: NatsConfig,
    name: str,
    *,
    inbox: str | None = None,
    on_disconnect: Callable[[], Awaitable[None]] | None = None,
    on_reconnect: Callable[[], Awaitable[None]] | None = None,
) -> Client:
    """Connect, and go on connecting for ever.

    Args:
        config: address and credentials.
        name: of the service, whose inbox it gets; shown in the server's monitoring.
        inbox: prefix of reply subjects, where it is another one: `inbox_prefix` of an executor.
        on_disconnect: awaited when the connection is lost.
        on_reconnect: awaited when it is back, subscriptions included.

    A partition that drops silently is noticed after about five seconds.

    Raises:
        InvalidArgument: the credentials or the CA cannot be used.
        Unavailable: the server refuses for good.
    """
    read_credentials(config.credentials_file)
    told: tuple[str, float] = "", 0.0

    async def errored(error: Exception) -> None:
        nonlocal told
        text = str(error) or type(error).__name__
        # A server that refuses does so four times a second.
        is_news = text != told[0] or time.monotonic() - told[1] > REPEATED_S
        if is_news and not isinstance(error, (ConnectionRefusedError, nats.errors.StaleConnectionError)):
            told = text, time.monotonic()
            log.warning("nats: %s", text)

    options: dict[str, Any] = {}
    if config.ca_file:
        # Without the handshake first the server's greeting is plain text, and could say that there is no TLS.
        options |= {"tls": client_context(config.ca_file), "tls_handshake_first": True}
    if on_disconnect is not None:
        options["disconnected_cb"] = on_disconnect
    if on_reconnect is not None:
        options["reconnected_cb"] = on_reconnect
    client = _Lasting()
    try:
        await client.connect(
            config.url,
            name=name,
            user_jwt_cb=lambda: bytearray(_credentials(config).jwt.encode()),
            signature_cb=lambda nonce: _signature(config, nonce),
            inbox_prefix=(inbox or service_inbox(name)).encode(),
            max_reconnect_attempts=-1,
            reconnect_time_wait=0.25,  # type: ignore[arg-type]
            ping_interval=2,
            max_outstanding_pings=2,
            error_cb=errored,
            allow_reconnect=True,
            **options,
        )
    except (OSError, nats.errors.Error) as error:
        raise Unavailable(f"NATS at {config.url} cannot be reached: {error}", url=config.url) from error
    if _is_cancelled():
        await client.close()
        raise asyncio.CancelledError
    return client


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _credentials(config: NatsConfig) -> Credentials:
    # nats-py reads such files itself, and turns for ever in one that is cut short.
    try:
        return read_credentials(config.credentials_file)
    except InvalidArgument as error:
        raise nats.errors.Error(error.message) from error


def _signature(config: NatsConfig, nonce: str) -> bytes:
    pair = nkeys.from_seed(bytearray(_credentials(config).seed.encode()))
    return base64.b64encode(pair.sign(nonce.encode()))


async def settled(client: Client) -> None:
    """Return once the server has all that was said to it before, subscriptions included.

    Raises:
        Unavailable: the connection is gone, or the server says nothing.
    """
    try:
        await client.flush()
    except (nats.errors.Error, OSError, TimeoutError) as error:
        raise Unavailable(f"NATS: {error or type(error).__name__}") from error


async def request(client: Client, subject: str, body: Message, reply_type: type[R], timeout_s: float) -> R:
    """Ask and return the decoded answer.

    Raises:
        Unavailable: nobody listens on the subject, or the connection is gone.
        DeadlineExceeded: no answer within `timeout_s`.
        InvalidArgument: the answer does not fit `reply_type`.
    """
    try:
        async with asyncio.timeout(timeout_s):
            # Its own timeout is `asyncio.wait_for`, which may swallow a cancellation.
            answer = await client.request(subject, msgspec.json.encode(body), timeout=None)  # type: ignore[arg-type]
    except TimeoutError as error:
        raise DeadlineExceeded(f"no answer on {subject} within {timeout_s:g} s") from error
    except (nats.errors.Error, OSError) as error:
        raise Unavailable(f"{subject}: {error or type(error).__name__}") from error
    try:
        return msgspec.json.decode(answer.data, type=reply_type)
    except msgspec.DecodeError as error:
        raise InvalidArgument(f"the answer on {subject} does not fit: {error}") from error


async def respond(
    client: Client,
    subject: str,
    request_type: type[Q],
    handler: Callable[[str, Q], Awaitable[Message]],
    on_error: Callable[[BaseException], Message],
    known: Callable[[], Iterable[str]] = lambda: (),
) -> Intake:
    """Answer the requests of executors on `hive.exec.*.<verb>`.

    A request whose reply subject does not lie under the caller's own inbox is dropped and counted: a caller
    could otherwise make this service publish where the caller may not. So is what an executor asks beyond its
    allowance; one that floods is not heard at all for a while (`Intake`).

    Args:
        client: the service's connection.
        subject: such as `hive.exec.*.pull`; its third token is the executor's id.
        request_type: what bodies decode to.
        handler: takes the executor's id and the body. It may take long; requests are handled concurrently.
        on_error: turns an error into the reply that carries it.
        known: executors to hear while one of them floods, besides those that have asked before.
    """
    decoder = msgspec.json.Decoder(request_type)
    method = subject.rsplit(".", 1)[-1]
    running: set[asyncio.Task[None]] = set()

    async def answer(message: Msg, executor: str) -> None:
        start = time.perf_counter()
        code = "ok"
        try:
            try:
                body = decoder.decode(message.data)
            except (msgspec.DecodeError, RecursionError) as error:
                raise InvalidArgument(f"{message.subject}: {error}") from error
            with IN_FLIGHT.track_inprogress():
                reply = await handler(executor, body)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            code = body_of(error).code
            if code == "internal":
                log.exception("%s failed", message.subject)
            reply = on_error(error)
        finally:
            intake.done(executor)
        REQUESTS.labels(method, code).inc()
        DURATION.labels(method).observe(time.perf_counter() - start)
        await send(message, reply)

    async def send(message: Msg, reply: Message) -> None:
        if not client.is_closed:
            await message.respond(msgspec.json.encode(reply))

    def is_foreign(executor: str, message: Msg) -> bool:
        if message.reply.startswith(inbox_prefix(executor) + "."):
            return False
        REQUESTS.labels(method, "foreign_reply").inc()
        log.warning("%s: reply subject outside of the caller's inbox, dropped", message.subject)
        return True

    async def take(executor: str, message: Msg) -> None:
        if is_foreign(executor, message):
            intake.done(executor)
            return
        task = asyncio.create_task(answer(message, executor))
        running.add(task)
        task.add_done_callback(running.discard)

    async def refuse(executor: str, message: Msg) -> None:
        if not is_foreign(executor, message):
            error = RateLimited("more requests than an executor may make; most are not answered", retry_after_s=1)
            await send(message, on_error(error))

    intake = Intake(client, subject, take, refuse, EXECUTOR_REQUESTS, known)
    return await intake.open()
