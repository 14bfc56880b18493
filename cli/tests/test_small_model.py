"""`hive up --with-model`: what is recorded and written for it."""

import json

import pytest
from hive_cli.home import ExecutorEntry, Home, JoinedSettings
from hive_cli.supervisor import joined, provision
from hive_cli.supervisor.configs import write_configs
from hive_cli.supervisor.joined import checked, executor_config
from hive_cli.supervisor.small_model import PORTS
from hive_cli.supervisor.wishes import Wishes
from hive_common.kernel.errors import FailedPrecondition
from hive_common.kernel.ids import new_id
from hive_common.ops.config import load_config, write_config
from hive_executor.config import OLLAMA_URL, ExecutorConfig
from hive_executor.small_model import SmallModelConfig


@pytest.fixture
def installed(monkeypatch):
    for module in (provision, joined):
        monkeypatch.setattr(module, "require_small_model", lambda: None)


def urls_in(home, settings):
    write_configs(home, settings, settings.executors, home.root / "cache")
    router = json.loads(home.config_file("router").read_text())
    return load_config(home.config_file("executor-1"), ExecutorConfig).model_urls, router["extra"]["model_urls"]


def test_it_is_kept_until_it_is_taken_back(tmp_path, installed):
    home = Home(tmp_path / "home")
    first = provision.provision(home, 1, preferred_ports=False)
    assert not first.models.small and not set(PORTS) & set(first.ports)
    with_model = provision.provision(home, None, small_model=True)
    url = f"http://127.0.0.1:{with_model.ports['small-model']}"
    assert provision.provision(home, None) == with_model == home.settings()
    assert urls_in(home, with_model) == ((OLLAMA_URL, url), [OLLAMA_URL, url])
    config = load_config(home.config_file("small-model"), SmallModelConfig)
    assert (config.port, config.ops_port) == tuple(with_model.ports[name] for name in PORTS)
    assert f"127.0.0.1:{config.ops_port}" in home.prometheus_file.read_text()
    back = provision.provision(home, None, small_model=False)
    assert urls_in(home, back) == ((OLLAMA_URL,), [OLLAMA_URL])
    assert provision.provision(home, None, small_model=True) == with_model


def test_where_it_is_not_installed_nothing_is_recorded(tmp_path, monkeypatch):
    def missing():
        raise FailedPrecondition("run: pip install 'hivefabric[model]'")

    monkeypatch.setattr(provision, "require_small_model", missing)
    home = Home(tmp_path / "home")
    before = provision.provision(home, 1, preferred_ports=False)
    with pytest.raises(FailedPrecondition, match="pip install"):
        provision.provision(home, None, small_model=True)
    assert home.settings() == before


def test_on_a_joined_machine_too(tmp_path, installed):
    home = Home(tmp_path / "home")
    home.root.mkdir()
    settings = JoinedSettings(
        gateway="https://desktop:8500",
        nats="tls://desktop:4222",
        owner=new_id(),
        executor=ExecutorEntry("laptop", new_id()),
        ports={"http": 0, "executor_ops": 0},
    )
    write_config(home.joined_file, settings)
    with_model = checked(home, Wishes(small_model=True))
    assert checked(home, Wishes()) == with_model
    url = f"http://127.0.0.1:{with_model.ports['small-model']}"
    assert executor_config(home, with_model).model_urls == (OLLAMA_URL, url)
    back = checked(home, Wishes(small_model=False))
    assert executor_config(home, back).model_urls == (OLLAMA_URL,)
