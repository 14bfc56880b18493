import pytest
from hive_scheduler.domain.expressions import ExpressionError, compile_template
from hypothesis import given
from hypothesis import strategies as st

ALL = frozenset({"input", "tasks", "item", "index"})
SCOPE = {
    "input": {"n": 3, "names": ["a", "b"], "nothing": None, "people": [{"name": "x", "age": 1}, {"name": "y"}]},
    "tasks": {"plan": {"output": {"groups": [1, 2]}}},
    "item": {"k": "v"},
    "index": 7,
}


def resolve(value):
    return compile_template(value, "here", ALL).resolve(SCOPE)


def test_a_string_that_is_one_expression_becomes_the_value_itself():
    assert resolve("${input.names}") == ["a", "b"]
    assert resolve("${tasks.plan.output}") == {"groups": [1, 2]}
    assert resolve("${input.nothing}") is None


def test_inside_a_longer_string_the_value_is_written_into_it():
    assert resolve("n=${input.n} names=${input.names} k=${item.k} #${index}") == 'n=3 names=["a","b"] k=v #7'


def test_expressions_are_found_at_any_depth():
    assert resolve({"a": [{"b": "${item.k}"}], "c": 1}) == {"a": [{"b": "v"}], "c": 1}


def test_two_dollars_stand_for_a_literal():
    assert resolve("$${input.n} costs ${input.n}") == "${input.n} costs 3"


def test_braces_and_quotes_inside_an_expression_do_not_end_it():
    assert resolve("${input.{a: n, b: names[0]}}") == {"a": 3, "b": "a"}
    assert resolve("${'}'}") == "}"


@pytest.mark.parametrize(
    "source",
    [
        "input.m",
        "input.n.x",
        "input.names[5]",
        "input.names.x",
        "item.k[0]",
        "input.n[*]",
        "tasks.plan.output.group",
        "input.people[*].age",
        "length(input.n)",
    ],
)
def test_a_path_that_is_not_there_is_an_error_that_says_where(source):
    with pytest.raises(ExpressionError, match="here"):
        resolve("${" + source + "}")


def test_absence_is_taken_where_it_is_meant():
    assert resolve("${input.m || `5`}") == 5
    assert resolve("${not_null(input.m, input.n)}") == 3
    assert resolve("${input.people[?age == `1`].name}") == ["x"]


@pytest.mark.parametrize("text", ["${input.", "${input..n}", "${}", "a ${input.n", "${tasks}", "${tasks[0]}"])
def test_what_does_not_compile_is_refused_with_its_path(text):
    with pytest.raises(ExpressionError) as caught:
        compile_template(text, "tasks[0].input", ALL)
    assert caught.value.fields["path"] == "tasks[0].input"


def test_a_root_that_does_not_exist_here_is_refused():
    with pytest.raises(ExpressionError, match="reads `item`"):
        compile_template("${item}", "output", frozenset({"input", "tasks"}))
    with pytest.raises(ExpressionError, match="reads `env`"):
        compile_template("${env.HOME}", "output", ALL)


def test_it_tells_which_tasks_it_reads():
    template = compile_template(
        {"a": "${tasks.x.output[?b == `1`]}", "c": "${tasks.y.output.d} ${input.n}"}, "p", ALL
    )
    assert template.steps == {"x", "y"}
    assert template.roots == {"tasks", "input"}


def test_it_tells_when_it_only_passes_an_output_on():
    assert compile_template("${tasks.x.output}", "p", ALL).whole_output_of == "x"
    assert compile_template("${tasks.x.output.a}", "p", ALL).whole_output_of is None
    assert compile_template("<${tasks.x.output}>", "p", ALL).whole_output_of is None


@given(st.text())
def test_no_text_breaks_the_compiler(text):
    try:
        compile_template(text, "p", ALL)
    except ExpressionError as error:
        assert error.fields["path"] == "p"


@given(st.text().filter(lambda text: "$" not in text))
def test_text_without_expressions_stays_as_it_is(text):
    assert compile_template(text, "p", ALL).resolve({}) == text
