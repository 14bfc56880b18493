import msgspec
import pytest
from hive_common.kernel.errors import InvalidArgument, PayloadTooLarge
from hive_scheduler.domain.jobfile import parse_job
from hypothesis import given
from hypothesis import strategies as st

SQUARES = {
    "apiVersion": "hive/v1",
    "kind": "Job",
    "name": "squares",
    "input": {"numbers": [1, 2, 3]},
    "limits": {"deadline": "60s", "fan_out": 1000},
    "tasks": [
        {
            "id": "square",
            "agent": "square@1.0.0",
            "fork": "${input.numbers}",
            "input": {"n": "${item}"},
            "timeout": "10s",
            "retry": {"max_attempts": 3, "backoff": "1s"},
        },
        {
            "id": "total",
            "needs": ["square"],
            "agent": "total@1.0.0",
            "input": {"squares": "${tasks.square.output}"},
        },
    ],
    "output": "${tasks.total.output}",
}


def changed(**changes):
    return msgspec.json.encode({**SQUARES, **changes})


def with_task(index, **changes):
    tasks = [dict(task) for task in SQUARES["tasks"]]
    tasks[index] |= changes
    return changed(tasks=tasks)


def test_the_example_is_read_whole():
    job = parse_job(msgspec.json.encode(SQUARES))
    assert (job.name, job.deadline_ms, job.fan_out, job.priority) == ("squares", 60_000, 1000, "normal")
    assert [step.id for step in job.steps] == ["square", "total"]
    square, total = job.steps
    assert square.fork.resolve({"input": {"numbers": [4]}, "tasks": {}}) == [4]
    assert (square.timeout_ms, square.retry.max_attempts, square.retry.backoff_ms) == (10_000, 3, 1_000)
    assert (total.fork, total.timeout_ms, total.retry.max_attempts) == (None, None, 1)
    assert total.input.steps == {"square"}
    assert job.agents == {"square@1.0.0", "total@1.0.0"}


def test_steps_come_in_an_order_in_which_needs_come_first():
    tasks = [SQUARES["tasks"][1], SQUARES["tasks"][0]]
    assert [step.id for step in parse_job(changed(tasks=tasks)).steps] == ["square", "total"]


def test_without_an_input_there_is_none_to_override():
    document = {key: value for key, value in SQUARES.items() if key != "input"}
    assert parse_job(msgspec.json.encode(document)).input is msgspec.UNSET


@pytest.mark.parametrize(
    ("document", "path", "words"),
    [
        (changed(kind="Agent"), "kind", "Agent"),
        (changed(apiVersion="hive/v9"), "apiVersion", "hive/v9"),
        (changed(colour="red"), "", "colour: unknown field"),
        (changed(name="No Good"), "name", "lower-case"),
        (changed(tasks=[]), "tasks", "1 to 1000"),
        (changed(priority="urgent"), "priority", "got 'urgent'; expected one of high, normal, low"),
        (
            with_task(0, join="best"),
            "tasks[0].join",
            "got 'best'; expected one of all, rank, vote, {rank: …}, {vote: …}, {integrator: …}",
        ),
        (changed(limits={"fan_out": 0}), "limits.fan_out", "1 to 100000"),
        (changed(limits={"deadline": "soon"}), "limits.deadline", "soon"),
        (changed(models={"pin": "mine"}), "models.pin", "own-devices, pool, region:<name> or any"),
        (changed(models={"pin": "region:"}), "models.pin", "region:"),
        (changed(models={"pni": "pool"}), "models", "expected `pin`"),
        (changed(limits={"deadline": "400d"}), "limits.deadline", ""),
        (changed(output="${tasks.totl.output}"), "output", "expected `total`"),
        (with_task(0, id="Square"), "tasks[0].id", "[a-z]"),
        (with_task(1, id="square"), "tasks[1].id", "differ"),
        (with_task(0, agent="square"), "tasks[0].agent", "name@version"),
        (with_task(0, agent=5), "tasks[0].agent", "expected text (put it in quotes)"),
        (with_task(0, timeout="ten"), "tasks[0].timeout", "ten"),
        (with_task(0, fork={"a": 1}), "tasks[0].fork", "a list"),
        (with_task(0, fork="numbers"), "tasks[0].fork", "a list"),
        (with_task(0, join="rank"), "tasks[0].join", "rank"),
        (with_task(0, input="${input..n}"), "tasks[0].input", "does not compile"),
        (with_task(0, retry={"max_attempts": 0}), "tasks[0].retry.max_attempts", "1 to 100"),
        (with_task(0, retry={"codes": ["oops"]}), "tasks[0].retry.codes", "oops"),
        (with_task(0, nedes=["a"]), "tasks[0]", "expected `needs`"),
        (with_task(1, needs=["sqare"]), "tasks[1].needs", "expected `square`"),
        (with_task(1, needs=[]), "tasks[1].input", "`square` in tasks[1].needs"),
        (with_task(1, input={"n": "${item}"}), "tasks[1].input.n", "reads `item`"),
        (with_task(0, needs=["total"]), "needs", "circle"),
        (with_task(1, needs=["total"]), "tasks[1].needs", "circle"),
        (b"{", "", "not JSON"),
        (b"[]", "", "expected a mapping"),
    ],
)
def test_what_is_wrong_is_refused_with_its_path(document, path, words):
    with pytest.raises(InvalidArgument) as caught:
        parse_job(document)
    assert path in caught.value.fields["path"]
    assert words in caught.value.message


def test_what_the_document_as_a_whole_lacks_is_said_without_a_path():
    with pytest.raises(InvalidArgument, match=r"\Athe field `name` is missing"):
        parse_job(b'{"apiVersion":"hive/v1","kind":"Job","tasks":[]}')


def test_an_oversized_document_is_refused_unread():
    with pytest.raises(PayloadTooLarge, match="1048576"):
        parse_job(changed(input="x" * (1 << 20)))


@given(
    st.binary(max_size=200) | st.recursive(st.none() | st.booleans() | st.text(), st.lists).map(msgspec.json.encode)
)
def test_no_bytes_break_the_parser(data):
    with pytest.raises(InvalidArgument):
        parse_job(data)
