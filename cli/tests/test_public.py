"""`hive up --public ADDRESS`: which addresses are taken, and what is recorded and written for them."""

import json
import socket

import pytest
from hive_cli.commands.installation import _chosen_address
from hive_cli.home import Home
from hive_cli.supervisor import ports, public
from hive_cli.supervisor.configs import write_configs
from hive_cli.supervisor.nats_conf import render
from hive_cli.supervisor.provision import provision
from hive_common.kernel.errors import FailedPrecondition, InvalidArgument
from hive_common.ops.config import ServiceConfig, load_config

OURS = "192.0.2.7"
OTHER_LOOPBACK = "127.0.0.2"
"""Stands for an address of this machine on which something may listen that is not on 127.0.0.1."""


@pytest.fixture(autouse=True)
def addresses(monkeypatch):
    monkeypatch.setattr(public, "local_addresses", lambda: (OURS, "2001:db8::7"))
    names = {"desktop.lan": {OURS}, "router.example": {"198.51.100.1"}, "desktop": {"127.0.1.1"}}
    monkeypatch.setattr(public, "_resolved", lambda name: names.get(name, set()))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0.0.0.0", "every address"),
        ("::", "every address"),
        ("127.0.0.1", "for itself only"),
        ("::1", "for itself only"),
        ("localhost", "for itself only"),
        ("224.0.0.1", "not an address that a server can have"),
        ("fe80::1", "not an address that a server can have"),
        ("192.0.2.8", "not an address of this machine"),
        ("300.1.2.3", "neither an IP address nor a host name"),
        ("https://desktop.lan", "neither an IP address nor a host name"),
        ("desktop_lan", "neither an IP address nor a host name"),
        ("", "neither an IP address nor a host name"),
    ],
)
def test_an_address_that_others_cannot_use_is_refused_with_what_would_be_right(text, says):
    with pytest.raises(InvalidArgument, match=says):
        _chosen_address(text, False)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        (OURS, OURS),
        ("[2001:DB8::7]", "2001:db8::7"),
        ("Desktop.lan.", "desktop.lan"),
        ("router.example", "router.example"),
    ],
)
def test_an_address_is_recorded_as_it_stands_in_certificates(text, address):
    assert _chosen_address(text, False) == address


def test_no_public_takes_it_back_and_excludes_public():
    assert _chosen_address(None, True) == ""
    assert _chosen_address(None, False) is None
    with pytest.raises(InvalidArgument, match="one of them"):
        _chosen_address(OURS, True)


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        (OURS, ""),
        ("desktop.lan", ""),
        ("router.example", "198.51.100.1"),
        ("nowhere.example", "cannot be resolved"),
        ("192.0.2.99", "not an address of this machine"),
    ],
)
def test_a_recorded_address_that_does_not_lead_here_is_pointed_out(address, problem):
    assert problem in public.problem_of(address) and bool(problem) == bool(public.problem_of(address))


@pytest.mark.parametrize(
    ("address", "hosts"),
    [
        (OURS, (OURS,)),
        ("desktop.lan", (OURS,)),
        ("router.example", (OURS, "2001:db8::7")),
        ("desktop", (OURS, "2001:db8::7")),
    ],
)
def test_what_is_listened_on(address, hosts):
    assert public.listened(address) == hosts


def configs(home, settings):
    write_configs(home, settings, settings.executors, home.root / "cache")
    return {name: json.loads(home.config_file(name).read_text()) for name in ("gateway", "registry", "executor-1")}


def test_the_address_is_kept_until_it_is_taken_back(tmp_path):
    home = Home(tmp_path / "home")
    first = provision(home, 1, public=OURS, preferred_ports=False)
    assert first.public == OURS
    assert provision(home, None) == first
    gateway = configs(home, first)["gateway"]["extra"]
    assert gateway["public_url"] == f"https://{OURS}:{first.ports['http']}"
    assert gateway["tls"]["hosts"] == [OURS]
    assert gateway["http_host"] == "127.0.0.1"
    ca = (home.root / "tls" / "ca.pem").read_text()
    back = provision(home, None, public="")
    plain = configs(home, back)
    assert back.public == "" and plain["gateway"]["extra"].get("tls") is None
    assert plain["gateway"]["extra"]["public_url"] == back.endpoints.http
    again = provision(home, None, public=OURS)
    assert again == first
    assert (home.root / "tls" / "ca.pem").read_text() == ca, "devices know the installation by it"


@pytest.mark.parametrize("name", ["http", "grpc", "nats"])
def test_a_port_that_is_taken_at_the_address_is_named_before_anything_is_recorded(tmp_path, name):
    home = Home(tmp_path / "home")
    before = provision(home, 1, preferred_ports=False)
    said = rf"--public: port {before.ports[name]} \({name}\) of {OTHER_LOOPBACK} is taken .*\(\$\.ports\.{name}\)"
    with socket.create_server((OTHER_LOOPBACK, before.ports[name])):
        with pytest.raises(FailedPrecondition, match=said):
            provision(home, None, public=OTHER_LOOPBACK)
        assert home.settings() == before and not home.ca_file.exists()
        # On the loopback it is free: without an address nothing is in the way.
        assert provision(home, None) == before
    assert provision(home, None, public=OTHER_LOOPBACK).public == OTHER_LOOPBACK


def test_a_new_installation_takes_ports_that_are_free_at_its_address_too(tmp_path, monkeypatch):
    with socket.create_server((OTHER_LOOPBACK, 0)) as other:
        liked = other.getsockname()[1]
        monkeypatch.setitem(ports.PREFERRED, "http", liked)
        assert provision(Home(tmp_path / "home"), 1, public=OTHER_LOOPBACK).ports["http"] != liked


def test_nats_listens_outside_only_with_tls(tmp_path):
    home = Home(tmp_path / "home")
    plain = provision(home, 1, preferred_ports=False)
    configs(home, plain)
    assert 'host: "127.0.0.1"' in home.nats_config_file.read_text()
    assert plain.endpoints.nats.startswith("nats://127.0.0.1:")
    settings = provision(home, None, public=OURS)
    nats = configs(home, settings)["executor-1"]["nats"]
    text = home.nats_config_file.read_text()
    assert 'host: "0.0.0.0"' in text and "handshake_first: true" in text
    assert nats["url"] == f"tls://127.0.0.1:{settings.ports['nats']}"
    assert nats["ca_file"] == str(home.ca_file)
    with pytest.raises(ValueError, match="no TLS"):
        render(port=1, monitor_port=2, store_dir=tmp_path, trust="", host="0.0.0.0")


def test_no_listener_without_tls_leaves_the_loopback(tmp_path):
    home = Home(tmp_path / "home")
    settings = provision(home, 1, preferred_ports=False)
    configs(home, settings)
    file = home.config_file("registry")
    for field in ("ops_host", "grpc_host"):
        document = json.loads(file.read_text())
        changed = tmp_path / "changed.json"
        changed.write_text(json.dumps(document | {field: "0.0.0.0"}))
        with pytest.raises(InvalidArgument, match=f"{field}.*no TLS"):
            load_config(changed, ServiceConfig)
        changed.write_text(json.dumps(document | {field: "0.0.0.0", "engine_network": True}))
        load_config(changed, ServiceConfig)
