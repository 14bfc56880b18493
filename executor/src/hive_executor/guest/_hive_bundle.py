"""Makes the files of an agent importable, as if its folder were the directory of a script."""

import base64
import binascii
import importlib.abc
import importlib.machinery
import importlib.util
import marshal
import sys
from collections.abc import Sequence
from types import CodeType, ModuleType
from typing import Any

_RUNTIME_MODULES = frozenset({"hive", "sys", "builtins", "wit_world", "componentize_py_types", "__main__"})
_COMPILED_BYTES_MAX = 1 << 20


class AgentLoader(importlib.abc.InspectLoader):
    """Loads modules and data of one agent from memory."""

    def __init__(self, bundle: "Bundle") -> None:
        self._bundle = bundle

    def get_source(self, fullname: str) -> str:
        """Return the text of a module; tracebacks show their lines from here."""
        return importlib.util.decode_source(self.get_data(self._bundle.path_of(fullname)))

    def get_code(self, fullname: str) -> CodeType:
        """Return a module compiled."""
        path = self._bundle.path_of(fullname)
        ready = self._bundle.code.get(path)
        if ready is not None:
            code: CodeType = marshal.loads(binascii.a2b_base64(ready))  # noqa: S302 - compiled by `compiled`
            return code
        return compile(self.get_data(path), path, "exec", dont_inherit=True)

    def is_package(self, fullname: str) -> bool:
        """Say whether a name is a folder with `__init__.py`."""
        return self._bundle.path_of(fullname).endswith("/__init__.py")

    def get_data(self, path: str) -> bytes:
        """Return a file of the agent's folder, as `pkgutil.get_data` asks for it.

        Raises:
            FileNotFoundError: the folder has no such file.
        """
        # The import machinery makes paths absolute; the agent's folder is the root then.
        content = self._bundle.files.get(path.removeprefix("./").removeprefix("/"))
        if content is None:
            raise FileNotFoundError(f"the agent's folder has no file {path!r}")
        return _bytes_of(content)


def _bytes_of(content: str | dict[str, str]) -> bytes:
    return content.encode() if isinstance(content, str) else base64.b64decode(content["base64"])


def compiled(files: dict[str, Any]) -> dict[str, str]:
    """Return the code of each module, as `Bundle.code` takes it; of one that does not compile, nothing.

    Compiling the smallest agent takes nearly as long as all else that happens to it. This is done once for an
    agent, in a guest like any other and before any of its code runs, by the very interpreter that will run it.
    """
    sources = {path: _bytes_of(content) for path, content in files.items() if path.endswith(".py")}
    code: dict[str, str] = {}
    # Code travels into each guest whole; of a large package a guest compiles the little that it imports.
    if sum(map(len, sources.values())) <= _COMPILED_BYTES_MAX:
        for path, data in sources.items():
            try:
                module = compile(data, path, "exec", dont_inherit=True)
            except (SyntaxError, ValueError, RecursionError, OverflowError):
                continue
            code[path] = base64.b64encode(marshal.dumps(module)).decode()
    return code


class Bundle(importlib.abc.MetaPathFinder):
    """The files of one agent, and what was compiled of them. Modules are looked for beside the entry file."""

    def __init__(self, entry: str, files: dict[str, Any], code: dict[str, str]) -> None:
        self.entry = entry
        self.files = files
        self.code = code
        self.loader = AgentLoader(self)
        folder = entry.rpartition("/")[0]
        self._prefix = folder + "/" if folder else ""
        self._paths: dict[str, str] = {}
        self._folders = {path.rpartition("/")[0] for path in files}

    def load_entry(self) -> ModuleType:
        """Import the entry file under its own name; without the locks and look-ups that others need."""
        name = self.entry.removeprefix(self._prefix).removesuffix(".py")
        spec = self.find_spec(name, None)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        self.loader.exec_module(module)
        return module

    def path_of(self, fullname: str) -> str:
        """Return the path of a module that `find_spec` has found.

        Raises:
            ImportError: it is not a module of this agent.
        """
        try:
            return self._paths[fullname]
        except KeyError:
            raise ImportError(f"{fullname} is not a module of this agent", name=fullname) from None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Find a sibling module or package; part of the import protocol."""
        stem = self._prefix + fullname.replace(".", "/")
        for candidate in (f"{stem}/__init__.py", f"{stem}.py"):
            if candidate in self.files:
                self._paths[fullname] = candidate
                return importlib.util.spec_from_file_location(
                    fullname,
                    candidate,
                    loader=self.loader,
                    submodule_search_locations=[stem] if candidate.endswith("/__init__.py") else None,
                )
        if any(folder == stem or folder.startswith(stem + "/") for folder in self._folders):
            namespace = importlib.machinery.ModuleSpec(fullname, None, is_package=True)
            namespace.submodule_search_locations = [stem]
            return namespace
        return None

    def install(self) -> None:
        """Put this bundle first, and let its modules win over standard ones of the same name, as for a script."""
        sys.meta_path.insert(0, self)
        own = {path.removeprefix(self._prefix).split("/")[0].removesuffix(".py") for path in self.files}
        shadowed = (own - _RUNTIME_MODULES) & sys.stdlib_module_names
        if shadowed:
            for name in [name for name in sys.modules if name.split(".")[0] in shadowed]:
                del sys.modules[name]
