import os
import socket
import stat
from pathlib import Path

import msgspec
import pytest
from hive_cli.home import ExecutorEntry, Home, HomeInUse, JoinedSettings, find_home
from hive_cli.placing import chosen_labels, chosen_tier
from hive_cli.supervisor import ports
from hive_cli.supervisor.configs import write_configs
from hive_cli.supervisor.joined import checked, executor_config
from hive_cli.supervisor.provision import active_executors, provision, write_private
from hive_cli.supervisor.wishes import Wishes
from hive_common.kernel.errors import FailedPrecondition, InvalidArgument
from hive_common.kernel.ids import new_id
from hive_common.ops.config import load_config, write_config
from hive_executor.config import ExecutorConfig


def test_home_is_chosen_by_option_then_variable_then_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIVE_HOME", "/var/hive")
    assert find_home(Path("/opt/hive")).root == Path("/opt/hive")
    assert find_home(None).root == Path("/var/hive")
    monkeypatch.setenv("HIVE_HOME", "")
    assert find_home(None).root == Path.home() / ".hivefabric"


def test_everything_secret_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    provision(home, 2)
    secrets = [home.api_key_file, *home.secrets_dir.iterdir()]
    assert len(secrets) >= 9
    assert {stat.S_IMODE(file.stat().st_mode) for file in secrets} == {0o600}
    assert stat.S_IMODE(home.secrets_dir.stat().st_mode) == 0o700
    assert stat.S_IMODE(home.root.stat().st_mode) == 0o700
    texts = [file.read_text() for file in secrets]
    assert len(set(texts)) == len(texts)
    settings = home.settings_file.read_text()
    assert not any(text.strip() in settings for text in texts)


def test_a_second_provision_changes_nothing(tmp_path: Path) -> None:
    home = Home(tmp_path)
    first = provision(home, 2)
    contents = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert provision(home, None) == first
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == contents


def test_tier_and_labels_are_kept_by_every_executor_until_another_wish(tmp_path: Path) -> None:
    home = Home(tmp_path)
    provision(home, 2, tier=chosen_tier("edge"), labels=chosen_labels(["room=attic", "gpu=no"]))
    settings = provision(home, 2, labels=chosen_labels(["gpu="]))
    assert settings == provision(home, None) == home.settings()
    assert [(one.tier, one.labels) for one in settings.executors] == [("edge", {"room": "attic"})] * 2
    write_configs(home, settings, settings.executors, tmp_path / "cache")
    config = load_config(home.config_file("executor-1"), ExecutorConfig)
    assert (config.tier, config.labels, config.device) == ("edge", {"room": "attic"}, "")


def test_a_joined_machine_keeps_its_tier_and_labels_too(tmp_path: Path) -> None:
    home = Home(tmp_path)
    settings = JoinedSettings(
        gateway="https://desktop:8500",
        nats="tls://desktop:4222",
        owner=new_id(),
        executor=ExecutorEntry("laptop", new_id(), device="simulated"),
        ports={"http": 0, "executor_ops": 0},
        labels={"region": "eu", "room": "attic"},
    )
    write_config(home.joined_file, settings)
    wished = checked(home, Wishes(tier="edge", labels={"room": "", "gpu": "no"}))
    assert checked(home, Wishes()) == wished == home.joined()
    config = executor_config(home, wished)
    assert (config.tier, config.labels, config.device) == ("edge", {"region": "eu", "gpu": "no"}, "simulated")


@pytest.mark.parametrize("said", ["moon", ""])
def test_a_tier_that_is_none_is_refused(said: str) -> None:
    with pytest.raises(InvalidArgument, match=r"--tier.*edge, worker, core"):
        chosen_tier(said)


@pytest.mark.parametrize("said", ["room", "=attic"])
def test_a_label_that_is_none_is_refused(said: str) -> None:
    with pytest.raises(InvalidArgument, match=r"--label.*NAME=VALUE"):
        chosen_labels([said])


def test_what_is_set_in_the_file_alone_is_kept(tmp_path: Path) -> None:
    home = Home(tmp_path)
    settings = msgspec.structs.replace(provision(home, 1), approval_ms=5_000)
    write_config(home.settings_file, settings)
    assert provision(home, None) == settings == home.settings()


def test_more_executors_get_ids_and_ports_and_the_others_keep_theirs(tmp_path: Path) -> None:
    home = Home(tmp_path)
    one = provision(home, None)
    three = provision(home, 3)
    assert [entry.name for entry in three.executors] == ["executor-1", "executor-2", "executor-3"]
    assert three.executors[0] == one.executors[0]
    assert three.ports.items() >= one.ports.items()
    assert len(set(three.ports.values())) == len(three.ports)
    assert active_executors(provision(home, 1), 1) == one.executors


def test_a_recorded_port_that_is_taken_is_named_with_its_file(tmp_path: Path) -> None:
    home = Home(tmp_path)
    port = provision(home, 1).ports["registry_grpc"]
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(FailedPrecondition, match=rf"port {port} \(registry_grpc\).*hive\.json"):
            provision(home, 1)
    provision(home, 1)


def test_a_preferred_port_is_taken_where_it_is_free_and_another_where_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        monkeypatch.setitem(ports.PREFERRED, "http", other.getsockname()[1])
        assert ports.pick(["http"], {})["http"] != other.getsockname()[1]
    assert ports.pick(["http"], {})["http"] == ports.PREFERRED["http"]


def test_two_names_never_share_a_port() -> None:
    names = [f"n{index}" for index in range(50)]
    assert len(set(ports.pick(names, {}).values())) == 50


def test_a_full_disk_is_refused_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hive_cli.supervisor.provision.FREE_BYTES_MIN", 1 << 62)
    with pytest.raises(FailedPrecondition, match=r"MiB are free on this disk, expected"):
        provision(Home(tmp_path / "home"), 1)
    assert not Home(tmp_path / "home").settings_file.exists()


def test_a_lock_is_held_once_and_tells_who_holds_it(tmp_path: Path) -> None:
    home = Home(tmp_path)
    assert home.supervisor_pid() is None
    with home.locked():
        assert home.supervisor_pid() == os.getpid()
        with pytest.raises(HomeInUse, match=f"pid {os.getpid()}"), home.locked():
            pass
    assert home.supervisor_pid() is None


@pytest.mark.parametrize("text", ["{", '{"owner": 1}', "[]", ""])
def test_settings_that_do_not_fit_are_named(tmp_path: Path, text: str) -> None:
    home = Home(tmp_path)
    home.settings_file.write_text(text)
    with pytest.raises(InvalidArgument, match=r"hive\.json"):
        home.settings()


def test_a_private_file_replaces_a_draft_that_was_left(tmp_path: Path) -> None:
    target = tmp_path / "key"
    (tmp_path / "key.tmp").write_text("left behind, and readable by all")
    write_private(target, "new")
    assert target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [target]


def test_a_home_of_many_takes_no_port_that_another_may_be_about_to_take(tmp_path: Path) -> None:
    settings = provision(Home(tmp_path / "home"), 1, preferred_ports=False)
    assert not {8500, 8501, 4222} & set(settings.ports.values())
    assert provision(Home(tmp_path / "home"), 1) == settings
