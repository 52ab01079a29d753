"""The countdown checker against values worked out by hand, and what the generator makes."""

import ast
import itertools
from fractions import Fraction

import pytest

from rl import tasks
from rl.tasks import TaskError
from rl.tasks.countdown import verify

ANSWER = {
    "numbers": [25, 3, 7],
    "target": 46,
    "uses": "all",
    "tags": False,
    "partial": {"format": 0.1, "numbers": 0.2, "close": 0.2},
}


def check(completion, **changes):
    verdict = verify(completion, {**ANSWER, **changes})
    assert verdict.status == "ok"
    return verdict


@pytest.mark.parametrize(
    ("completion", "numbers", "close", "exact", "value"),
    [
        ("25+3*7", 1, 1, 1, 1.0),
        ("7*3+25\n", 1, 1, 1, 1.0),
        ("25+3*7=46", 1, 1, 1, 1.0),
        ("(25-3)*7", 1, 1 / (1 + 154 - 46), 0, 0.3 + 0.2 / 109),
        ("25+3+7", 1, 1 / 12, 0, 0.3 + 0.2 / 12),  # 35: eleven off
        ("25*(3/7)", 1, 1 / (1 + 46 - 75 / 7), 0, 0.3 + 0.2 / (47 - 75 / 7)),
        ("25+7+7+7", 2 / 4, 0, 0, 0.1 + 0.1),  # 46, but 7 is given once: 25 and one 7 of four
        ("25+21", 1 / 3, 0, 0, 0.1 + 0.2 / 3),
        ("25+3", 2 / 3, 0, 0, 0.1 + 0.4 / 3),
        ("46", 0, 0, 0, 0.1),
        ("25/(3-3)*7", 3 / 4, 0, 0, 0.1 + 0.15),
        ("<answer>25+3*7</answer>", 1, 1, 1, 1.0),
        ("First 3*7=21. <answer>9</answer> No: <answer> 25+3*7 </answer> I am sure.", 1, 1, 1, 1.0),
        ("<answer>1</answer> <answer>25+3*7=46</answer>", 1, 1, 1, 1.0),
    ],
)
def test_parts_and_value(completion, numbers, close, exact, value):
    verdict = check(completion)
    assert verdict.parts == pytest.approx({"format": 1, "numbers": numbers, "close": close, "exact": exact})
    assert verdict.value == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(
    "completion",
    [
        "", "The answer is 25+3*7", "25+3*7=47", "25+3*7=46=46", "25+3*7=", "25+", "2 5+3*7", "-3+25+7", "025+3*7",
        "25+3*7.", "25+3*7;46", "<answer>25+3*7</answer", "</answer>25+3*7<answer>", "<answer></answer>", "25,3,7",
    ],
)  # fmt: skip
def test_what_has_no_format_is_worth_nothing(completion):
    verdict = check(completion)
    assert verdict.value == 0 and set(verdict.parts.values()) == {0.0}


def test_division_by_zero_has_a_format_and_no_value():
    verdict = check("25/(7-7)", numbers=[25, 7, 7])
    assert verdict.parts == {"format": 1, "numbers": 1, "close": 0, "exact": 0}


def test_rationals_are_exact():
    # 8/(3-8/3) = 24; in floats it is 23.99999999999999.
    assert check("8/(3-8/3)", numbers=[8, 3, 8, 3], target=24).value == 1.0


def test_using_some_numbers_is_enough_where_the_rule_says_so():
    assert check("25+21", numbers=[25, 21, 7]).parts["exact"] == 0
    assert check("25+21", numbers=[25, 21, 7], uses="some").value == 1.0
    assert check("25+7+7+7", uses="some").parts == pytest.approx({"format": 1, "numbers": 0.5, "close": 0, "exact": 0})
    assert check("46", uses="some").parts["numbers"] == 0


def test_tags_where_they_are_required():
    assert check("25+3*7", tags=True).value == 0
    assert check("so <answer>25+3*7</answer>", tags=True).value == 1


def test_without_partial_credit_only_exact_answers_count():
    task = tasks.make("countdown", partial={})
    problem = task.problems("train", 1, 0)[0]
    assert verify(problem.solution, problem.answer).value == 1.0
    assert verify("1", problem.answer).value == 0.0


