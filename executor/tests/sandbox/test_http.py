"""What `http` sends, where to, and what it refuses: on real sockets, with names that lead where a test says."""

import asyncio
import base64
import gzip
import json
import socket
import ssl
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import urlsplit

import pytest
from hive_common.contracts.permissions import HttpPermission
from hive_common.kernel.errors import (
    DeadlineExceeded,
    InvalidArgument,
    PayloadTooLarge,
    PermissionDenied,
    Unavailable,
)
from hive_executor.host.addresses import SystemResolver, problem_of
from hive_executor.host.http import ANSWER_BODY_BYTES_MAX, HttpAccess, HttpClient, _socket_of
from hive_executor.sandbox.model import HOST_ANSWER_BYTES_MAX

from .web import Names, ok, redirect, serving

LEFT_MS = 30_000


def access(
    names: Any, *hosts: str, methods: tuple[str, ...] = ("GET",), private: bool = True, attempt: int = 1
) -> HttpAccess:
    """`private` as most tests need it, whose server is on loopback."""
    return HttpAccess(HttpClient(names), HttpPermission(hosts, methods, private), task="t", attempt=attempt)


async def ask(access: HttpAccess, url: str, method: str = "GET", **more: Any) -> dict[str, Any]:
    request = json.dumps({"url": url, "method": method, **more}).encode()
    answer: dict[str, Any] = json.loads(await access.call("request", request, LEFT_MS))
    return answer


LOCAL = [["127.0.0.1"]]


async def test_a_request_goes_to_a_listed_host_and_its_answer_comes_whole() -> None:
    names = Names(a_test=LOCAL)
    async with serving(ok("zwölf", "X-Kind: one", "X-Kind: two", "Keep-Alive: 5", "X-Raw: \xff")) as web:
        answer = await ask(access(names, f"http://a.test:{web.port}"), f"http://a.test:{web.port}/x?y=1#z")
    assert answer["status"] == 200
    assert answer["body"] == "zwölf"
    assert [value for name, value in answer["headers"] if name == "X-Kind"] == ["one", "two"]
    assert not {"keep-alive", "connection"} & {name.lower() for name, _ in answer["headers"]}
    assert web.requests[0].startswith("GET /x?y=1 HTTP/1.1\r\n")
    assert web.headers["host"] == f"a.test:{web.port}"
    assert "idempotency-key" not in web.headers
    assert names.asked == ["a.test"]


async def test_bytes_go_and_come_in_base64() -> None:
    async with serving(ok(b"\xff\x00")) as web:
        client = access(Names(a_test=LOCAL), f"http://a.test:{web.port}", methods=("POST",))
        answer = await ask(
            client, f"http://a.test:{web.port}/", "POST", body_base64=base64.b64encode(b"ab").decode()
        )
    assert base64.b64decode(answer["body_base64"]) == b"\xff\x00"
    assert web.requests[0].endswith("\r\n\r\nab")


async def test_what_changes_something_carries_a_key_of_its_own_for_each_request_of_an_attempt() -> None:
    async with serving(ok()) as web:
        url, keys = f"http://a.test:{web.port}", []
        for attempt in (1, 1, 2):
            client = access(Names(a_test=LOCAL), url, methods=("POST", "GET"), attempt=attempt)
            for _ in range(2):
                await ask(client, url, "POST", body="x")
                keys.append(web.headers["idempotency-key"])
            await ask(client, url)
            assert "idempotency-key" not in web.headers
    # The same attempt asks with the same keys, another one with others.
    assert keys[:2] == keys[2:4]
    assert len(set(keys)) == 4


