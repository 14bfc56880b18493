"""Keys for signing agents, in the home: `keys/agents/NAME.key` (0600) and `NAME.pub`, PEM."""

from pathlib import Path
from typing import TYPE_CHECKING

from hive_common.kernel.errors import Conflict, InvalidArgument, NotFound

from hive_cli.home import Home

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

AUTHOR = "author"
"""The installation's own key: made and trusted by its first `up`, and what `push` signs with."""

# The cryptography behind this is loaded where it is used: most commands need none of it.


def ensure_author(home: Home) -> str:
    """Make the installation's own key if it has none, and return its public half, in hex."""
    if not private_file(home, AUTHOR).exists():
        return _write(home, AUTHOR)
    return public_key(home, AUTHOR)


def new_key(home: Home, name: str) -> str:
    """Make a key and return its public half, in hex.

    Raises:
        InvalidArgument: not a name.
        Conflict: there is one of that name.
    """
    _check_name(name)
    if private_file(home, name).exists():
        raise Conflict(f"{private_file(home, name)}: exists already; expected a name that is not taken")
    return _write(home, name)


def names(home: Home) -> list[str]:
    """Return the names of the keys in this home."""
    return sorted(file.stem for file in home.agent_keys_dir.glob("*.key"))


def private_file(home: Home, name: str) -> Path:
    """Return the file of a private key."""
    return home.agent_keys_dir / f"{name}.key"


def public_key(home: Home, name: str) -> str:
    """Return the public half of a key in this home, in hex."""
    from hive_common.artifacts.keys import public_hex, read_private_key

    return public_hex(read_private_key(private_file(home, name)))


def signing_key(home: Home, named: str | None) -> "Ed25519PrivateKey":
    """Return the private key to sign with.

    Args:
        home: whose keys they are.
        named: a name in this home, or a file; None for the installation's own.

    Raises:
        NotFound: there is none.
        InvalidArgument: it cannot be used.
    """
    from hive_common.artifacts.keys import read_private_key

    if named is not None and ("/" in named or named.endswith(".key")):
        return read_private_key(Path(named))
    file = private_file(home, named or AUTHOR)
    if named is not None:
        _check_name(named)
    if not file.exists():
        have = ", ".join(names(home)) or "none"
        remedy = f"make it with: hive agent key new {named}" if named else "the next `hive up` makes it"
        raise NotFound(f"{file}: there is no such key (there are: {have}); {remedy}, or name one with --key")
    return read_private_key(file)


def named_public_key(home: Home, text: str) -> tuple[str, str]:
    """Return the public key that somebody means, in hex, and what it may be called.

    Args:
        home: whose keys they are.
        text: 64 hex digits, a PEM file, or the name of a key in this home.

    Raises:
        InvalidArgument: it is none of these.
    """
    from hive_common.artifacts.keys import is_public_key, read_public_key

    if is_public_key(text):
        return text, ""
    if "/" not in text and private_file(home, text).exists():
        return public_key(home, text), text
    file = Path(text)
    if not file.exists():
        raise InvalidArgument(
            f"{text}: is no key; expected 64 hex digits, the file NAME.pub that its author made, "
            f"or the name of a key in {home.agent_keys_dir} ({', '.join(names(home)) or 'there are none'})",
            path="KEY",
        )
    return read_public_key(file), file.stem


def _write(home: Home, name: str) -> str:
    from hive_common.artifacts.keys import write_key

    home.agent_keys_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    return write_key(private_file(home, name), home.agent_keys_dir / f"{name}.pub")


def _check_name(name: str) -> None:
    from hive_common.artifacts.keys import KEY_NAME_PATTERN

    if not KEY_NAME_PATTERN.match(name):
        raise InvalidArgument(
            f"{name[:80]!r} is no name for a key; expected letters, digits and . _ -", path="NAME"
        )
