"""Agents in an OCI registry that is not ours: Debian's docker-registry, and skopeo as somebody else's tool."""

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hive_cli.commands.agent_share import pull_from, push_to
from hive_cli.home import Home
from hive_cli.oci import parse_reference
from hive_cli.supervisor import ca
from hive_common.artifacts.keys import public_hex
from hive_common.artifacts.package import AgentPackage, pack
from hive_common.artifacts.signing import SIGNATURE, SIGNER, tag_of
from hive_common.contracts.values import digest_of
from hive_common.kernel.errors import (
    Conflict,
    HiveError,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)
from hive_common.ops.ports import free_port

KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
OTHER = Ed25519PrivateKey.from_private_bytes(b"o" * 32)
OURS, THEIRS = public_hex(KEY), public_hex(OTHER)
MANIFEST = """
apiVersion: hive/v1
kind: Agent
name: square
version: 1.0.0+build.5
runtime: python
entry: agent.py
"""


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed; fix: apt-get install --no-install-recommends {name}")
    return found


class OciRegistry:
    """A docker-registry on a free port of the loopback."""

    def __init__(self, folder: Path, http: str = "", auth: str = "") -> None:
        self.folder = folder
        folder.mkdir()
        self.address = f"127.0.0.1:{free_port()}"
        config = folder / "config.yml"
        config.write_text(
            f"version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {folder}/data}}}}\n"
            f'http: {{addr: "{self.address}"{http}}}\n{auth}'
        )
        with (folder / "log").open("wb") as log:
            command = [tool("docker-registry"), "serve", str(config)]
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        until = time.monotonic() + 60
        while not self._answers():
            assert self._process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < until, (folder / "log").read_text()
            time.sleep(0.02)

    def _answers(self) -> bool:
        try:
            with requests.Session() as session:
                session.trust_env = False
                session.get(f"http://{self.address}/v2/", timeout=5)
        except requests.RequestException:
            return False
        return True

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()

    def stored(self, digest: str) -> Path:
        name = digest.removeprefix("sha256:")
        return self.folder / "data/docker/registry/v2/blobs/sha256" / name[:2] / name / "data"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OciRegistry]:
    made = OciRegistry(tmp_path_factory.mktemp("oci") / "registry")
    yield made
    made.stop()


@pytest.fixture
def agent(tmp_path: Path) -> Callable[..., tuple[Path, AgentPackage]]:
    def make(source: str = "def run(input): return {}\n") -> tuple[Path, AgentPackage]:
        folder = tmp_path / f"agent-{abs(hash(source))}"
        folder.mkdir(exist_ok=True)
        (folder / "manifest.yaml").write_text(MANIFEST)
        (folder / "agent.py").write_text(source)
        return folder, pack(folder)

    return make


@pytest.fixture
def repository(registry: OciRegistry, request: pytest.FixtureRequest) -> str:
    """A repository of its own for each test."""
    return f"{registry.address}/tests/{digest_of(request.node.name.encode())[7:19]}"


def push(to: str, made: tuple[Path, AgentPackage], key: Ed25519PrivateKey = KEY, **how: Any) -> dict[str, Any]:
    return push_to(to, [made], key, how.get("plain_http", False), how.get("ca_file"))


def pull(reference: str, *trusted: str, **how: Any) -> tuple[AgentPackage, Any]:
    return pull_from(reference, trusted, how.get("plain_http", False), how.get("ca_file"))


def skopeo(*arguments: str) -> bytes:
    return subprocess.run([tool("skopeo"), *arguments], check=True, capture_output=True).stdout


# --- there and back ------------------------------------------------------------------------------------------


def test_an_agent_comes_back_as_it_went_with_its_signature(repository, agent) -> None:
    made = agent()
    pushed = push(repository, made)
    assert pushed["reference"] == f"{repository}:1.0.0_build.5"
    for reference in (pushed["reference"], f"{repository}@{pushed['digest']}"):
        package, signature = pull(reference, OURS)
        assert package == made[1]
        assert signature.signer == OURS
    assert push(repository, made) == pushed, "the same again is no error"