async def test_in_a_replicated_task_nothing_is_sent_that_changes_something() -> None:
    async with serving(ok("read")) as web:
        url = f"http://a.test:{web.port}"
        permission = HttpPermission((url,), ("GET", "POST"), True)
        client = HttpAccess(HttpClient(Names(a_test=LOCAL)), permission, task="t", attempt=1, replicated=True)
        assert (await ask(client, url))["body"] == "read"
        says = "the permission `http` covers only GET and HEAD in a replicated task, not 'POST'"
        with pytest.raises(PermissionDenied) as refused:
            await ask(client, url, "POST", body="x")
        assert (refused.value.message, refused.value.fields["permission"]) == (says, "http")
        assert len(web.requests) == 1


@pytest.mark.parametrize(
    ("url", "method"),
    [
        ("https://b.test/", "GET"),
        ("http://a.test/", "GET"),
        ("https://a.test:8443/", "GET"),
        ("https://sub.a.test/", "GET"),
        ("https://below.test/", "GET"),
        ("https://xbelow.test/", "GET"),
        ("https://a.test/", "POST"),
        ("https://127.0.0.1/", "GET"),
        ("https://[::1]/", "GET"),
        ("https://[::ffff:127.0.0.1]/", "GET"),
    ],
)
async def test_other_hosts_ports_schemes_and_methods_end_the_attempt(url: str, method: str) -> None:
    names = Names()
    with pytest.raises(PermissionDenied, match="`http` is granted for"):
        await ask(access(names, "a.test", "*.below.test"), url, method)
    assert names.asked == []


@pytest.mark.parametrize(
    "url",
    [
        "https://0x7f.1/",
        "https://2130706433/",
        "https://127.1/",
        "https://0177.0.0.1/",
        "https://a.test./",
        "https://user:secret@a.test/",
        "https://user@a.test/",
        "ftp://a.test/",
        "file:///etc/passwd",
        "a.test/",
        "https://",
        "https:///a.test",
        "https://a.test\\@b.test/",
        "https://a.test/ HTTP/1.1\r\nX: y",
        "https://a.test/\nx",
        "https://a.test/\x00",
        "https://a.test:99999/",
        "https://ä.test/",
        "https://[fe80::1%25eth0]/",
        "https://a.test/" + "x" * 9000,
    ],
)
async def test_what_is_no_url_of_a_host_is_refused(url: str) -> None:
    names = Names()
    with pytest.raises((InvalidArgument, PermissionDenied)):
        await ask(access(names, "a.test", "*.test"), url)
    assert names.asked == []


PIECES = (
    *(
        "a.test",
        "b.test",
        "below.test",
        "sub.below.test",
        "xbelow.test",
        "*.below.test",
        "127.0.0.1",
        "[::1]",
        "0x7f.1",
    ),
    *(
        "user@",
        "a.test@",
        "@a.test",
        "a.test:443@",
        ":443",
        ":8443",
        ":",
        "@",
        "\\",
        "/",
        "//",
        "?",
        "#",
        ".",
        "..",
    ),
    *(
        "%2e",
        "%40",
        "%2f",
        "%00",
        "%0d%0a",
        "\t",
        "\n",
        " ",
        "\u3002",
        "\uff0e",
        "xn--",
        "A.TEST",
        "a.test.",
        ";",
        "&",
    ),
)


async def test_of_10000_urls_none_is_looked_up_that_was_not_granted() -> None:
    random, names = Random(1), Names()
    client = access(names, "a.test", "*.below.test")
    reached = 0
    for _ in range(10_000):
        url = random.choice(("https://", "https://", "HTTPS://", "http://", "https:", "//", ""))
        url += "".join(random.choices(PIECES, k=random.randint(1, 5)))
        before = len(names.asked)
        with pytest.raises((InvalidArgument, PermissionDenied, Unavailable)):
            await ask(client, url)
        for name in names.asked[before:]:
            reached += 1
            assert name == "a.test" or name.endswith(".below.test"), url
            # And others read it the same way.
            read = urlsplit(url)
            assert (read.scheme, read.hostname, read.port or 443) == ("https", name, 443), url
    assert reached > 100


