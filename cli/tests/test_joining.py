"""`hive executor join` against a gateway that answers as told: what is taken, what is refused and how, and that
nothing is left behind.
"""

import base64
import email.utils
import json
import socket
import ssl
import stat
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgspec
import pytest
from hive_cli.commands.doctor import _device, _reach
from hive_cli.home import Home
from hive_cli.main import app
from hive_cli.output import exit_code_of
from hive_cli.supervisor import ca, certificates
from hive_cli.supervisor.joined import checked, executor_config
from hive_cli.supervisor.wishes import Wishes
from hive_common.bus.jwt import read_credentials
from hive_common.contracts.joining import JoinToken, proof_of
from hive_common.kernel.errors import HiveError
from hive_common.kernel.ids import new_id
from hive_common.kernel.nkey import is_signed, public_key
from hive_common.ops.config import write_config
from hive_common.ops.ports import free_port
from hive_common.ops.tls import fingerprint_of, server_context
from typer.testing import CliRunner

NAME = "laptop"


class Installation:
    """What a joining machine sees of one."""

    def __init__(self, home):
        self.ahead_s = 0
        self.ca = ""
        self.enrolled = []
        self.refusal = None
        self.answer = {"executor_id": new_id(), "owner": new_id(), "nats_jwt": "a.b.c", "expires_us": 1}
        self.lost_answers = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def date_time_string(self, timestamp=None):
                return email.utils.formatdate(time.time() + outer.ahead_s, usegmt=True)

            def do_GET(self):
                if self.path == "/healthz":
                    self._answer(200, b"{}")
                    return
                assert self.path == "/v1/ca"
                self._answer(200 if outer.ca else 404, outer.ca.encode())

            def do_POST(self):
                assert self.path == "/v1/executors/enrol"
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                outer.enrolled.append(body)
                if outer.lost_answers:
                    outer.lost_answers -= 1
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                    return
                if outer.refusal:
                    status, code, detail = outer.refusal
                    self._answer(status, json.dumps({"code": code, "detail": detail, "status": status}).encode())
                    return
                self._answer(200, json.dumps(outer.answer).encode())

            def _answer(self, status, body):
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        self.fingerprint = ""
        self.url = f"http://127.0.0.1:{self.port}"
        if home is not None:
            own = certificates.files(home, "gateway")
            context = server_context(own.certificate, own.key)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
            self.ca = home.ca_file.read_text()
            self.fingerprint = fingerprint_of(self.ca)
            self.url = f"https://127.0.0.1:{self.port}"
        scheme = "tls" if home else "nats"
        self.answer |= {"nats_url": f"{scheme}://127.0.0.1:4222", "blobs_url": self.url}

    def token(self, **changes):
        parts = {
            "url": self.url,
            "fingerprint": self.fingerprint,
            "token_id": new_id(),
            "secret": "s3cret",
            "expires_us": 1,
        }
        return JoinToken(**(parts | changes)).text()


@pytest.fixture(scope="module")
def certified(tmp_path_factory):
    home = Home(tmp_path_factory.mktemp("ca") / "home")
    home.secrets_dir.mkdir(parents=True)
    ca.ensure_certificates(home, "192.0.2.1")
    return home


@pytest.fixture(params=["tls", "plain"])
def installation(request, certified):
    yield from running(Installation(certified if request.param == "tls" else None))


@pytest.fixture
def encrypted(certified):
    yield from running(Installation(certified))


def running(made):
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


