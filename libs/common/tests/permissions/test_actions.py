"""Actions have one hash exactly where they are the same, and are shown without what deceives or moves."""

import json
import unicodedata

import msgspec
import pytest
from hive_common.contracts.events import KvWrite
from hive_common.contracts.limits import APPROVAL_ACTION_BYTES_MAX
from hive_common.contracts.permissions import HttpPermission, Permissions
from hive_common.kernel.errors import InvalidArgument, PermissionDenied
from hive_common.permissions import actions, shown
from hive_common.permissions.actions import Action, check_approved, read_action
from hypothesis import given
from hypothesis import strategies as st

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
NAME = st.sampled_from(("a@1", "b@1", "a@2"))
TOKEN = st.sampled_from(("Accept", "accept", "Authorization", "X-Key", "Content-Type"))
ASCII = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


def raw(value):
    return msgspec.Raw(msgspec.json.encode(value))


def kv_write(agent, namespace, key, value):
    return actions.kv_write_action(agent, namespace, KvWrite(key, msgspec.UNSET if value is None else raw(value)))


def model(agent, endpoint, name, body, counts_only):
    return actions.model_action(
        agent, endpoint, name, {key: raw(value) for key, value in body.items()}, counts_only
    )


def http(agent, method, path, headers, body):
    return actions.http_action(agent, method, f"https://a.test/{path}", headers, body)


CALLS = st.one_of(
    st.tuples(
        st.just(http),
        NAME,
        st.sampled_from(("GET", "POST")),
        ASCII,
        st.lists(st.tuples(TOKEN, ASCII), max_size=3, unique_by=lambda one: one[0].lower()),
        st.binary(max_size=20),
    ),
    st.tuples(st.just(actions.kv_read_action), NAME, TEXT, TEXT),
    st.tuples(st.just(actions.kv_list_action), NAME, TEXT, TEXT),
    st.tuples(st.just(kv_write), NAME, TEXT, TEXT, JSON),
    st.tuples(
        st.just(model), NAME, st.sampled_from(("chat", "completions")), TEXT,
        st.dictionaries(st.sampled_from(("messages", "prompt", "n", "seed")), JSON, max_size=3), st.booleans(),
    ),
    st.tuples(st.just(actions.fork_action), NAME, NAME, st.lists(JSON.map(msgspec.json.encode), max_size=3)),
    st.tuples(st.just(actions.scratch_action), NAME, st.integers(1, 2**40)),
)  # fmt: skip


def meaning(call):
    """Return what a call means, by another way than the canonical text: as a value that can be compared."""
    make, *rest = call
    if make is http:
        agent, method, path, headers, body = rest
        rest = [agent, method, path, sorted((name.lower(), value) for name, value in headers), body.hex()]
    if make is kv_write and rest[-1] is None:
        return ("delete", *rest[:-1])
    plain = json.dumps(rest, sort_keys=True, default=lambda one: one.decode())
    return make.__name__, plain


@given(CALLS.flatmap(lambda one: st.tuples(st.just(one), st.just(one) | CALLS)))
def test_two_actions_have_one_hash_exactly_where_they_are_the_same(calls):
    first, second = calls
    one, other = (make(*rest) for make, *rest in (first, second))
    same = meaning(first) == meaning(second)
    assert (one.hash == other.hash) == (one.text == other.text) == same


@given(CALLS)
def test_an_action_comes_through_and_its_text_has_one_form(call):
    make, *rest = call
    action = make(*rest)
    assert len(action.text.encode()) <= APPROVAL_ACTION_BYTES_MAX
    assert read_action(action.text) == action
    assert make(*rest).text == action.text
    spaced = json.dumps(json.loads(action.text), ensure_ascii=False)
    if spaced != action.text:
        with pytest.raises(InvalidArgument):
            read_action(spaced)


@given(CALLS, st.sets(st.text("0123456789abcdef", min_size=64, max_size=64), max_size=3))
def test_what_asks_goes_only_with_the_hash_of_just_this(call, approved):
    make, *rest = call
    action = make(*rest)
    asking = Permissions(http=HttpPermission(("a.test",)), asks=(action.permission,))
    check_approved(asking, (*approved, action.hash), action)
    check_approved(Permissions(), (), action)
    with pytest.raises(PermissionDenied) as error:
        check_approved(asking, approved - {action.hash}, action)
    assert error.value.fields["permission"] == action.permission


