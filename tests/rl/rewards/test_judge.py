"""Verdicts as arrays, and from them the scores of members: by hand, and pass@k against all subsets."""

import functools
import itertools
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from rl import mesh as meshes
from rl.rewards.judge import fill_unjudged, judge, mean_reward, pass_at
from rl.rewards.pool import Pool, PoolError
from rl.tasks.types import Problem, Verdict

NAN = np.nan


def test_verdicts_become_arrays_in_order():
    """The verifier of `faulty.py` gives the length of a text it does not know as a fault."""
    problems = [Problem(str(i), "p", answer=10 * i) for i in range(5)]
    with Pool("tests.rl.rewards.faulty:verify", workers=1, deadline=5.0) as pool:
        scored = judge(pool, ["abc", "nan", "declines", "raises", ""], problems)
        nothing = judge(pool, [], [])
    np.testing.assert_array_equal(scored.value, [3, 0, 0, 0, 0])
    assert list(scored.status) == ["ok", "unscorable", "unscorable", "error", "ok"]
    np.testing.assert_array_equal(scored.ok, [True, False, False, False, True])
    np.testing.assert_array_equal(scored.parts["answer"], [0, NAN, NAN, NAN, 40])
    np.testing.assert_array_equal(scored.parts["format"], [NAN, NAN, 0, NAN, NAN])
    assert scored.value.dtype == np.float64 and set(scored.parts) == {"answer", "format"}
    assert (len(nothing.value), nothing.parts) == (0, {}) and nothing.ok.dtype == bool
    again = scored.take(np.array([4, 4, 1]))
    assert list(again.status) == ["ok", "ok", "unscorable"] and list(again.value) == [0, 0, 0]
    np.testing.assert_array_equal(again.parts["answer"], [40, 40, NAN])


class Lengths:
    """A pool whose verdict is the length of the text, and who asked."""

    def __init__(self):
        self.asked = []

    def score(self, completions, answers):
        self.asked += list(zip(completions, answers, strict=True))
        return [Verdict(len(text), "timeout" if text == "bb" else "ok", {text: 0.5}) for text in completions]


def in_processes(monkeypatch, completions, pools):
    """What each of so many processes gets of `judge`: threads that exchange what they say."""
    here, met, said = threading.local(), threading.Barrier(len(pools), timeout=120), [None] * len(pools)

    def exchanged(value):
        said[here.index] = json.loads(json.dumps(value))
        met.wait()
        return said

    def ask(i):
        here.index = i
        return judge(pools[i], completions[i], [Problem(str(n), "p", answer=n) for n in range(len(completions[i]))])

    monkeypatch.setattr(jax, "process_count", lambda: len(pools))
    monkeypatch.setattr(jax, "process_index", lambda: here.index)
    monkeypatch.setattr(meshes, "exchanged", exchanged)
    with ThreadPoolExecutor(len(pools)) as threads:
        return [threads.submit(ask, i) for i in range(len(pools))]


