"""What each container of an installation is handed out: its own part, and how to find the others."""

import json
import stat
from pathlib import Path

import pytest
import yaml
from hive_cli.author_keys import AUTHOR, private_file
from hive_cli.home import Home, Settings
from hive_cli.supervisor import names
from hive_cli.supervisor.containers import PROMETHEUS, hand_out
from hive_cli.supervisor.provision import TOKEN_KEY

ROOT = Path(__file__).resolve().parents[2]
PROCESSES = {names.POSTGRES, names.NATS, PROMETHEUS, *names.SERVICES, "executor-1"}


@pytest.fixture
def handed(tmp_path: Path) -> tuple[Home, Path, Settings]:
    home, handout = Home(tmp_path / "home"), tmp_path / "handout"
    return home, handout, hand_out(home, handout, 1)


def files_of(part: Path) -> set[str]:
    return {str(file.relative_to(part)) for file in part.rglob("*") if file.is_file()}


def test_an_executor_gets_its_own_credentials_and_nothing_else(handed: tuple[Home, Path, Settings]) -> None:
    _, handout, _ = handed
    assert files_of(handout / "executor-1") == {
        "config/executor-1.json",
        "secrets/nats-executor-1.creds",
    }


def test_only_the_database_gets_the_administrators_password(handed: tuple[Home, Path, Settings]) -> None:
    home, handout, _ = handed
    assert {part.name for part in handout.iterdir()} == PROCESSES
    password = (home.secrets_dir / "postgres-admin").read_text().strip()
    holders = {
        part.name for part in handout.iterdir() if any(password in (part / f).read_text() for f in files_of(part))
    }
    assert holders == {names.POSTGRES}


def test_keys_that_sign_for_people_are_handed_to_nobody_and_that_for_tokens_to_the_scheduler(
    handed: tuple[Home, Path, Settings],
) -> None:
    home, handout, _ = handed

    def holders(key: Path) -> set[str]:
        secret = key.read_text().strip()
        assert secret and key.stat().st_mode & 0o777 == 0o600
        parts = list(handout.iterdir())
        return {part.name for part in parts if any(secret in (part / file).read_text() for file in files_of(part))}

    assert holders(home.kill_key_file) == holders(private_file(home, AUTHOR)) == set()
    assert holders(home.secret_file(TOKEN_KEY)) == {names.SCHEDULER}


def test_a_service_gets_the_files_that_its_configuration_names(handed: tuple[Home, Path, Settings]) -> None:
    home, handout, _ = handed
    for service in names.SERVICES:
        config = json.loads((handout / service / "config" / f"{service}.json").read_text())
        named = {
            config["postgres"]["password_file"],
            config["nats"]["credentials_file"],
            config["service_key_file"],
        }
        extra = config.get("extra", {})
        named |= {key["file"] for key in extra.get("keys", ())}
        for settings in (extra, extra.get("identities", {})):
            named |= {file for name, file in settings.items() if name.endswith("_file")}
        assert {str(home.root / file) for file in files_of(handout / service)} == named | {
            str(home.config_file(service))
        }


def test_only_the_router_gets_the_key_of_a_provider(handed: tuple[Home, Path, Settings]) -> None:
    home, handout, _ = handed
    key = home.secret_file("acme")
    key.touch(mode=0o600)
    key.write_text("secret of a provider")
    model = {"name": "m", "input_usd": 1, "output_usd": 1, "context_tokens": 8_192}
    acme = {"name": "acme", "base_url": "https://api.example.org/v1", "key_file": "secrets/acme", "models": [model]}
    home.settings_file.write_text(json.dumps(json.loads(home.settings_file.read_text()) | {"providers": [acme]}))
    hand_out(home, handout, 1)
    holders = {part.name for part in handout.iterdir() if "secrets/acme" in files_of(part)}
    assert holders == {names.ROUTER}


def test_processes_find_each_other_by_name_and_listen_to_others(handed: tuple[Home, Path, Settings]) -> None:
    _, handout, settings = handed
    gateway = json.loads((handout / "gateway/config/gateway.json").read_text())
    assert gateway["peers"] == {peer: f"{peer}:8501" for peer in names.PEERS}
    assert gateway["postgres"]["host"] == "postgres"
    assert gateway["nats"]["url"] == "nats://nats:4222"
    assert {gateway["ops_host"], gateway["grpc_host"], gateway["extra"]["http_host"]} == {"0.0.0.0"}
    executor = json.loads((handout / "executor-1/config/executor-1.json").read_text())
    assert executor["blobs_url"] == settings.endpoints.http == "http://gateway:8500"
    scraped = yaml.safe_load((handout / "prometheus/prometheus.yml").read_text())["scrape_configs"][0]
    targets = {target for one in scraped["static_configs"] for target in one["targets"]}
    assert targets == {f"{name}:9100" for name in (*names.SERVICES, "executor-1")}


def test_all_but_prometheus_may_be_read_by_their_owner_only(handed: tuple[Home, Path, Settings]) -> None:
    _, handout, _ = handed
    for part in handout.iterdir():
        modes = {stat.S_IMODE((part / file).stat().st_mode) for file in files_of(part)}
        assert modes == ({0o644} if part.name == PROMETHEUS else {0o600})


def test_handing_out_again_keeps_every_secret_and_id(handed: tuple[Home, Path, Settings]) -> None:
    home, handout, settings = handed
    before = {file: file.read_bytes() for file in handout.rglob("*") if file.is_file()}
    assert hand_out(home, handout, 1) == settings
    after = {file: file.read_bytes() for file in handout.rglob("*") if file.is_file()}
    renewed = handout / "executor-1" / "secrets" / "nats-executor-1.creds"
    # Good for a day: it is issued anew, for the same key.
    one, other = before.pop(renewed), after.pop(renewed)
    assert one.splitlines()[-2:] == other.splitlines()[-2:]
    assert after == before


def test_no_container_gets_the_keys_of_accounts(handed: tuple[Home, Path, Settings]) -> None:
    home, handout, _ = handed
    everything = "".join(file.read_text() for file in handout.rglob("*") if file.is_file())
    for name in ("nats-account", "nats-system"):
        assert (home.secrets_dir / name).read_text().strip() not in everything


def test_compose_mounts_what_is_handed_out_and_publishes_the_gateway_only() -> None:
    composed = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    services = composed["services"]
    assert {mount.split(":")[1] for mount in services["files"]["volumes"]} == {
        "/var/lib/hive",
        "/var/lib/hive/keys",
        *(f"/handout/{process}" for process in PROCESSES),
    }
    for name, service in services.items():
        # Keys of authors are for who hands out, and for the command.
        has = any(mount.startswith("keys:") for mount in service["volumes"])
        assert has == (name in ("files", "hive")), name
    for process in PROCESSES:
        # An executor renews its credentials in its part; nobody else changes what was handed out.
        mode = "" if process == "executor-1" else ":ro"
        assert f"{process}:/var/lib/hive{mode}" in services[process]["volumes"]
        assert "healthcheck" in services[process]
    published = {name: one["ports"] for name, one in services.items() if "ports" in one}
    assert set(published) == {"gateway"}
    assert all(port.startswith("127.0.0.1:") for port in published["gateway"])
