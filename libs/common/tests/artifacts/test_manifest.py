import pytest
from hive_common.artifacts.manifest import AgentManifest, Resources, from_json, manifest_json, parse_manifest
from hive_common.contracts.limits import FUEL_DEFAULT, MEMORY_DEFAULT_BYTES, TIMEOUT_DEFAULT_MS
from hive_common.contracts.permissions import NONE, ModelPermission, Permissions
from hive_common.kernel.errors import InvalidArgument, PayloadTooLarge
from hypothesis import given
from hypothesis import strategies as st

MANIFEST = """\
apiVersion: hive/v1
kind: Agent
name: square
version: 1.0.0
runtime: python
entry: agent.py
input: {type: object, required: [n], properties: {n: {type: integer}}}
output: {type: object}
resources: {memory: 64Mi, timeout: 10s, fuel: 1000}
permissions: {}
description: squares a number
"""


def changed(old: str, new: str) -> bytes:
    assert old in MANIFEST
    return MANIFEST.replace(old, new).encode()


def model(asked: str) -> str:
    return f"permissions: {{model: {{{asked}}}}}"


def refused(data: bytes) -> InvalidArgument:
    with pytest.raises(InvalidArgument) as error:
        parse_manifest(data, "square/manifest.yaml")
    assert error.value.message.startswith("square/manifest.yaml: ")
    return error.value


def test_the_documented_manifest_is_read() -> None:
    manifest = parse_manifest(MANIFEST.encode())
    assert manifest == AgentManifest(
        name="square",
        version="1.0.0",
        runtime="python",
        entry="agent.py",
        input={"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}},
        output={"type": "object"},
        resources=Resources(memory_bytes=64 << 20, timeout_ms=10_000, fuel=1000),
        description="squares a number",
    )
    assert manifest.reference == "square@1.0.0"


def test_limits_left_out_get_the_defaults() -> None:
    manifest = parse_manifest(changed("resources: {memory: 64Mi, timeout: 10s, fuel: 1000}\n", ""))
    assert manifest.resources == Resources(MEMORY_DEFAULT_BYTES, TIMEOUT_DEFAULT_MS, FUEL_DEFAULT)


@pytest.mark.parametrize(
    ("old", "new", "path", "says"),
    [
        ("name: square", "name: Square", "name", "a-z"),
        ("name: square", f"name: {'a' * 64}", "name", "63"),
        ("name: square", "nam: square", "nam", "`name`"),
        ("name: square\n", "", "", "`name`"),
        ("version: 1.0.0", "version: 1.0", "version", "quotes"),
        ("version: 1.0.0", "version: '1.0'", "version", "1.0.0"),
        ("version: 1.0.0", "version: 01.0.0", "version", "semantic"),
        ("hive/v1", "hive/v2", "apiVersion", "hive/v1"),
        ("kind: Agent", "kind: Job", "kind", "Agent"),
        ("runtime: python", "runtime: docker", "runtime", "component"),
        ("entry: agent.py", "entry: ../agent.py", "entry", "inside"),
        ("entry: agent.py", "entry: /agent.py", "entry", "inside"),
        ("entry: agent.py", "entry: .agent.py", "entry", "inside"),
        ("entry: agent.py", "entry: 'a\\agent.py'", "entry", "inside"),
        ("entry: agent.py", "entry: agent.wasm", "entry", ".py"),
        ("type: integer", "type: intger", "input.properties.n.type", "JSON Schema"),
        ("type: integer", "pattern: '('", "input.properties.n.pattern", "JSON Schema"),
        ("type: integer", "$ref: 'http://127.0.0.1/x'", "input.properties.n.$ref", "leaves the schema"),
        ("type: integer", "$ref: '#/nowhere'", "input.properties.n.$ref", "points to nothing"),
        ("output: {type: object}", "output: {$ref: '#'}", "output.$ref", "back to itself"),
        (
            "output: {type: object}",
            "output: {$schema: 'http://json-schema.org/draft-07/schema#'}",
            "output.$schema",
            "2020",
        ),
        ("output: {type: object}", "output: [1]", "output", "a mapping"),
        ("memory: 64Mi", "memory: 64MB", "resources.memory", "64Mi"),
        ("memory: 64Mi", "memory: 5Gi", "resources.memory", "4294967296"),
        ("memory: 64Mi", "memory: 1Ki", "resources.memory", "65536"),
        ("memory: 64Mi", "memroy: 64Mi", "resources.memroy", "`memory`"),
        ("timeout: 10s", "timeout: 10", "resources.timeout", "text"),
        ("timeout: 10s", "timeout: 0s", "resources.timeout", "1 to"),
        ("timeout: 10s", "timeout: 25h", "resources.timeout", "86400000"),
        ("fuel: 1000", "fuel: 0", "resources.fuel", "1 to"),
        ("fuel: 1000", "fuel: 1.5", "resources.fuel", "a whole number"),
        ("permissions: {}", "permissions: {htpp: []}", "permissions.htpp", "`http`"),
        ("permissions: {}", "permissions: {http: [example.org]}", "permissions.http", "hosts"),
        ("permissions: {}", "permissions: [http]", "permissions", "a mapping"),
        ("permissions: {}", "permissions: {model: [small]}", "permissions.model", "max_tokens"),
        ("permissions: {}", model("names: [small]"), "permissions.model", "`max_tokens`"),
        ("permissions: {}", model("name: [small], max_tokens: 1"), "permissions.model.name", "`names`"),
        ("permissions: {}", model("names: small, max_tokens: 1"), "permissions.model.names", "a list"),
        ("permissions: {}", model("names: [], max_tokens: 1"), "permissions.model.names", "`*`"),
        ("permissions: {}", model("names: [a, a], max_tokens: 1"), "permissions.model.names", "different"),
        ("permissions: {}", model("names: [''], max_tokens: 1"), "permissions.model.names[0]", "`*`"),
        ("permissions: {}", model("names: [a], max_tokens: 0"), "permissions.model.max_tokens", "1 to"),
        ("permissions: {}", model("names: [a], max_tokens: 1e9"), "permissions.model.max_tokens", "a whole number"),
        ("permissions: {}", model("names: [a], max_tokens: 1, pin: own"), "permissions.model.pin", "own-devices"),
        ("description: squares a number", "description: [1]", "description", "text"),
    ],
)
def test_a_broken_rule_is_named_with_its_path_and_what_was_expected(
    old: str, new: str, path: str, says: str
) -> None:
    error = refused(changed(old, new))
    assert error.fields["path"] == path
    assert error.fields["file"] == "square/manifest.yaml"
    assert says in error.message


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not a mapping"),
        (b"- 1", "not a mapping"),
        (b"a: [", "line 1"),
        (b"\xff", "UTF-8"),
        (b"a: 1\na: 2", "line 2, column 1: the key 'a' stands twice"),
        (b"a: &x [1]\nb: *x", "aliases"),
        (b"1: a", "not a string"),
        (b"a: .nan", "no JSON number"),
        (b"a: !!binary aGk=", "bytes"),
        (b"a: !!python/object/apply:os.system [true]", "could not determine a constructor"),
        (b"a: " + b"[" * 100 + b"]" * 100, "nested deeper"),
        (b"a: " + b"9" * 30, "64 bits"),
        (b"a: 1\x00", "not YAML"),
    ],
)
def test_what_is_not_a_plain_yaml_mapping_is_refused(data: bytes, says: str) -> None:
    assert says in refused(data).message