def test_what_is_signed_by_several_comes_with_the_signature_that_is_trusted(repository, agent) -> None:
    made = agent()
    push(f"{repository}:1", made)
    push(f"{repository}:1", made, OTHER)
    assert pull(f"{repository}:1", OURS)[1].signer == OURS
    assert pull(f"{repository}:1", THEIRS)[1].signer == THEIRS


def test_the_key_of_a_stranger_is_named_with_the_remedy(repository, agent) -> None:
    push(f"{repository}:1", agent())
    with pytest.raises(PermissionDenied, match=rf"hive agent key trust {OURS} --name"):
        pull(f"{repository}:1", THEIRS)


def test_a_tag_of_something_else_is_not_moved(repository, agent) -> None:
    pushed = push(f"{repository}:1", agent())
    with pytest.raises(Conflict, match=r"versions are immutable; raise the version in .*manifest\.yaml"):
        push(f"{repository}:1", agent("def run(input): return {'n': 2}\n"))
    assert pull(f"{repository}:1", OURS)[0].digest == pushed["digest"]


def test_whatever_byte_is_flipped_in_the_registry_nothing_is_taken(registry, repository, agent) -> None:
    made = agent()
    push(f"{repository}:1", made)
    _, signature = pull(f"{repository}:1", OURS)
    config = json.loads(signature.blobs[signature.digest])["config"]["digest"]
    blobs = made[1].blobs | {digest: data for digest, data in signature.blobs.items() if digest != config}
    for digest, data in blobs.items():
        file = registry.stored(digest)
        for place in (0, len(data) // 2, len(data) - 1):
            file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            try:
                with pytest.raises(HiveError):
                    pull(f"{repository}:1", OURS)
            finally:
                file.write_bytes(data)
    assert pull(f"{repository}:1", OURS)[0] == made[1]


# --- somebody else's tools -----------------------------------------------------------------------------------


def test_skopeo_shows_the_very_manifest(repository, agent) -> None:
    made = agent()
    pushed = push(f"{repository}:1", made)
    raw = skopeo("inspect", "--raw", "--tls-verify=false", f"docker://{repository}:1")
    assert raw == made[1].blobs[pushed["digest"]]
    assert json.loads(raw)["artifactType"] == "application/vnd.hivefabric.agent.v1"


def test_what_skopeo_copied_can_be_pulled(repository, agent) -> None:
    made = agent()
    pushed = push(f"{repository}:1", made)
    tag = tag_of(pushed["digest"])
    flags = ("--src-tls-verify=false", "--dest-tls-verify=false")
    skopeo("copy", *flags, f"docker://{repository}:1", f"docker://{repository}-copy:1")
    with pytest.raises(InvalidArgument, match=r"is not signed: there is no tag sha256-"):
        pull(f"{repository}-copy:1", OURS)
    skopeo("copy", *flags, f"docker://{repository}:{tag}", f"docker://{repository}-copy:{tag}")
    assert pull(f"{repository}-copy:1", OURS)[0] == made[1]


def test_a_signature_as_cosign_makes_it_is_taken(registry, repository, agent) -> None:
    """cosign says nothing of the key, and has a config and annotations of its own."""
    made = agent()
    pushed = push(f"{repository}:1", made)
    tag = tag_of(pushed["digest"])
    url = f"http://{registry.address}/v2/{repository.partition('/')[2]}/manifests/{tag}"
    with requests.Session() as session:
        session.trust_env = False
        manifest = session.get(url, headers={"Accept": "application/vnd.oci.image.manifest.v1+json"}).json()
        (layer,) = manifest["layers"]
        del layer["annotations"][SIGNER]
        layer["annotations"]["dev.sigstore.cosign/bundle"] = "{}"
        forged = layer | {"annotations": {SIGNATURE: "AAAA"}}
        broken = layer | {"annotations": {SIGNATURE: "?"}}
        manifest |= {"layers": [broken, forged, layer]}
        headers = {"Content-Type": "application/vnd.oci.image.manifest.v1+json"}
        assert session.put(url, data=json.dumps(manifest), headers=headers).status_code == 201
        assert pull(f"{repository}:1", THEIRS, OURS)[1].signer == OURS
        with pytest.raises(InvalidArgument, match=r"no signature of it is good .* \(hive agent key list\)"):
            pull(f"{repository}:1", THEIRS)
        manifest["layers"] = [forged]
        assert session.put(url, data=json.dumps(manifest), headers=headers).status_code == 201
    with pytest.raises(InvalidArgument, match="no signature of it is good"):
        pull(f"{repository}:1", OURS)


# --- TLS, credentials, errors --------------------------------------------------------------------------------


def test_tls_is_checked_against_the_ca_that_is_named(tmp_path: Path, agent) -> None:
    homes = [Home(tmp_path / name) for name in ("home", "other")]
    for home in homes:
        home.secrets_dir.mkdir(parents=True)
        home.tls_dir.mkdir()
        ca.ensure_certificates(home, "127.0.0.1")
    home, other = homes
    pair = ca.files(home, ca.SERVERS[0])
    server = OciRegistry(tmp_path / "registry", f", tls: {{certificate: {pair.certificate}, key: {pair.key}}}")
    try:
        made, reference = agent(), f"{server.address}/square:1"
        push(reference, made, ca_file=home.ca_file)
        assert pull(reference, OURS, ca_file=home.ca_file)[0] == made[1]
        with pytest.raises(Unavailable, match=r"no certificate that is trusted here; .*--ca-file FILE"):
            pull(reference, OURS, ca_file=other.ca_file)
        with pytest.raises(HiveError):
            pull(reference, OURS, plain_http=True)
        with pytest.raises(InvalidArgument, match=r"nowhere\.pem: there is no such file"):
            pull(reference, OURS, ca_file=tmp_path / "nowhere.pem")
    finally:
        server.stop()


def test_a_registry_that_wants_credentials_says_how_to_log_in(tmp_path: Path, agent, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "htpasswd").write_text("ada:$2y$05$" + "x" * 53 + "\n")
    auth = f"auth: {{htpasswd: {{realm: agents, path: {tmp_path}/htpasswd}}}}\n"
    server = OciRegistry(tmp_path / "registry", auth=auth)
    try:
        for call in (lambda: push(f"{server.address}/square:1", agent()), lambda: pull(f"{server.address}/x:1")):
            with pytest.raises(Unauthenticated, match=rf"docker login {server.address}"):
                call()
    finally:
        server.stop()


def test_what_is_not_there_is_said(registry, agent) -> None:
    with pytest.raises(NotFound, match=r"the registry answers 404: .*unknown"):
        pull(f"{registry.address}/nothing:1", OURS)
    nobody = free_port()
    for call in (lambda: push(f"127.0.0.1:{nobody}/x:1", agent()), lambda: pull(f"127.0.0.1:{nobody}/x:1")):
        with pytest.raises(Unavailable, match=rf"http://127\.0\.0\.1:{nobody} cannot be reached: .*refused"):
            call()


def test_one_agent_for_one_repository(agent) -> None:
    with pytest.raises(InvalidArgument, match="got 2 folders; expected one agent"):
        push_to("localhost:1/x", [agent(), agent()], KEY, False, None)
    with pytest.raises(InvalidArgument, match="names a digest"):
        push(f"localhost:1/x@sha256:{'0' * 64}", agent())


# --- references ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("localhost/a", ("localhost", "a", "", "", "localhost")),
        ("localhost:5000/a/b-c:1.0", ("localhost:5000", "a/b-c", "1.0", "", "localhost")),
        ("[::1]:5000/a:x", ("[::1]:5000", "a", "x", "", "::1")),
        (f"r.example/a@sha256:{'0' * 64}", ("r.example", "a", "", "sha256:" + "0" * 64, "r.example")),
    ],
)
def test_references_are_read(text: str, parts: tuple[str, ...]) -> None:
    found = parse_reference(text)
    assert (*found, found.host) == parts
    assert str(found) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", "a", "a:b", "square/x", "r.example/", "r.example/A", "r.example/a:", "r.example/a@sha256:0"),
        *(
            "https://r.example/a",
            "r.example/../a",
            "r.example/a b",
            "r.example:x/a",
            "u@r.example/a",
            "r.example/a?b",
        ),
    ],
)
def test_what_is_no_reference_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"expected HOST\[:PORT\]/REPOSITORY"):
        parse_reference(text)
