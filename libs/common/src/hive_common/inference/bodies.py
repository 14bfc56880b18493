"""Request bodies in JSON, read once for what routing needs, and changed in as little as possible."""

from typing import Any, Final, TypeVar

import msgspec

from hive_common.kernel.errors import InvalidArgument

S = TypeVar("S")

_INCLUDE_USAGE: Final = b'{"stream_options":{"include_usage":true},'


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


def decode(body: bytes, kind: type[S]) -> S:
    """Return what `kind` knows of a body; what it does not know may be anything.

    Raises:
        InvalidArgument: it is not JSON, or not of this kind; the message names the place.
    """
    try:
        # What is passed over is not looked at closely, and only checking all of it shows where text is not UTF-8.
        str(body, "utf-8")
        return msgspec.json.decode(body, type=kind)
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"body: not UTF-8 at byte {error.start}", path="body") from error
    except msgspec.ValidationError as error:
        message, _, place = str(error).partition(" - at `$")
        path = place.strip("`.")
        raise InvalidArgument(f"body{'.' + path if path else ''}: {message}", path=path or "body") from error
    except msgspec.DecodeError as error:
        where = "" if "byte" in str(error) else f" (byte {len(body)})"
        raise InvalidArgument(f"body: {error}{where}; expected a JSON object", path="body") from error
    except RecursionError as error:
        raise InvalidArgument("body: nested too deeply", path="body") from error


def asking_for_usage(body: bytes, options: bytes) -> tuple[bytes, bool]:
    """Return the body of a stream that tells its usage, and whether only we asked for that.

    Args:
        body: a JSON object.
        options: its `stream_options` as they stand there; empty where it has none.
    """
    if not options:
        rest = body.lstrip()[1:]
        return _INCLUDE_USAGE + rest, True
    if options != b"null" and decode(options, _StreamOptions).include_usage:
        return body, False
    fields = {} if options == b"null" else decode(options, dict[str, msgspec.Raw])
    return changed(body, stream_options={**fields, "include_usage": True}), True


def changed(body: bytes, **fields: Any) -> bytes:
    """Return a JSON object with some fields set anew; all others keep their bytes."""
    return msgspec.json.encode({**decode(body, dict[str, msgspec.Raw]), **fields})
