"""Arithmetic chains against Python's own arithmetic and values worked out by hand."""

import ast
import operator
import re

import pytest

from rl import tasks
from rl.tasks import TaskError
from rl.tasks.arithmetic import verify

APPLY = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def twin(text):
    def walk(node):
        if isinstance(node, ast.UnaryOp):
            return -walk(node.operand)
        return node.value if isinstance(node, ast.Constant) else APPLY[type(node.op)](walk(node.left), walk(node.right))

    return walk(ast.parse(text, mode="eval").body)


def test_values_and_steps_are_right():
    task = tasks.make("arithmetic", operations="+-*", length=(1, 5), operands=(0, 20))
    problems = task.problems("train", 300, 0)
    assert {len(re.findall(r"[-+*]", p.id)) for p in problems} == {1, 2, 3, 4, 5}
    for problem in problems:
        assert problem.prompt == f"{problem.id}="
        steps = problem.solution.split("=")
        assert {twin(step) for step in (problem.id, *steps)} == {problem.answer["value"]}
        # One operation less in each step; a sign in front of a number is none.
        counts = [len(re.findall(r"(?<=[0-9])[-+*]", step)) for step in (problem.id, *steps)]
        assert counts == list(range(counts[0], -1, -1))


def test_without_steps_the_solution_is_the_value():
    for problem in tasks.make("arithmetic", steps=False).problems("train", 100, 0):
        assert problem.solution == str(problem.answer["value"])


def test_a_share_of_the_solutions_works_the_value_out_and_says_so():
    problems = tasks.make("arithmetic", steps=0.3, length=(3, 3)).problems("train", 1000, 0)
    shown = [p for p in problems if p.solution.startswith(":")]
    assert 0.25 < len(shown) / len(problems) < 0.35  # 0.3 +- 3.5 standard deviations
    assert all(p.solution.count("=") == 2 for p in shown)
    assert all(p.solution == str(p.answer["value"]) for p in problems if p not in shown)
    assert all(verify(p.solution, p.answer).parts == {"format": 1, "exact": 1, "steps": 1} for p in problems)


@pytest.mark.parametrize(
    ("completion", "form", "exact", "steps"),
    [
        ("14", 1, 1, 1),
        (" 14\n", 1, 1, 1),
        ("7+12-5=19-5=14", 1, 1, 1),
        (":19-5=14", 1, 1, 1),
        ("::19-5=14", 1, 1, 1 / 2),
        ("19-5=:14", 0, 0, 1 / 2),
        ("7+12-5=18-5=14", 1, 1, 2 / 3),
        ("7+12-5=19-5=13", 1, 0, 2 / 3),
        ("19-5", 0, 0, 1),
        ("14.0", 0, 0, 0),
        ("014", 0, 0, 0),
        ("-14", 1, 0, 0),
        ("--14", 0, 0, 0),
        ("14=", 0, 0, 1 / 2),
        ("", 0, 0, 0),
        ("fourteen", 0, 0, 0),
        ("\u0661\u0664", 0, 0, 0),
        ("=" * 15 + "14", 1, 1, 1 / 16),
        ("=" * 16 + "14", 0, 0, 0),
    ],
)
def test_parts_and_value(completion, form, exact, steps):
    verdict = verify(completion, {"value": 14, "steps_weight": 0.4})
    assert verdict.parts == pytest.approx({"format": form, "exact": exact, "steps": steps})
    assert verdict.value == pytest.approx(1.0 if exact else 0.4 * steps)
    assert verify(completion, {"value": 14, "steps_weight": 0.0}).value == exact


def test_negative_values():
    assert verify("-3+1=-2", {"value": -2, "steps_weight": 0.0}).value == 1
    assert verify("2", {"value": -2, "steps_weight": 0.0}).value == 0


def test_the_problems_of_a_seed_stay_the_same():
    problems = tasks.make("arithmetic", operations="+-*").problems("train", 2, 0)
    assert [(p.prompt, p.solution) for p in problems] == [
        ("8*9-7*2=", "72-7*2=72-14=58"),
        ("4+9-7+7-3=", "13-7+7-3=6+7-3=13-3=10"),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": (0, 3)}, "length must be"),
        ({"operands": (1, 1000)}, "operands must be"),
        ({"operations": "+/"}, "operations must be"),
        ({"steps_weight": 1.0}, "steps_weight must be"),
        ({"steps": 1.5}, "steps must be a share"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(TaskError, match=message):
        tasks.make("arithmetic", **options)