ADDRESSES = {
    "127.0.0.1": "loopback",
    "127.9.9.9": "loopback",
    "::1": "loopback",
    "10.1.2.3": "private",
    "172.16.0.1": "private",
    "192.168.1.1": "private",
    "fd12::1": "private",
    "169.254.0.9": "link-local",
    "fe80::1": "link-local",
    "fe80::1%eth0": "link-local",
    "2606:4700::1111%eth0": "link-local",
    "169.254.169.254": "metadata service",
    "fd00:ec2::254": "metadata service",
    "168.63.129.16": "metadata service",
    "100.64.0.1": "shared (RFC 6598)",
    "100.100.100.200": "shared (RFC 6598)",
    "224.0.0.1": "multicast",
    "ff02::1": "multicast",
    "255.255.255.255": "multicast",
    "0.0.0.0": "unspecified",
    "::": "unspecified",
    "0.1.2.3": "private",
    "192.0.0.192": "special (RFC 6890)",
    "2001:10::1": "special (RFC 6890)",
    "2001:db8::1": "private",
    "4000::1": "reserved",
    "198.18.0.1": "private",
    "240.0.0.1": "private",
    "::ffff:127.0.0.1": "IPv4-mapped (RFC 4291)",
    "::ffff:8.8.8.8": "IPv4-mapped (RFC 4291)",
    "::7f00:1": "IPv4-compatible (RFC 4291)",
    "2002:7f00:1::": "6to4 (RFC 3056)",
    "2001:0:7f00:1::": "Teredo (RFC 4380)",
    "64:ff9b::7f00:1": "NAT64 (RFC 6052)",
    "64:ff9b:1::7f00:1": "NAT64 (RFC 8215)",
    "192.88.99.1": "6to4 relay (RFC 7526)",
    "fec0::1": "site-local (RFC 3879)",
    "nonsense": "no address",
    "8.8.8.8": "",
    "2606:4700::1111": "",
}


@pytest.mark.parametrize(("address", "kind"), ADDRESSES.items())
async def test_a_name_may_not_lead_to_an_address_that_means_something_here_only(address: str, kind: str) -> None:
    assert problem_of(address, private=False) == kind
    if kind:
        # Beside one that is good, too: nobody picks the one that suits.
        client = access(Names(a_test=[["8.8.8.8", address]]), "a.test", private=False)
        with pytest.raises(PermissionDenied, match="which leads to") as denied:
            await ask(client, "https://a.test/")
        assert kind in denied.value.message


def test_with_private_only_what_no_connection_can_go_to_stays_refused() -> None:
    allowed = {address for address in ADDRESSES if not problem_of(address, private=True)}
    kinds = {ADDRESSES[address] for address in ADDRESSES.keys() - allowed}
    assert kinds == {"multicast", "unspecified", "no address"}


async def test_a_name_that_leads_elsewhere_the_second_time_is_only_looked_up_once() -> None:
    async with serving(ok()) as web:
        url = f"http://a.test:{web.port}"
        names = Names(a_test=[["127.0.0.1"], ["127.0.0.2"]])
        assert (await ask(access(names, url), url))["body"] == "fine"
        assert names.asked == ["a.test"]
        # And the second request is checked as the first one.
        names = Names(a_test=[["203.0.113.9", "127.0.0.1"]])
        with pytest.raises(PermissionDenied, match="private"):
            await ask(access(names, url, private=False), url)
    assert len(web.requests) == 1


def test_a_socket_goes_to_no_address_that_was_not_looked_up() -> None:
    kind = (socket.AF_INET, socket.SOCK_STREAM, 0, "")
    _socket_of((*kind, ("127.0.0.1", 80)), ["127.0.0.1"]).close()
    with pytest.raises(OSError, match="not looked up"):
        _socket_of((*kind, ("127.0.0.2", 80)), ["127.0.0.1"])


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1:1/",
        "https://b.test/",
        "http://a.test:1/",
        "//b.test/",
        "https://[::1]/",
        "http://localhost/",
    ],
)
async def test_a_redirect_out_of_the_list_ends_the_attempt(location: str) -> None:
    async with serving(redirect(location)) as web:
        url = f"http://a.test:{web.port}"
        with pytest.raises(PermissionDenied, match="`http` is granted for"):
            await ask(access(Names(a_test=LOCAL), url), url)
        shown = await ask(access(Names(a_test=LOCAL), url), url, follow=False)
    assert shown["status"] == 302
    assert ["Location", location] in shown["headers"]


