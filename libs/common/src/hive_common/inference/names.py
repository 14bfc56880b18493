"""Names of models: which one was meant."""

import difflib
from collections.abc import Iterable
from typing import Final

from hive_common.contracts.events import Model
from hive_common.kernel.errors import NotFound

LATEST: Final = ":latest"
NEAREST_MAX: Final = 3
_NAME_CHARS_MAX: Final = 200


def same_model(name: str, models: Iterable[Model]) -> Model | None:
    """Return the model that is meant by `name`, or None. Ollama's names may leave out the tag `latest`."""
    known = {model.name: model for model in models}
    short = name.removesuffix(LATEST)
    return known.get(name) or known.get(short) or (known.get(short + LATEST) if ":" not in short else None)


def nearest(name: str, names: Iterable[str]) -> tuple[str, ...]:
    """Return the names that are most like `name`, the most like it first."""
    known = {other.lower(): other for other in names}
    wanted = name.lower()[:_NAME_CHARS_MAX]
    found = difflib.get_close_matches(wanted, known, n=NEAREST_MAX, cutoff=0.5)
    # Somebody who leaves out the tag, or the vendor before the slash, is close too.
    found += [other for other in sorted(known) if wanted in other and other not in found]
    return tuple(known[other] for other in found[:NEAREST_MAX])


def unknown_model(name: str, names: Iterable[str]) -> NotFound:
    """Return the error for a model that nothing serves; `fields` has `model` and `nearest`."""
    known = list(names)
    close = nearest(name, known)
    shown = name[:_NAME_CHARS_MAX]
    if close:
        hint = f"did you mean {' or '.join(f'`{one}`' for one in close)}?"
    elif known:
        hint = "`hive model list` shows what is there"
    else:
        hint = "no model is served at present; start Ollama or `hive up --with-model`"
    return NotFound(f"the model `{shown}` is not here; {hint}", model=shown, nearest=close)
