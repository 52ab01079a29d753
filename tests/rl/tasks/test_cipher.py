"""Cipher words against answers worked out by hand, and the optimum and the chance of success against every completion."""

import itertools
import statistics

import pytest

from rl import tasks
from rl.tasks import TaskError
from rl.tasks.cipher import encipher, optimum, verify


def test_words_answers_and_prompts_by_hand():
    # abcdefgh: four places on; abcde: two places on
    assert [encipher(word, "abcdefgh") for word in ("a", "ah", "dehg")] == ["e", "ed", "hadc"]
    assert [encipher(word, "abcde") for word in ("a", "de")] == ["c", "ab"]
    for problem in tasks.make("cipher", length=(1, 3)).problems("train", 100, 0):
        assert problem.prompt == problem.id + "." * (3 - len(problem.id))
        assert problem.solution == problem.answer["text"] == encipher(problem.id, "abcdefgh")


def test_lengths_are_as_frequent_as_there_are_words():
    problems = tasks.make("cipher", letters=26, length=(3, 5)).problems("train", 3000, 0)
    share = {n: sum(len(p.id) == n for p in problems) / 3000 for n in (3, 4, 5)}
    assert all(abs(x - 1 / 3) < 0.035 for x in share.values()), share  # 4 standard deviations


@pytest.mark.parametrize(
    ("completion", "exact", "right"),
    [
        ("ed", 1, 1),
        ("e", 0, 1 / 2),
        ("ea", 0, 1 / 2),
        ("ad", 0, 1 / 2),
        ("de", 0, 0),
        ("eda", 1, 1),
        ("ed.", 1, 1),
        (" ed", 0, 0),
        ("", 0, 0),
        ("e" + "a" * 9, 0, 1 / 2),
    ],
)
def test_parts_and_value(completion, exact, right):
    verdict = verify(completion, {"text": "ed", "partial": 0.4})
    assert verdict.parts == pytest.approx({"exact": exact, "right": right})
    assert verdict.value == pytest.approx(1.0 if exact else 0.4 * right)
    assert verify(completion, {"text": None, "partial": 0.4}) == (0.0, "ok", {"exact": 0.0, "right": 0.0})


def test_the_optimum_is_the_best_of_every_completion_and_all_that_begin_right_reach_it():
    task = tasks.make("cipher", letters=4, length=(1, 3), forbidden="d")
    problems = task.problems("train", 60, 0)
    texts = ["".join(x) for n in range(4) for x in itertools.product(task.alphabet, repeat=n)]
    best = []
    for problem in problems:
        values = [verify(text, problem.answer).value for text in texts]
        best.append(max(values))
        # 5 characters after the word: 1, 5 or 25 + 5 + 1 ends of it
        assert values.count(1.0) == {3: 1, 2: 6, 1: 31}[len(problem.id)] * ("d" not in problem.id)
    assert optimum(problems) == statistics.mean(best) < 1
    assert [p.solution == "" for p in problems] == ["d" in p.id for p in problems]


def test_difficulty_grows_with_length_as_stated():
    """Every sequence of 3 tokens of an untrained policy: 4 letters, "." and the end, each with probability 1/6."""
    task = tasks.make("cipher", letters=4, length=(1, 3))
    drawn = ["".join(itertools.takewhile(bool, x)) for x in itertools.product(["", *task.alphabet], repeat=3)]
    chances = {1: set(), 2: set(), 3: set()}
    for problem in task.problems("train", 60, 0):
        chances[len(problem.id)].add(sum(verify(text, problem.answer).value == 1 for text in drawn))
    assert chances == {1: {36}, 2: {6}, 3: {1}}  # of 6^3


def test_the_problems_of_a_seed_stay_the_same():
    problems = tasks.make("cipher").problems("train", 3, 0)
    assert [(p.prompt, p.solution) for p in problems] == [("dfhf", "hbdb"), ("hfba", "dbfe"), ("af..", "eb")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"letters": 1}, "letters must be"),
        ({"letters": 27}, "letters must be"),
        ({"length": (0, 3)}, "length must be"),
        ({"length": (3, 2)}, "length must be"),
        ({"partial": 1.0}, "partial must be"),
        ({"letters": 2, "forbidden": "ab"}, "forbidden must be"),
        ({"forbidden": "z"}, "forbidden must be"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(TaskError, match=message):
        tasks.make("cipher", **options)