async def test_a_redirect_to_a_listed_name_that_leads_to_loopback_ends_the_attempt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serving(redirect("http://b.test:1/")) as web:
        url = f"http://a.test:{web.port}"
        names = Names(a_test=LOCAL, b_test=[["::1"]])
        # The first hop has to reach the server of this test, so it alone may be on loopback.
        monkeypatch.setattr(
            "hive_executor.host.http.problem_of",
            lambda address, private: "" if address == "127.0.0.1" else problem_of(address, private=private),
        )
        with pytest.raises(PermissionDenied, match=r"b\.test, which leads to ::1 \(loopback"):
            await ask(access(names, url, "http://b.test:1", private=False), url)
    assert names.asked == ["a.test", "b.test"]


@pytest.mark.parametrize(
    ("status", "method", "then"),
    [
        (301, "POST", "GET"),
        (302, "POST", "GET"),
        (303, "POST", "GET"),
        (303, "PUT", "GET"),
        (303, "HEAD", "HEAD"),
        (302, "PUT", "PUT"),
        (307, "POST", "POST"),
        (308, "POST", "POST"),
    ],
)
async def test_method_and_body_of_a_redirect_are_as_rfc_9110_says(status: int, method: str, then: str) -> None:
    def answer(path: str) -> bytes:
        return redirect("/next", status) if path == "/" else ok("" if then == "HEAD" else "fine")

    async with serving(answer) as web:
        url = f"http://a.test:{web.port}"
        client = access(Names(a_test=LOCAL), url, methods=("GET", "HEAD", "POST", "PUT"))
        body = {} if method == "HEAD" else {"body": "data", "headers": {"Content-Type": "text/plain"}}
        assert (await ask(client, url, method, **body))["url"] == f"{url}/next"
        first, second = web.requests
    assert second.startswith(f"{then} /next ")
    assert ("data" in second) == ("content-type" in second.lower()) == (then == method != "HEAD")
    if "Idempotency-Key" in second:
        assert web.headers["idempotency-key"] in first


async def test_a_redirect_needs_its_method_granted_too() -> None:
    async with serving(redirect("/next", 303)) as web:
        url = f"http://a.test:{web.port}"
        with pytest.raises(PermissionDenied, match="'GET'"):
            await ask(access(Names(a_test=LOCAL), url, methods=("POST",)), url, "POST")


async def test_only_headers_that_anybody_may_see_go_to_another_host() -> None:
    async with serving(ok()) as second, serving(redirect(f"http://b.test:{second.port}/")) as first:
        urls = f"http://a.test:{first.port}", f"http://b.test:{second.port}"
        secrets = {"Authorization": "Bearer x", "Cookie": "a=b", "X-Api-Key": "k"}
        client = access(Names(a_test=LOCAL, b_test=LOCAL), *urls)
        await ask(client, urls[0], headers={**secrets, "Accept": "text/html", "User-Agent": "mine"})
    assert {name.lower() for name in secrets} <= first.headers.keys()
    assert not {name.lower() for name in secrets} & second.headers.keys()
    assert (second.headers["accept"], second.headers["user-agent"]) == ("text/html", "mine")


@pytest.mark.parametrize("location", ["https://x@[", "https://[::1", "javascript:alert(1)", "file:///etc/passwd"])
async def test_a_redirect_to_what_is_no_url_is_an_error(location: str) -> None:
    async with serving(redirect(location)) as web:
        url = f"http://a.test:{web.port}"
        with pytest.raises(Unavailable, match="redirects to what is no URL"):
            await ask(access(Names(a_test=LOCAL), url), url)