def solvable(numbers, target):
    """Every expression over all numbers, by merging any two values in any way: an independent search."""
    if len(numbers) == 1:
        return numbers[0] == target
    for i, j in itertools.permutations(range(len(numbers)), 2):
        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
        a, b = numbers[i], numbers[j]
        results = [a + b, a - b, a * b] + ([a / b] if b else [])
        if any(solvable([*rest, result], target) for result in results):
            return True
    return False


def test_problems_can_be_solved_and_keep_to_their_options():
    task = tasks.make("countdown", numbers=(3, 4), operands=(2, 30), target=(10, 60))
    problems = task.problems("train", 150, 0)
    assert {len(p.answer["numbers"]) for p in problems} == {3, 4}
    for problem in problems:
        numbers, target = problem.answer["numbers"], problem.answer["target"]
        assert all(2 <= n <= 30 for n in numbers) and 10 <= target <= 60
        assert problem.prompt == f"{' '.join(map(str, numbers))}={target}:"
        assert solvable([Fraction(n) for n in numbers], target)
        # Python's own parser finds the given numbers in the solution, each once.
        constants = [node.value for node in ast.walk(ast.parse(problem.solution)) if isinstance(node, ast.Constant)]
        assert sorted(constants) == sorted(numbers)


def test_operations_and_order():
    problems = tasks.make("countdown", operations="-", shuffle=False).problems("train", 100, 0)
    for problem in problems:
        assert not set(problem.solution) & set("+*/")
        assert problem.answer["numbers"] == sorted(problem.answer["numbers"], reverse=True)
    shuffled = tasks.make("countdown").problems("train", 100, 0)
    assert any(p.answer["numbers"] != sorted(p.answer["numbers"], reverse=True) for p in shuffled)


def test_every_operation_and_brackets_occur():
    text = "".join(p.solution for p in tasks.make("countdown").problems("train", 300, 0))
    assert set("+-*/()") <= set(text)


def test_the_order_of_the_numbers_does_not_move_a_problem_to_the_other_split():
    def keys(split):
        drawn = [p for seed in range(4) for p in task.problems(split, 100, seed)]
        return {(tuple(sorted(p.answer["numbers"])), p.answer["target"]) for p in drawn}

    task = tasks.make("countdown", numbers=(3, 3), operands=(1, 9))
    assert not keys("train") & keys("test")


def test_the_problems_of_a_seed_stay_the_same():
    """Golden: a change here changes every recipe that trains on the task."""
    problems = tasks.make("countdown").problems("train", 3, 0)
    assert [(p.prompt, p.solution) for p in problems] == [
        ("4 2 23=54:", "(23+4)*2"),
        ("20 3 2=21:", "20+3-2"),
        ("5 9 17=62:", "9*5+17"),
    ]


def test_english_prompts_name_everything_a_model_has_to_know():
    problem = tasks.make("countdown", style="english").problems("test", 1, 0)[0]
    numbers = ", ".join(map(str, problem.answer["numbers"]))
    for part in (numbers, f"is {problem.answer['target']}.", "exactly once", "<answer>", "</answer>"):
        assert part in problem.prompt
    assert "at most once" in tasks.make("countdown", style="english", uses="some").problems("test", 1, 0)[0].prompt


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"numbers": (4, 3)}, "numbers must be"),
        ({"numbers": (3, 9)}, "numbers must be"),
        ({"operands": (0, 9)}, "operands must be"),
        ({"target": (-1, 9)}, "target must be"),
        ({"operations": "+^"}, "operations must be"),
        ({"operations": ""}, "operations must be"),
        ({"uses": "any"}, "uses must be one of all, some, not 'any'"),
        ({"style": "chat"}, "style must be one of compact, english"),
        ({"partial": {"near": 0.1}}, "partial has no part 'near'. The parts are: format, numbers, close"),
        ({"partial": {"close": -0.1}}, "at least 0"),
        ({"partial": {"close": 0.6, "format": 0.4}}, "less than 1"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(TaskError, match=message):
        tasks.make("countdown", **options)
