"""Constraints on stories, by hand."""

import pytest

from rl import tasks
from rl.tasks import TaskError
from rl.tasks.stories import NOUNS, verify

ANSWER = {"words": ["dog", "ball"], "length": [3, 8], "weights": {"words": 0.5, "end": 0.3, "length": 0.2}}


@pytest.mark.parametrize(
    ("completion", "words", "end", "length", "value"),
    [
        ("The Dog has a BALL.", 1, 1, 1, 1.0),
        (' He said, "My dog, my ball!"\n', 1, 1, 1, 1.0),
        ("The dog's toy is a football.", 0, 1, 1, 0.5),
        ("The dog ran and ran", 0.5, 0, 1, 0.45),
        ("dog, ball.", 1, 1, 0, 0.8),
        ("The dog and the ball are here with me now.", 1, 1, 0, 0.8),
        ("Dogs like balls, dogs like balls", 0, 0, 1, 0.2),
        ('The dog said "', 0.5, 0, 1, 0.45),
        ("", 0, 0, 0, 0.0),
        ("The dog has the ball. " * 1000, 0, 0, 0, 0.0),
    ],
)
def test_parts_and_value(completion, words, end, length, value):
    verdict = verify(completion, ANSWER)
    assert verdict.status == "ok"
    assert verdict.parts == {"words": words, "end": end, "length": length}
    assert verdict.value == pytest.approx(value)


def test_openings_name_the_words():
    problems = tasks.make("stories", words=3, length=(5, 30)).problems("train", 200, 0)
    for problem in problems:
        words = problem.answer["words"]
        assert len(set(words)) == 3 and all(f" {word}" in problem.prompt for word in words)
        assert problem.answer["length"] == [5, 30]
    assert {word for p in problems for word in p.answer["words"]} == set(NOUNS)


def test_words_of_a_test_problem_never_occur_together_in_training():
    def pairs(split):
        return {tuple(sorted(p.answer["words"])) for p in tasks.make("stories").problems(split, 1000, 0)}

    train, test = pairs("train"), pairs("test")
    assert not train & test
    assert len(train | test) == 16 * 15 // 2


def test_the_problems_of_a_seed_stay_the_same():
    problem = tasks.make("stories").problems("test", 1, 0)[0]
    assert problem.prompt == ("Once upon a time, there was a little boy named Tom. He had a big book and a big boat.")
    assert tasks.make("stories", words=1).problems("test", 1, 0)[0].prompt.count(" and ") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"words": 0}, "words must be"),
        ({"words": 5}, "words must be"),
        ({"length": (5, 4)}, "length must be"),
        ({"weights": {"words": 1.0}}, "weights must give"),
        ({"weights": {"words": 0.5, "end": 0.5, "length": 0.5}}, "with sum 1"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(TaskError, match=message):
        tasks.make("stories", **options)
