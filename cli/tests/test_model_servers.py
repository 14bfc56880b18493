"""Where servers of models answer, and what is needed there: options, what is recorded, and what processes get."""

import json
import re
from pathlib import Path

import pytest
from hive_cli.home import Home
from hive_cli.main import app
from hive_cli.model_servers import chosen_urls
from hive_cli.supervisor import ca
from hive_cli.supervisor.configs import write_configs
from hive_cli.supervisor.provision import provision
from hive_cli.supervisor.wishes import Wishes
from hive_common.inference.backends import BackEnds
from hive_common.inference.config import BackEndConfig
from hive_common.kernel.errors import InvalidArgument
from hive_common.ops.config import load_config
from hive_common.testing.scripted import ScriptedBackEnd
from hive_executor.config import ExecutorConfig
from typer.testing import CliRunner

HERE = "http://127.0.0.1:8000"
THERE = "https://models.example"


@pytest.fixture
def key(tmp_path: Path) -> Path:
    file = tmp_path / "key"
    file.write_text("secret-of-the-back-end\n")
    file.chmod(0o600)
    return file


@pytest.fixture
def ca_file(tmp_path: Path) -> Path:
    other = Home(tmp_path / "other")
    other.secrets_dir.mkdir(parents=True)
    ca.ensure_certificates(other, "192.0.2.1")
    return other.ca_file


def test_keys_and_certificates_go_with_their_urls(
    key: Path, ca_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    chosen = chosen_urls([HERE, f"{THERE}/"], [f"{THERE}/=key"], [f"{THERE}={ca_file}"])
    assert chosen == (HERE, BackEndConfig(THERE, str(key), str(ca_file)))
    assert chosen_urls(None, None, None) is None


@pytest.mark.parametrize(
    ("urls", "keys", "cas", "said"),
    [
        (["models.example"], (), (), "--model-url: got 'models.example'; expected a base URL"),
        ([HERE], [THERE], (), "--model-key: got 'https://models.example'; expected URL=FILE"),
        ([HERE], [f"{THERE}=key"], (), "--model-key: https://models.example is not among"),
        ((), [f"{THERE}=key"], (), "--model-key: https://models.example is not among"),
        ([HERE], [f"{HERE}=missing"], (), "missing: cannot be read"),
        ([HERE], [f"{HERE}=open"], (), "open: others may read it; run: chmod 600"),
        ([HERE], (), [f"{HERE}=key"], "--model-ca: http://127.0.0.1:8000 has no certificate to check"),
        ([THERE], (), [f"{THERE}=key"], "key: cannot be used as CA"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_sentence(
    key: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    urls: list[str],
    keys: list[str],
    cas: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "open").write_text("secret")
    (tmp_path / "open").chmod(0o644)
    with pytest.raises(InvalidArgument, match=re.escape(said)) as raised:
        chosen_urls(urls, keys, cas)
    assert "secret" not in raised.value.message


async def test_what_up_was_told_is_kept_and_opens_the_back_end(key: Path, tmp_path: Path) -> None:
    async with ScriptedBackEnd() as back_end:
        back_end.play(api_key="secret-of-the-back-end")
        home = Home(tmp_path / "home")
        chosen = chosen_urls([back_end.url], [f"{back_end.url}={key}"], ())
        provision(home, 1, preferred_ports=False, model_urls=chosen)
        settings = provision(home, None)
        write_configs(home, settings, settings.executors, home.root / "cache")
        assert "secret-of-the-back-end" not in home.settings_file.read_text()
        router = json.loads(home.config_file("router").read_text())["extra"]["model_urls"]
        urls = load_config(home.config_file("executor-1"), ExecutorConfig).model_urls
        assert router == [{"url": back_end.url, "key_file": str(key), "ca_file": ""}]
        async with BackEnds(urls) as back_ends:
            assert [model.name for model in back_ends.found] == ["scripted"]
        async with BackEnds([back_end.url]) as back_ends:
            assert not back_ends.found


def test_up_passes_on_what_it_was_told(key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Wishes] = []
    monkeypatch.setattr(
        "hive_cli.supervisor.supervisor.supervise", lambda home, wishes, report: told.append(wishes) or 0
    )
    options = ["--model-url", HERE, "--model-key", f"{HERE}={key}", "--counts-only"]
    assert CliRunner().invoke(app, ["up", "--home", str(tmp_path / "home"), *options]).exit_code == 0
    assert told == [Wishes(model_urls=(BackEndConfig(HERE, str(key)),), counts_only=True)]


def test_that_only_counts_are_kept_is_kept_until_it_is_taken_back(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")

    def written() -> tuple[bool, bool]:
        settings = home.settings()
        write_configs(home, settings, settings.executors, home.root / "cache")
        gateway = json.loads(home.config_file("gateway").read_text())["extra"]["keys"][0]
        executor = load_config(home.config_file("executor-1"), ExecutorConfig)
        return gateway["counts_only"], executor.models_counts_only

    provision(home, 1, preferred_ports=False, counts_only=True)
    provision(home, None)
    assert written() == (True, True)
    provision(home, None, counts_only=False)
    assert written() == (False, False)