@pytest.fixture
def home(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("hive_cli.commands.join._start", lambda home, *_: started.append(home.root) or 0)
    home = Home(tmp_path / "joined")
    home.started = started
    return home


def join(home, token, *options):
    """Run the command, and return its exit code and what the user reads when it fails."""
    done = CliRunner().invoke(app, ["executor", "join", token, "--home", str(home.root), "--name", NAME, *options])
    if isinstance(done.exception, HiveError):
        return exit_code_of(done.exception), done.exception.message
    return done.exit_code, done.output


def test_a_machine_joins_with_a_key_of_its_own(installation, home):
    token = installation.token()
    options = ("--slots", "3", "--region", "eu", "--model-url", "http://127.0.0.1:8080/", "--counts-only")
    code, said = join(home, token, *options)
    assert code == 0, said
    (body,) = installation.enrolled
    proof = base64.b64decode(body["proof"])
    assert is_signed(proof, proof_of(body["token_id"], NAME), public_key(body["public_key"]))
    held = read_credentials(home.credentials_file)
    assert held.jwt == "a.b.c" and held.seed not in json.dumps(body)
    assert stat.S_IMODE(home.credentials_file.stat().st_mode) == 0o600
    assert stat.S_IMODE(home.secrets_dir.stat().st_mode) == 0o700
    joined = home.joined()
    assert (joined.executor.id, joined.executor.name) == (installation.answer["executor_id"], NAME)
    assert (joined.slots, joined.labels, joined.model_urls) == (3, {"region": "eu"}, ("http://127.0.0.1:8080",))
    assert joined.counts_only and executor_config(home, joined).models_counts_only
    assert home.ca_file.exists() == bool(installation.fingerprint)
    assert home.started == [home.root]


def test_an_answer_that_is_lost_is_asked_for_again_with_the_same_key(installation, home):
    installation.lost_answers = 1
    assert join(home, installation.token())[0] == 0
    first, second = installation.enrolled
    assert first == second


REFUSALS = {
    "expired": (409, "failed_precondition", "this token has expired; make a new one", 1),
    "used": (409, "failed_precondition", "this token was used by another machine; make a new one", 1),
    "foreign": (401, "unauthenticated", "this installation never issued such a token; make a new one", 2),
    "hurried": (429, "rate_limited", "too many machines at once; again in a minute", 1),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_token_that_is_refused_leaves_nothing_behind(installation, home, kind):
    *installation.refusal, expected = REFUSALS[kind]
    code, said = join(home, installation.token())
    assert (code, said) == (expected, installation.refusal[2])
    assert not home.root.exists()
    assert home.started == []


def test_a_folder_that_was_there_stays_and_stays_empty(installation, home):
    home.root.mkdir()
    installation.refusal = (401, "unauthenticated", "no")
    assert join(home, installation.token())[0] == 2
    assert list(home.root.iterdir()) == []


def test_another_ca_than_that_of_the_token_gets_no_secret(encrypted, home):
    code, said = join(home, encrypted.token(fingerprint="0" * 64))
    assert code == 2 and "another fingerprint" in said and "hive executor token" in said
    assert encrypted.enrolled == [] and not home.root.exists()


def test_a_server_that_shows_the_right_ca_but_is_not_signed_by_it_gets_no_secret(encrypted, home, tmp_path):
    """Somebody in between can pass the CA's certificate on, but cannot speak for it."""
    other = Home(tmp_path / "other")
    other.secrets_dir.mkdir(parents=True)
    ca.ensure_certificates(other, "192.0.2.1")
    encrypted.ca = other.ca_file.read_text()
    code, said = join(home, encrypted.token(fingerprint=fingerprint_of(encrypted.ca)))
    assert code == 2 and "certificate that is not good" in said
    assert encrypted.enrolled == [] and not home.root.exists()


def test_a_name_that_is_not_in_the_certificate_gets_no_secret(encrypted, home):
    code, said = join(home, encrypted.token(url=f"https://127.0.0.2:{encrypted.port}"))
    assert code in (2, 3) and ("certificate that is not good" in said or "cannot be reached" in said)
    assert encrypted.enrolled == [] and not home.root.exists()


@pytest.mark.parametrize("ahead_s", [3600, -3600])
def test_a_clock_that_is_an_hour_off_is_said_with_how_much(installation, home, ahead_s):
    installation.ahead_s = ahead_s
    code, said = join(home, installation.token())
    way = "behind" if ahead_s > 0 else "ahead of"
    assert code == 1 and way in said and "timedatectl" in said
    assert 3590 <= int(said.split(" clock is ")[1].split()[0]) <= 3610
    assert not home.root.exists()


def test_an_installation_without_a_ca_is_refused(encrypted, home):
    encrypted.ca = ""
    code, said = join(home, encrypted.token())
    assert code == 1 and "hive up --public" in said
    assert not home.root.exists()


def test_an_address_where_nobody_answers_is_unreachable(encrypted, home):
    code, said = join(home, encrypted.token(url=f"https://127.0.0.1:{free_port()}"))
    assert code == 3 and "cannot be reached" in said
    assert not home.root.exists()


def test_a_plain_address_of_another_machine_is_refused(installation, home):
    code, said = join(home, installation.token(url="http://192.0.2.1:8500", fingerprint=""))
    assert code == 2 and "without encryption" in said
    code, said = join(home, installation.token(url="http://192.0.2.1:8500", fingerprint="0" * 64))
    assert code == 2 and "without encryption" in said
    assert not home.root.exists()


@pytest.mark.parametrize("field", ["nats_url", "blobs_url"])
def test_an_encrypted_installation_cannot_send_a_device_to_a_plain_address(encrypted, home, field):
    encrypted.answer[field] = {"nats_url": "nats://192.0.2.1:4222", "blobs_url": "http://192.0.2.1:8500"}[field]
    code, said = join(home, encrypted.token())
    assert code == 1 and "expected addresses with tls://" in said
    assert not home.root.exists()


@pytest.mark.parametrize("text", ["", "hello", "hivejoin1.", "hivejoin1.e30", "hivejoin2.e30"])
def test_what_is_no_token_is_bad_input(home, text):
    code, said = join(home, text)
    assert code == 2 and "not a token" in said
    assert not home.root.exists()


def test_a_home_joins_once(installation, home):
    assert join(home, installation.token())[0] == 0
    before = home.credentials_file.read_text()
    code, said = join(home, installation.token())
    assert code == 2 and "has joined" in said and "--home" in said
    assert home.credentials_file.read_text() == before and len(installation.enrolled) == 1


def test_an_installation_does_not_become_a_device(installation, home):
    home.root.mkdir()
    home.settings_file.write_text("{}")
    code, said = join(home, installation.token())
    assert code == 2 and "an installation of its own" in said
    assert home.settings_file.read_text() == "{}" and installation.enrolled == []


def test_a_folder_with_something_else_is_left_alone(installation, home):
    home.root.mkdir()
    (home.root / "thesis.txt").write_text("years")
    code, said = join(home, installation.token())
    assert code == 2 and "not empty" in said
    assert (home.root / "thesis.txt").read_text() == "years" and installation.enrolled == []


@pytest.mark.parametrize(
    "command", [["executor", "list"], ["job", "list"], ["init"], ["audit", "verify"], ["agent", "list"]]
)
def test_what_needs_the_control_plane_says_where_to_run_it(installation, home, command):
    assert join(home, installation.token())[0] == 0
    done = CliRunner().invoke(app, [*command, "--home", str(home.root)])
    assert isinstance(done.exception, HiveError) and exit_code_of(done.exception) == 1
    assert installation.url in done.exception.message
    assert "the machine where that installation was started" in done.exception.message


def test_status_of_a_joined_home_says_where_it_belongs(installation, home):
    assert join(home, installation.token())[0] == 0
    done = CliRunner().invoke(app, ["status", "--json", "--home", str(home.root)])
    assert done.exit_code == 3
    found = json.loads(done.output)
    assert found["joined"]["http"] == installation.url and found["joined"]["name"] == NAME
    assert found["state"] == "stopped"


def test_status_of_a_joined_home_names_its_port_of_models_only_while_something_runs(installation, home):
    assert join(home, installation.token())[0] == 0
    command = ["status", "--home", str(home.root)]
    line = f"http://127.0.0.1:{home.ports()['http']}/v1"
    assert line not in CliRunner().invoke(app, command).output
    with home.locked():
        assert line in CliRunner().invoke(app, command).output


def test_that_only_counts_are_kept_can_be_taken_back_on_a_joined_machine(installation, home):
    assert join(home, installation.token())[0] == 0
    kept = [checked(home, Wishes(counts_only=wish)).counts_only for wish in (None, True, None, False)]
    assert kept == [False, True, True, False]


@pytest.mark.parametrize("option", [["--executors", "2"], ["--no-public"]])
def test_up_of_a_joined_home_refuses_what_only_an_installation_has(installation, home, option):
    assert join(home, installation.token())[0] == 0
    done = CliRunner().invoke(app, ["up", *option, "--home", str(home.root)])
    assert done.exit_code == 1 and "expected an installation of its own" in done.stderr


def test_the_context_for_joining_is_strict(certified):
    from hive_cli.joining import _context

    context = _context(certified.ca_file.read_text())
    assert context.verify_mode == ssl.CERT_REQUIRED and context.check_hostname
    assert len(context.get_ca_certs()) == 1


def test_of_two_who_join_into_one_folder_neither_clears_away_what_the_other_has(installation, home):
    with home.locked():
        (home.root / "half").write_text("of the other")
        code, said = join(home, installation.token())
    assert code == 2 and "not empty" in said
    assert (home.root / "half").read_text() == "of the other" and installation.enrolled == []


def doctor(home):
    """Return what `hive doctor` says about a device, by check."""
    return {finding.check: finding for finding in (_device(home), _reach(home))}


def test_doctor_says_whether_the_installation_answers_a_device(installation, home):
    assert join(home, installation.token())[0] == 0
    found = doctor(home)
    assert found["device"].verdict == "ok" and installation.url in found["device"].text
    assert found["reach"].verdict == "ok" and "s apart" in found["reach"].text
    installation.ahead_s = 3600
    assert doctor(home)["reach"].verdict == "fail" and "behind" in doctor(home)["reach"].text
    gone = msgspec.structs.replace(home.joined(), gateway=installation.url.rsplit(":", 1)[0] + f":{free_port()}")
    write_config(home.joined_file, gone)
    away = doctor(home)["reach"]
    assert away.verdict == "fail" and "cannot be reached" in away.text
    home.credentials_file.chmod(0o644)
    assert doctor(home)["device"].verdict == "fail"