async def test_redirects_end() -> None:
    async with serving(redirect("/")) as web:
        url = f"http://a.test:{web.port}"
        with pytest.raises(Unavailable, match="more than 5 redirects"):
            await ask(access(Names(a_test=LOCAL), url), url)
    assert len(web.requests) == 6


@pytest.mark.parametrize(
    "name",
    [
        *("Host", "content-length", "Transfer-Encoding", "Connection", "TE", "Upgrade", "Proxy-Authorization"),
        *("Proxy-X", "Trailer", "Keep-Alive", "Expect", "Accept-Encoding", "Idempotency-Key"),
        *("", "X Y", "X:", "X\r\nY", "X\n", "Ü", "X\x00"),
    ],
)
async def test_headers_that_are_not_the_guests_are_refused_by_name(name: str) -> None:
    names = Names(a_test=LOCAL)
    with pytest.raises(InvalidArgument, match="headers: "):
        await ask(access(names, "a.test"), "https://a.test/", headers={name: "x"})
    assert names.asked == []


@pytest.mark.parametrize("value", ["a\r\nX-Evil: 1", "a\n", "a\r", "\x00", "ü", "\x7f", "a\n b"])
async def test_values_of_headers_with_line_breaks_are_refused(value: str) -> None:
    with pytest.raises(InvalidArgument, match="'X-A'"):
        await ask(access(Names(), "a.test"), "https://a.test/", headers={"X-A": value})


async def test_what_is_sent_is_bounded() -> None:
    client = access(Names(), "a.test", methods=("GET", "POST"))
    for headers in ({f"X-{n}": "" for n in range(65)}, {"X": "x" * 40_000}):
        with pytest.raises(PayloadTooLarge):
            await ask(client, "https://a.test/", headers=headers)
    with pytest.raises(InvalidArgument, match="no body"):
        await ask(client, "https://a.test/", body="x")
    for more in (
        {"body": "a", "body_base64": "YQ=="},
        {"body_base64": "?"},
        {"timeout_ms": 0},
        {"proxy": "http://x"},
    ):
        with pytest.raises(InvalidArgument):
            await ask(client, "https://a.test/", "POST", **more)


