"""Imports the pure standard library while the component is built; afterwards there is no file to import from."""

import importlib
import pkgutil
import sys
from contextlib import suppress

# What makes no sense in a guest (windows, terminals, installers, tests) or acts when it is imported.
LEFT_OUT = frozenset(
    {
        "_android_support",
        "_ios_support",
        "antigravity",
        "ctypes",
        "curses",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "multiprocessing",
        "pydoc_data",
        "test",
        "this",
        "tkinter",
        "turtle",
        "turtledemo",
        "venv",
    }
)
# Asian code pages alone would add 5 MB; the rest of the codecs is small.
_LEFT_OUT_CODECS = ("big5", "cp932", "cp949", "cp950", "euc_", "gb", "hz", "iso2022", "johab", "shift_jis")


def import_all() -> None:
    """Import every module of the standard library that imports here, packages with their submodules."""
    for name in sorted(sys.stdlib_module_names - LEFT_OUT):
        # What the platform lacks (terminals, shared libraries, processes) simply is not there for agents.
        with suppress(ImportError, AttributeError):
            _import_tree(name)


def _import_tree(name: str) -> None:
    module = importlib.import_module(name)
    for found in pkgutil.iter_modules(getattr(module, "__path__", ()), name + "."):
        leaf = found.name.rpartition(".")[2]
        if leaf == "__main__" or (name == "encodings" and leaf.startswith(_LEFT_OUT_CODECS)):
            continue
        with suppress(ImportError, AttributeError):
            _import_tree(found.name)