@pytest.mark.parametrize(
    "text",
    [
        "", "null", "[]", "{}", "x" * (APPROVAL_ACTION_BYTES_MAX + 1),
        '{"agent":"a","operation":"o","permission":"nothing","what":{}}',
        '{"agent":1,"operation":"o","permission":"kv","what":{}}',
        '{"agent":"a","agent":"b","operation":"o","permission":"kv","what":{}}',
        '{"agent":"a","operation":"o","permission":"kv","what":{},"more":1}',
        '{"operation":"o","agent":"a","permission":"kv","what":{}}',
        '{"agent":"a","operation":"\\u006f","permission":"kv","what":{}}',
        '{"agent":"a","operation":"o","permission":"kv","what":' + "[" * 3_000 + "]" * 3_000 + "}",
    ],
)  # fmt: skip
def test_what_is_no_action_or_not_in_its_form_is_refused(text):
    with pytest.raises(InvalidArgument):
        read_action(text)


def test_secrets_in_headers_and_prompts_that_must_not_be_kept_are_in_no_action():
    sent = http("a@1", "POST", "", [("Authorization", "Bearer secret"), ("Accept", "text/plain")], b"")
    assert "secret" not in sent.text and "text/plain" in sent.text
    kept, counted = (
        model("a@1", "chat", "m", {"messages": "secret"}, counts_only) for counts_only in (False, True)
    )
    assert "secret" in kept.text and "secret" not in counted.text


def test_the_limits_that_a_device_lowers_are_not_part_of_a_model_call():
    bodies = ({"prompt": "x", "max_tokens": 5}, {"prompt": "x", "max_tokens": 4, "stream": False, "model": "m"})
    first, second = (model("a@1", "chat", "m", body, False) for body in bodies)
    assert first == second


# --- what a person sees ---

BIDI = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c"
CONTROLS = "".join(chr(code) for code in (*range(32), 127, *range(128, 160)))
ESCAPES = (
    "\x1b[31m",
    "\x1b[2K",
    "\x1b]0;title\x07",
    "\x1b]8;;http://x\x1b\\",
    "\x9b1A",
    "\x1bPq\x1b\\",
    "\x1bc",
    "\x1b",
)


@given(st.lists(st.text(max_size=20) | st.sampled_from(BIDI + CONTROLS) | st.sampled_from(ESCAPES), max_size=20))
def test_what_is_shown_has_nothing_that_deceives_or_moves(parts):
    seen = shown.plain("".join(parts))
    assert not set(seen) & set(BIDI + CONTROLS)
    assert all(
        unicodedata.category(one)[0] != "C" and unicodedata.category(one) not in ("Zl", "Zp") for one in seen
    )


@given(CALLS)
def test_every_line_of_an_action_is_plain_and_bounded(call):
    make, *rest = call
    lines = shown.lines_of(make(*rest))
    assert 3 <= len(lines) <= shown.LINES_MAX + 1
    for line in lines:
        assert line.isprintable() and len(line) < 2 * shown.LINE_CHARACTERS_MAX + 200


def test_a_long_text_is_cut_and_says_by_how_much():
    seen = shown.plain("x" * (shown.LINE_CHARACTERS_MAX + 5))
    assert seen.startswith("x" * shown.LINE_CHARACTERS_MAX + "… 5 more bytes, sha256 ")


def test_escapes_go_with_what_they_say():
    assert shown.plain("pay\u202e1000\u202c\x1b[2K\r0\x1b]0;title\x07!") == "pay1000 0!"


def test_many_lines_are_cut_and_say_so():
    action = actions.http_action("a@1", "GET", "https://a.test/", [(f"x-{n}", "") for n in range(100)], b"")
    lines = shown.lines_of(action)
    assert lines[-1] == f"… {4 + 101 - shown.LINES_MAX} more lines, sha256 of all {action.hash}"
    assert isinstance(action, Action)
