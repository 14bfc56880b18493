"""Fingerprints: the same for what failed in the same way, and others for what did not."""

import re
import string
import uuid

import pytest
from hive_common.kernel.fingerprints import SHOWN_CHARACTERS_MAX, fingerprint_of, normalised
from hypothesis import given
from hypothesis import strategies as st

OF_TYPES = ("object", "objects", "type")
WORD = st.text(string.ascii_lowercase, min_size=2, max_size=9).filter(lambda word: word not in OF_TYPES)
WORDS = st.lists(WORD, min_size=1, max_size=6).map(" ".join)
PLAIN = string.ascii_letters + string.digits
TYPES = re.compile("int|float|bool|str|bytes|bytearray|memoryview|list|tuple|dict|set|frozenset|nonetype", re.I)


def texts(characters):
    return st.text(characters, max_size=20).filter(lambda text: not TYPES.fullmatch(text))


VARYING = {
    "number": st.integers(0, 10**12).map(str) | st.floats(0, 1e9, allow_nan=False).map(str),
    "id": st.uuids().map(str),
    "digest": st.binary(min_size=32, max_size=32).map(lambda data: "sha256:" + data.hex()),
    "path": st.lists(st.text(PLAIN, min_size=1, max_size=8), min_size=1).map(lambda parts: "/" + "/".join(parts)),
    "value": texts(PLAIN + " /:-").map(lambda text: f"'{text}'"),
    "double": texts(PLAIN + " /:-'").map(lambda text: f'"{text}"'),
    "address": st.ip_addresses(v=4).map(str),
    "url": st.text(PLAIN, min_size=1, max_size=12).map(lambda path: f"https://host.example/{path}?a={path}"),
}


@pytest.mark.parametrize("kind", VARYING)
@given(data=st.data(), before=WORDS, after=WORDS)
def test_what_varies_does_not_count(kind, data, before, after):
    one, other = data.draw(VARYING[kind]), data.draw(VARYING[kind])
    found = {fingerprint_of("a@1.0.0", "agent_error", f"{before} {value} {after}") for value in (one, other)}
    assert len(found) == 1, (normalised(one), normalised(other))
    assert before in normalised(f"{before} {one} {after}")


@given(message=WORDS, other=WORDS)
def test_other_words_another_agent_and_another_code_count(message, other):
    found = {
        fingerprint_of("a@1.0.0", "agent_error", message),
        fingerprint_of("b@1.0.0", "agent_error", message),
        fingerprint_of("a@1.0.0", "timeout", message),
        fingerprint_of("a@1.0.0", "agent_error", f"{message} {other}"),
    }
    assert len(found) == 4
    assert fingerprint_of("a@2.0.0", "timeout", message) == fingerprint_of("a", "timeout", message)


@given(st.text())
def test_any_text_has_a_bounded_one_line_form_without_digits(message):
    shown = normalised(message)
    assert len(shown) <= SHOWN_CHARACTERS_MAX
    assert not any(char.isdecimal() for char in shown)
    assert len(shown.splitlines()) <= 1 or any(mark in shown for mark in "\x85\u2028\u2029")
    assert len(fingerprint_of("a", "b", message)) == 16 == len(fingerprint_of("a", "b", message + "\ud800"))


@given(WORDS, WORDS)
def test_where_one_part_ends_and_the_next_begins_counts(one, other):
    assert fingerprint_of(one + other, "", "") != fingerprint_of(one, other, "")


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("KeyError: 'user_17' in /home/a/x.py line 3", "KeyError: <value> in <path> line <n>"),
        (f"task {uuid.UUID(int=7)} took 1.5e3 s", "task <id> took <n> s"),
        ("can't open it; it isn't there", "can't open it; it isn't there"),
        ("connect to 10.0.0.1:443 failed", "connect to <address> failed"),
        ("<object at 0x7f00aa12>", "<object at <address>>"),
        ("commit 3f2a91c was not decade old", "commit <digest> was not decade old"),
        ("two\n\tlines  and\x00more", "two lines and more"),
        ("expected $.items[3].name: a string", "expected $.items[<n>].name: a string"),
        ("'str' object has no attribute 'x'", "'str' object has no attribute <value>"),
        ("'shop.Cart' objects are not ordered", "'shop.Cart' objects are not ordered"),
        (
            "unsupported operand type(s) for +: 'int' and 'str'",
            "unsupported operand type(s) for +: 'int' and 'str'",
        ),
        ('can only concatenate str (not "int") to str', 'can only concatenate str (not "int") to str'),
        ("5 is not of type 'string'", "<n> is not of type 'string'"),
        ("Expected `str | null`, got `int` - at `$.name`", "Expected `str | null`, got `int` - at <value>"),
        ("KeyError: 'strange'", "KeyError: <value>"),
    ],
)
def test_messages_as_they_come(message, shown):
    assert normalised(message) == shown


def test_the_same_failure_of_another_type_is_another():
    messages = [f"'{kind}' object has no attribute '{name}'" for kind in ("str", "int", "Cart") for name in "xy"]
    found = [fingerprint_of("a", "agent_error", message) for message in messages]
    assert found[::2] == found[1::2] and len({*found}) == 3


@pytest.mark.parametrize(
    "unit", ["a", "'", '"', "a.", "a@", "/a", "1", "0x", "[:", "a:\\", "f1", "'a", "'a' ", "'int'"]
)
def test_long_messages_cost_little(unit):
    # A pattern that tries everything again from each place would not come back from a message like this.
    assert len(normalised(unit * 1_000_000)) <= SHOWN_CHARACTERS_MAX