def test_a_manifest_beyond_the_limit_is_not_parsed() -> None:
    with pytest.raises(PayloadTooLarge):
        parse_manifest(b"#" * 100_000)


def test_dates_stay_text() -> None:
    assert parse_manifest(changed("squares a number", "2026-11-25")).description == "2026-11-25"


def test_recursive_schemas_that_go_down_into_the_value_are_taken() -> None:
    tree = "output: {type: object, properties: {children: {type: array, items: {$ref: '#'}}}}"
    assert parse_manifest(changed("output: {type: object}", tree)).output["properties"]


@pytest.mark.parametrize("version", ["0.0.0", "1.2.3-rc.1", "1.2.3-0a.b+build.5", "10.20.30"])
def test_semantic_versions_are_taken(version: str) -> None:
    assert parse_manifest(changed("1.0.0", version)).version == version


@pytest.mark.parametrize(
    "version", ["1.0.0-01", "1.0.0-", "1.0.0+", "v1.0.0", "1.0.0 ", "1.0.٣", "1.0.0-" + "a" * 200]
)
def test_other_versions_are_not(version: str) -> None:
    assert refused(changed("version: 1.0.0", f"version: '{version}'")).fields["path"] == "version"


def test_what_an_agent_asks_for_is_read() -> None:
    asked = parse_manifest(
        changed("permissions: {}", model("names: [small, '*'], max_tokens: 500, pin: pool"))
    ).asked
    assert asked == Permissions(model=ModelPermission(("small", "*"), 500, "pool"))
    assert parse_manifest(MANIFEST.encode()).asked == NONE


@pytest.mark.parametrize(
    "permissions", ["permissions: {}", "permissions: {model: {names: [small], max_tokens: 9}}"]
)
def test_the_travelling_form_reads_back_as_the_same_manifest(permissions: str) -> None:
    manifest = parse_manifest(changed("permissions: {}", permissions))
    assert from_json(manifest_json(manifest)) == manifest


def test_key_order_in_the_file_does_not_change_the_bytes() -> None:
    lines = MANIFEST.splitlines(keepends=True)
    assert manifest_json(parse_manifest("".join(reversed(lines)).encode())) == manifest_json(
        parse_manifest(MANIFEST.encode())
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"agent.py"', b'"../agent.py"'),
        (b'"fuel":1000', b'"fuel":-1'),
        (b'"permissions":{}', b'"permissions":{"kv":{"a":1}}'),
        (b'"kind"', b'"kindd"'),
    ],
)
def test_the_travelling_form_is_checked_by_the_same_rules(old: bytes, new: bytes) -> None:
    data = manifest_json(parse_manifest(MANIFEST.encode()))
    assert old in data
    with pytest.raises(InvalidArgument):
        from_json(data.replace(old, new))


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_whatever_the_bytes_the_only_error_is_invalid_argument(data: bytes) -> None:
    for read in (parse_manifest, from_json):
        with pytest.raises(InvalidArgument):
            read(data, "x")
