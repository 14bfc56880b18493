"""Request bodies in JSON, read once for what routing needs."""

from typing import TypeVar

import msgspec

from hive_common.kernel.errors import InvalidArgument

S = TypeVar("S")


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
