"""Solves a word problem: the model writes the calculation, and the agent does the sum.

Small models cannot calculate, and choose the right numbers and signs only now and then. Each try is another sample;
which answer counts is for the vote to say. What is no calculation with the question's own numbers is no vote.
"""

import ast
import operator
import random
import re

from hive import log, model

SYSTEM = "Write the calculation that answers the question. Write nothing else."
SHOWN = (
    ("Sam has 4 pens. He buys 3 more. How many pens does he have?", "4 + 3"),
    ("There are 9 birds on a tree. 2 fly away. How many are left?", "9 - 2"),
    ("A box holds 6 eggs. How many eggs do 3 boxes hold?", "6 * 3"),
    ("A jar has 30 beans. 12 fall out. How many are left?", "30 - 12"),
    ("Eva has 11 cards. She gets 5 more. How many cards does she have?", "11 + 5"),
    ("Mia had 20 euros. She paid 4 euros for lunch and 7 euros for a book. How many euros are left?", "20 - 4 - 7"),
    ("18 sweets are shared equally by 3 children. How many does each child get?", "18 / 3"),
    ("A hall has 5 rows with 12 chairs each. 7 chairs are broken. How many chairs are fine?", "5 * 12 - 7"),
    ("A room has 16 guests. 4 leave. How many are left?", "16 - 4"),
)
TOKENS_MAX = 24
CALCULATION = re.compile(r"[\d(][\d.() ]*[+*x/-][\d.() +*x/-]*[\d)]")
SIGNS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def run(input: dict) -> dict:
    """Take `question`, `temperature` and perhaps `model` and `seed`; return the `answer`."""
    # The tries of one task have the same input: what makes each another sample is its seed.
    seed = input.get("seed") or random.randrange(2**31)  # noqa: S311
    answer = model.chat(
        messages(input["question"]),
        model=input.get("model") or "",
        temperature=input["temperature"],
        seed=seed,
        max_tokens=TOKENS_MAX,
        stop=["\n", "="],
    )
    log.info(f"seed {seed}: {answer.text.strip()}")
    return {"answer": solved(answer.text, input["question"])}


def messages(question: str) -> list[dict]:
    """Show the model how it is done, then ask."""
    turns = [{"role": "system", "content": SYSTEM}]
    for asked, calculation in SHOWN:
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": calculation}]
    return [*turns, {"role": "user", "content": question}]


def solved(said: str, question: str) -> float:
    """Return what the calculation in a text gives. Raises ValueError: there is none, or one with other numbers."""
    found = CALCULATION.search(said)
    if found is None:
        raise ValueError(f"no calculation in {said.strip()!r}")
    calculation = found[0]
    strange = set(numbers(calculation)) - set(numbers(question))
    if strange:
        raise ValueError(f"{calculation!r} has numbers that the question has not: {', '.join(sorted(strange))}")
    try:
        value = value_of(ast.parse(calculation.replace("x", "*"), mode="eval").body)
    except (SyntaxError, ZeroDivisionError) as error:
        raise ValueError(f"{calculation!r} is no calculation: {error}") from None
    return int(value) if value == int(value) else round(value, 6)


def numbers(text: str) -> list[str]:
    """Return the numbers in a text."""
    return re.findall(r"\d+(?:\.\d+)?", text)


def value_of(node: ast.expr) -> float:
    """Calculate; what is more than numbers and the four signs is refused."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in SIGNS:
        return SIGNS[type(node.op)](value_of(node.left), value_of(node.right))
    raise ValueError(f"no calculation: {ast.unparse(node)!r}")