async def test_an_answer_is_bounded_in_body_headers_and_what_it_unpacks_to() -> None:
    bomb = gzip.compress(bytes(100 * ANSWER_BODY_BYTES_MAX), 9)
    whole = bytes(ANSWER_BODY_BYTES_MAX)
    answers = {
        "/large": (ok(whole + b"x"), PayloadTooLarge),
        "/bomb": (ok(bomb, "Content-Encoding: gzip"), PayloadTooLarge),
        "/line": (ok("", "X: " + "x" * 10_000), Unavailable),
        "/headers": (ok("", *(f"X-{n}: y" for n in range(200))), Unavailable),
        "/brotli": (ok("x", "Content-Encoding: br"), Unavailable),
        "/broken": (ok("x", "Content-Encoding: gzip"), Unavailable),
        "/cut": (ok(gzip.compress(b"abc")[:-4], "Content-Encoding: gzip"), Unavailable),
        "/short": (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc", Unavailable),
        "/none": (b"", Unavailable),
        "/nonsense": (b"SSH-2.0-x\r\n\r\n", Unavailable),
    }
    async with serving(lambda path: answers[path][0] if path in answers else ok(whole)) as web:
        url = f"http://a.test:{web.port}"
        client = access(Names(a_test=LOCAL), url)
        for path, (_, error) in answers.items():
            with pytest.raises(error):
                await ask(client, url + path)
        # As much as is allowed fits, though each of these zeros takes six characters of JSON.
        raw = await client.call("request", json.dumps({"url": url}).encode(), LEFT_MS)
    assert len(raw) <= HOST_ANSWER_BYTES_MAX
    assert base64.b64decode(json.loads(raw)["body_base64"]) == whole


async def test_gzip_is_unpacked_with_all_its_members() -> None:
    packed = gzip.compress(b"one ") + gzip.compress(b"two")
    async with serving(ok(packed, "Content-Encoding: gzip")) as web:
        url = f"http://a.test:{web.port}"
        answer = await ask(access(Names(a_test=LOCAL), url), url)
    assert answer["body"] == "one two"
    assert "content-encoding" not in {name.lower() for name, _ in answer["headers"]}
    assert web.headers["accept-encoding"] == "gzip"


async def test_a_server_that_says_nothing_costs_the_time_that_was_given() -> None:
    async with serving(b"", hangs=True) as web:
        url = f"http://a.test:{web.port}"
        with pytest.raises(DeadlineExceeded):
            await ask(access(Names(a_test=LOCAL), url), url, timeout_ms=50)
        request = json.dumps({"url": url}).encode()
        with pytest.raises(DeadlineExceeded):
            await access(Names(a_test=LOCAL), url).call("request", request, 50)


async def test_proxies_of_the_environment_and_netrc_are_not_for_guests(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine a.test login me password secret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    async with serving(ok("direct")) as web:
        url = f"http://a.test:{web.port}"
        assert (await ask(access(Names(a_test=LOCAL), url), url))["body"] == "direct"
    assert "authorization" not in web.headers


async def test_cookies_are_not_kept_from_one_request_to_the_next() -> None:
    async with serving(ok("", "Set-Cookie: a=b")) as web:
        url = f"http://a.test:{web.port}"
        client = access(Names(a_test=LOCAL), url)
        await ask(client, url)
        await ask(client, url)
    assert "cookie" not in web.headers


def certificate(folder: Path, name: str) -> tuple[ssl.SSLContext, Path]:
    """A server's certificate for one name, signed by itself."""
    from datetime import UTC, datetime, timedelta

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = folder / f"{name}.pem"
    pem = built.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.write_bytes(private + pem)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(file)
    return context, file


async def test_a_server_proves_its_name_and_not_its_address(tmp_path: Path) -> None:
    context, file = certificate(tmp_path, "a.test")
    trusting = ssl.create_default_context(cafile=str(file))
    names = Names(a_test=LOCAL, b_test=LOCAL)
    async with serving(ok("secret"), context=context) as web:
        hosts = (f"a.test:{web.port}", f"b.test:{web.port}")
        trusted = HttpAccess(HttpClient(names, trusting), HttpPermission(hosts, private=True))
        assert (await ask(trusted, f"https://a.test:{web.port}/"))["body"] == "secret"
        with pytest.raises(Unavailable, match="cannot prove who it is"):
            await ask(trusted, f"https://b.test:{web.port}/")
        # By default those that the system trusts, of which this one is none.
        with pytest.raises(Unavailable, match="cannot prove who it is"):
            await ask(access(names, *hosts), f"https://a.test:{web.port}/")
    assert len(web.requests) == 1


async def test_the_resolver_of_the_system_gives_addresses_in_numbers() -> None:
    resolver = SystemResolver()
    try:
        assert await resolver.addresses("127.0.0.1") == ["127.0.0.1"]
        assert set(await resolver.addresses("localhost")) <= {"127.0.0.1", "::1"}
        with pytest.raises(Unavailable, match="cannot be looked up"):
            await resolver.addresses("no-such-name.invalid")
        with pytest.raises(Unavailable, match="cannot be looked up"):
            await resolver.addresses("x" * 300)
    finally:
        resolver.close()


async def test_an_attempt_that_ends_takes_its_request_with_it() -> None:
    async with serving(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", hangs=True) as web:
        url = f"http://a.test:{web.port}"
        asking = asyncio.create_task(ask(access(Names(a_test=LOCAL), url), url))
        while not web.requests:
            await asyncio.sleep(0.01)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
