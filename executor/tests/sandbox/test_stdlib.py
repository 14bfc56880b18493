import json
import sys

from hive_executor.sandbox import RunnerPool

from .conftest import limits, python

# Modules of the standard library that an agent cannot import, and why. Names of other operating systems are
# not listed: they are in nobody's standard library there.
NOT_IMPORTABLE = {
    # Need a shared library or a compiled part that the WASI build of CPython leaves out.
    "bz2",
    "compression.bz2",
    "ctypes",
    "curses",
    "lzma",
    "readline",
    "ssl",
    "tkinter",
    "turtle",
    # Need processes, signals, terminals or users, which a guest has not.
    "fcntl",
    "grp",
    "mmap",
    "pty",
    "pwd",
    "resource",
    "syslog",
    "termios",
    "tty",
    # Need files beside the interpreter: installers, editors, demonstrations.
    "ensurepip",
    "idlelib",
    "pydoc_data",
    "turtledemo",
    "venv",
    # Act when they are imported.
    "antigravity",
    "this",
}

OF_OTHER_SYSTEMS = {"msvcrt", "winreg", "winsound", "nt"}

PURE_PARTS_THAT_AGENTS_EXPECT = [
    "abc",
    "argparse",
    "array",
    "ast",
    "asyncio",
    "base64",
    "binascii",
    "bisect",
    "calendar",
    "cmath",
    "collections.abc",
    "colorsys",
    "concurrent.futures",
    "configparser",
    "contextlib",
    "contextvars",
    "copy",
    "csv",
    "dataclasses",
    "datetime",
    "decimal",
    "difflib",
    "dis",
    "email.message",
    "email.mime.text",
    "encodings.idna",
    "encodings.latin_1",
    "encodings.utf_16",
    "encodings.cp1252",
    "enum",
    "errno",
    "fnmatch",
    "fractions",
    "functools",
    "gc",
    "glob",
    "graphlib",
    "gzip",
    "hashlib",
    "heapq",
    "hmac",
    "html.parser",
    "http.client",
    "importlib.metadata",
    "importlib.resources",
    "inspect",
    "io",
    "ipaddress",
    "itertools",
    "json.decoder",
    "keyword",
    "linecache",
    "locale",
    "logging.handlers",
    "math",
    "mimetypes",
    "numbers",
    "operator",
    "os.path",
    "pathlib",
    "pickle",
    "pkgutil",
    "plistlib",
    "pprint",
    "profile",
    "pstats",
    "queue",
    "quopri",
    "random",
    "re",
    "reprlib",
    "secrets",
    "sched",
    "selectors",
    "shlex",
    "shutil",
    "socket",
    "sqlite3",
    "statistics",
    "string",
    "string.templatelib",
    "stringprep",
    "struct",
    "symtable",
    "sys",
    "tempfile",
    "textwrap",
    "threading",
    "time",
    "timeit",
    "token",
    "tokenize",
    "tomllib",
    "traceback",
    "types",
    "typing",
    "unicodedata",
    "unittest.mock",
    "urllib.parse",
    "urllib.request",
    "uuid",
    "warnings",
    "wave",
    "weakref",
    "xml.dom.minidom",
    "xml.etree.ElementTree",
    "xml.sax",
    "xmlrpc.client",
    "zipfile",
    "zlib",
    "zoneinfo",
]

IMPORT_ALL = """
import importlib, sys
def run(input):
    failed = {}
    for name in input["names"] or sorted(sys.stdlib_module_names):
        try:
            importlib.import_module(name)
        except BaseException as error:
            failed[name] = f"{type(error).__name__}: {error}"
    return {"version": list(sys.version_info[:2]), "failed": failed}
"""


async def failed_imports(pool: RunnerPool, names: list[str]) -> dict[str, str]:
    outcome = await pool.run(python(IMPORT_ALL), json.dumps({"names": names}).encode(), limits())
    assert outcome.output is not None, outcome
    failed: dict[str, str] = json.loads(outcome.output)["failed"]
    return failed


async def test_what_cannot_be_imported_is_exactly_the_list(pool: RunnerPool) -> None:
    failed = await failed_imports(pool, [])
    public = {name for name in failed if not name.startswith("_")}
    assert public - OF_OTHER_SYSTEMS == {name for name in NOT_IMPORTABLE if "." not in name}


async def test_the_pure_parts_can_be_imported(pool: RunnerPool) -> None:
    assert await failed_imports(pool, PURE_PARTS_THAT_AGENTS_EXPECT) == {}


async def test_the_pure_parts_work(pool: RunnerPool) -> None:
    source = """
import ast, base64, csv, datetime, decimal, fractions, hashlib, io, sqlite3, statistics, urllib.parse, zlib
import xml.etree.ElementTree as ET
def run(input):
    db = sqlite3.connect(":memory:")
    return {
        "ast": type(ast.parse("x = 1").body[0]).__name__,
        "base64": base64.b64encode(b"hive").decode(),
        "csv": list(csv.reader(io.StringIO("a,b"))),
        "date": str(datetime.date(2026, 11, 25) + datetime.timedelta(days=7)),
        "decimal": str(decimal.Decimal("0.1") * 3),
        "fraction": str(fractions.Fraction(1, 3) + 1),
        "sha256": hashlib.sha256(b"").hexdigest()[:8],
        "sqlite": db.execute("select 1 + 1").fetchone(),
        "mean": statistics.mean([1, 2, 6]),
        "url": urllib.parse.urlsplit("http://h/p?q").query,
        "xml": ET.fromstring("<a><b>t</b></a>").find("b").text,
        "zlib": zlib.decompress(zlib.compress(b"x")).decode(),
        "latin": "é".encode("latin-1").hex(),
        "year": datetime.datetime.now(datetime.timezone.utc).year >= 2025,
    }
"""
    outcome = await pool.run(python(source), b"{}", limits())
    assert json.loads(outcome.output or b"null") == {
        "ast": "Assign",
        "base64": "aGl2ZQ==",
        "csv": [["a", "b"]],
        "date": "2026-12-02",
        "decimal": "0.3",
        "fraction": "4/3",
        "sha256": "e3b0c442",
        "sqlite": [2],
        "mean": 3,
        "url": "q",
        "xml": "t",
        "zlib": "x",
        "latin": "e9",
        "year": True,
    }, outcome


async def test_a_module_that_is_not_there_says_so(pool: RunnerPool) -> None:
    outcome = await pool.run(python("import numpy\ndef run(input):\n    return {}"), b"{}", limits())
    assert outcome.message == "ModuleNotFoundError: No module named 'numpy'"


def test_the_list_names_real_modules() -> None:
    # `compression` is newer than the oldest Python this test runs on.
    assert {name for name in NOT_IMPORTABLE if not name.startswith("compression")} <= sys.stdlib_module_names