@pytest.mark.parametrize("texts", [["a", "bb", "", "dddd", "eeeee"], ["a"], []])
def test_processes_judge_a_share_each_and_get_the_verdicts_of_all(monkeypatch, texts):
    pools = [Lengths() for _ in range(3)]
    for future in in_processes(monkeypatch, [texts] * 3, pools):
        scored = future.result()
        assert list(scored.value) == [len(text) for text in texts]
        assert list(scored.status) == ["timeout" if text == "bb" else "ok" for text in texts]
        for row, text in enumerate(texts):
            np.testing.assert_array_equal(scored.parts[text], [0.5 if n == row else NAN for n in range(len(texts))])
    every = sorted(item for pool in pools for item in pool.asked)
    assert every == sorted(zip(texts, range(len(texts)), strict=True))
    assert {len(pool.asked) for pool in pools} <= {len(texts) // 3, -(-len(texts) // 3)}


def test_processes_that_ask_different_things_are_refused(monkeypatch):
    for future in in_processes(monkeypatch, [["a", "b"], ["a", "b"], ["a", "c"]], [Lengths() for _ in range(3)]):
        with pytest.raises(PoolError, match=r"those of processes \[2\] differ from process 0's"):
            future.result()


def test_mean_reward_is_over_the_samples_that_were_judged():
    value = np.array([[[1.0, 0.5, 0.0], [1.0, 0.0, 0.0]], [[0.25, 0.75, 9.0], [9.0, 9.0, 9.0]]])
    ok = np.array([[[1, 1, 1], [1, 0, 0]], [[1, 1, 0], [0, 0, 0]]], bool)
    np.testing.assert_array_equal(mean_reward(value, ok), [[0.5, 1.0], [0.5, NAN]])


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_share_of_subsets_with_a_success(k):
    rng = np.random.default_rng(k)
    value = rng.choice([0.0, 0.99, 1.0, 1.5], size=(40, 5))
    ok = rng.random((40, 5)) < 0.8
    ok[:3], value[1], value[2] = [[False], [True], [True]], 0, 1

    def brute(value, ok):
        judged = [v >= 1 for v, known in zip(value, ok, strict=True) if known]
        subsets = list(itertools.combinations(judged, k))
        return np.mean([any(subset) for subset in subsets]) if subsets else NAN

    expected = [brute(v, o) for v, o in zip(value, ok, strict=True)]
    np.testing.assert_allclose(pass_at(k, value, ok), expected, atol=1e-12)
    assert np.isnan(expected[0]) and {0, 1} <= set(expected)


def test_pass_at_k_by_hand():
    value, ok = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0.9], [0, 0, 0, 0]]), np.ones((4, 4), bool)
    # One of four succeeds: a pair has it in 3 of 6; two: all pairs but one; three: all pairs.
    np.testing.assert_allclose(pass_at(2, value, ok), [1 / 2, 5 / 6, 1, 0], atol=1e-15)
    # Without the second sample: three are left, of which 1, 1, 2 and 0 succeed.
    ok[:, 1] = False
    np.testing.assert_allclose(pass_at(2, value, ok), [2 / 3, 2 / 3, 1, 0], atol=1e-15)
    for wrong in (0, 5):
        with pytest.raises(ValueError, match=f"needs 1 <= k <= samples per prompt; got k = {wrong} and 4 samples"):
            pass_at(wrong, value, ok)


def test_an_unjudged_score_becomes_the_mean_of_the_others_on_the_prompt():
    scores = np.array([[1.0, NAN, 0.0, NAN], [0.0, NAN, NAN, NAN], [NAN, NAN, NAN, 0.2]])
    # The second prompt was judged for nobody: the same for all, the mean of the four known scores, 1.2 / 4.
    np.testing.assert_allclose(
        fill_unjudged(scores), [[1, 0.3, 0, 0.2], [0, 0.3, 0, 0.2], [0.5, 0.3, 0, 0.2]], atol=1e-15
    )
    assert np.isnan(fill_unjudged(np.full((2, 3), NAN))).all()
    known = np.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(fill_unjudged(known), known)


def test_a_timeout_is_neutral_in_the_estimate():
    """Members that were judged keep their order and their distances; the one that was not is exactly average."""
    value = np.array([[1.0, 0.0], [0.0, 0.0], [5.0, 5.0], [0.5, 1.0]])
    ok = np.array([[1, 1], [1, 1], [0, 0], [1, 1]], bool)
    for score in (mean_reward, functools.partial(pass_at, 1)):
        filled = fill_unjudged(score(value[..., None], ok[..., None])).mean(axis=1)
        others = score(value[[0, 1, 3], :, None], ok[[0, 1, 3], :, None]).mean(axis=1)
        np.testing.assert_allclose(filled[[0, 1, 3]], others)
        np.testing.assert_allclose(filled[2], others.mean())
