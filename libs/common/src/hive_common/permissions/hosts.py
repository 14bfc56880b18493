"""Hosts as permissions name them: `example.org`, `*.example.org:8443`, `http://printer.lan`, `[2001:db8::1]`."""

import ipaddress
import re
from typing import Final, NamedTuple

PLAIN: Final = "http://"
HTTPS_PORT: Final = 443
HTTP_PORT: Final = 80
HOST_CHARACTERS_MAX: Final = 253

_LABEL: Final = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?\Z")
_NUMBER: Final = re.compile(r"([0-9]+|0x[0-9a-f]*)\Z")


class Host(NamedTuple):
    """Where a request goes, or where requests may go.

    Attributes:
        name: in lower case; an IPv6 address without brackets.
        port: 1 to 65535.
        encrypted: over TLS.
        below: not `name` itself but every name below it.
    """

    name: str
    port: int
    encrypted: bool
    below: bool = False

    def __str__(self) -> str:
        scheme = "" if self.encrypted else PLAIN
        name = f"[{self.name}]" if ":" in self.name else self.name
        usual = HTTPS_PORT if self.encrypted else HTTP_PORT
        return f"{scheme}{'*.' if self.below else ''}{name}{'' if self.port == usual else f':{self.port}'}"

    def covers(self, other: "Host") -> bool:
        """Say whether everything that `other` names is named here too."""
        if (self.port, self.encrypted) != (other.port, other.encrypted):
            return False
        if not self.below:
            return not other.below and self.name == other.name
        if other.below and self.name == other.name:
            return True
        # `*.0.1` has nothing to do with 127.0.0.1.
        return other.name.endswith(f".{self.name}") and not _is_address(other.name)


def parse_host(text: str) -> Host | None:
    """Return the host that a permission names, or None where that is no host.

    Names are in ASCII, as DNS has them (`xn--…`); what other programs would read as an IPv4 address
    in disguise (`0x7f.1`, `2130706433`) is none.
    """
    encrypted = not text.startswith(PLAIN)
    rest = text if encrypted else text.removeprefix(PLAIN)
    below = rest.startswith("*.")
    rest = rest.removeprefix("*.").lower()
    name, port = _split(rest)
    number = _port(port, HTTPS_PORT if encrypted else HTTP_PORT)
    if number is None or not _is_host(name) or (below and _is_address(name)):
        return None
    return Host(str(ipaddress.ip_address(name)) if _is_address(name) else name, number, encrypted, below)


def _split(text: str) -> tuple[str, str]:
    if text.startswith("["):
        name, closed, port = text[1:].partition("]")
        valid = closed and ":" in name and (not port or port.startswith(":"))
        return (name, port) if valid else ("", "")
    name, colon, port = text.partition(":")
    return name, colon + port


def _port(text: str, usual: int) -> int | None:
    if not text:
        return usual
    digits = text[1:]
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 5):
        return None
    number = int(digits)
    return number if 1 <= number <= 65_535 else None


def _is_host(name: str) -> bool:
    if _is_address(name):
        return True
    labels = name.split(".")
    disguised = _NUMBER.match(labels[-1]) is not None
    return len(name) <= HOST_CHARACTERS_MAX and not disguised and all(_LABEL.match(label) for label in labels)


def _is_address(name: str) -> bool:
    try:
        # A zone (`fe80::1%eth0`) means something on one device only.
        return "%" not in name and ipaddress.ip_address(name) is not None
    except ValueError:
        return False
