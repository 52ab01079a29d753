"""Which checkpoints outlive newer ones."""

import math
import os

import jax.numpy as jnp
import pytest

from rl import checkpoint
from rl.checkpoint.retention import Entry, check, doomed


def survivors(keep, metrics=(), seconds=60, count=10):
    """Of `count` saves, `seconds` apart, when the rules are applied after every one."""
    entries = []
    for step in range(1, count + 1):
        entries.append(Entry(step, 1e9 + seconds * step, metrics[step - 1] if metrics else {}))
        gone = doomed(entries, keep)
        entries = [entry for entry in entries if entry.step not in gone]
        assert doomed(entries, keep) == set()
    return [entry.step for entry in entries]


def test_rules_add_up():
    assert survivors(checkpoint.Keep()) == [9, 10]
    assert survivors(checkpoint.Keep(latest=1)) == [10]
    assert survivors(checkpoint.Keep(latest=20)) == list(range(1, 11))
    assert survivors(checkpoint.Keep(every_steps=4)) == [4, 8, 9, 10]
    assert survivors(checkpoint.Keep(every_seconds=170)) == [1, 4, 7, 9, 10]
    assert survivors(checkpoint.Keep(every_seconds=10.0)) == list(range(1, 11))
    assert survivors(checkpoint.Keep(1, every_steps=5, every_seconds=300)) == [1, 5, 6, 10]


def test_the_best_are_kept_newer_first_among_equals():
    values = [3, 9, 9, 9, math.nan, 1, 0, 2, 1, 0]
    metrics = [{"score": value} for value in values]
    best = lambda count, lower=False: survivors(checkpoint.Keep(1, count, "score", lower), metrics)
    assert best(1) == [4, 10]
    assert best(2) == [3, 4, 10]
    assert best(4) == [2, 3, 4, 10] or best(4) == [1, 2, 3, 4, 10]
    assert best(1, lower=True) == [10]
    assert best(3, lower=True) == [7, 9, 10] or best(3, lower=True) == [6, 7, 10]
    rare = [{"score": 5}, {}, {"score": "nan"}, {"other": 7}] + [{}] * 6  # measured once in a while, or not a number
    assert survivors(checkpoint.Keep(1, 3, "score"), rare) == [1, 10]


def test_the_best_of_a_run_stays_on_disk(tmp_path):
    keep = checkpoint.Keep(1, best=1, metric="eval_return")
    for step, value in enumerate((1.0, 7.5, 7.0, None, 2), 1):
        metrics = {} if value is None else {"eval_return": value}
        checkpoint.save(tmp_path, step, {"x": jnp.ones(1)}, {"metrics": metrics}, keep)
    assert checkpoint.steps(tmp_path) == [2, 5]
    (tmp_path / "0000000002" / "meta.json").write_text("{")  # not known to be best any more, and nothing else breaks
    checkpoint.save(tmp_path, 6, {"x": jnp.ones(1)}, {}, keep)
    assert checkpoint.steps(tmp_path) == [5, 6]
    assert sorted(os.listdir(tmp_path)) == ["0000000005", "0000000006"]


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (checkpoint.Keep(0), "keep.latest must be at least 1, not 0"),
        (checkpoint.Keep(every_steps=-1), "must be at least 0"),
        (checkpoint.Keep(best=1), "go together; got best = 1 and metric = ''"),
        (checkpoint.Keep(metric="score"), "go together; got best = 0 and metric = 'score'"),
    ],
)
def test_a_policy_that_cannot_be_meant_is_refused(keep, message):
    with pytest.raises(ValueError, match=message):
        check(keep)
