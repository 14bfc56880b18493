"""Calls to the gateway: the connections that all parts of this process share, and who this is."""

from collections.abc import Callable
from typing import Any

import aiohttp
from hive_common.kernel.errors import Unavailable
from hive_common.ops.tls import client_context


class Gateway:
    """The gateway of the installation.

    Args:
        base_url: asked at each call, because the registry may name it only later; empty until then.
        header: says who calls, to this address only: redirects are not followed.
        ca_file: certificate of the CA that must have signed the gateway's; empty on plain loopback.

    Raises:
        InvalidArgument: the certificate cannot be used.
    """

    def __init__(
        self, base_url: Callable[[], str], header: Callable[[], dict[str, str]], ca_file: str = ""
    ) -> None:
        self._base_url = base_url
        self._header = header
        self._context = client_context(ca_file) if ca_file else None
        self._session: aiohttp.ClientSession | None = None

    def call(
        self,
        method: str,
        path: str,
        timeout: aiohttp.ClientTimeout,
        data: bytes | None = None,
        content_type: str = "application/octet-stream",
    ) -> Any:
        """Make a call; it is an asynchronous context manager, whose value is the response.

        Raises:
            Unavailable: the address is not known yet.
        """
        base = self._base_url()
        if not base:
            raise Unavailable("the address of the gateway is not known yet")
        headers = self._header() if data is None else self._header() | {"Content-Type": content_type}
        return self._open().request(
            method, f"{base.rstrip('/')}{path}", data=data, headers=headers, timeout=timeout, allow_redirects=False
        )

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _open(self) -> aiohttp.ClientSession:
        # It needs a running loop.
        if self._session is None:
            connector = aiohttp.TCPConnector(ssl=self._context or True)
            self._session = aiohttp.ClientSession(connector=connector, trust_env=False)
        return self._session
