"""The digits recipe, small: data, learning by both methods, resume, and bad input."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import pretrain, pretrain_tasks
from rl import config as config_lib
from rl.run import Run

RECIPE = str(Path(__file__).parents[2] / "configs" / "digits.py")
SMALL = ("steps=60", "eval_every=20", "save_every=20", "width=32")


def load(variant, *overrides):
    return config_lib.load(f"{RECIPE}:{variant}", [*SMALL, *overrides])


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_the_split_is_fixed_and_stratified():
    task = pretrain_tasks.digits(load("eggroll"))
    other = pretrain_tasks.digits(load("eggroll", "seed=5"))
    assert task.train["image"].shape == (1437, 64) and task.test["image"].shape == (360, 64)
    np.testing.assert_array_equal(task.test["image"], other.test["image"])
    # 20 % of 178 182 177 183 181 182 181 179 174 180 images per class
    counts = np.bincount(task.test["label"])
    np.testing.assert_allclose(counts, np.array([178, 182, 177, 183, 181, 182, 181, 179, 174, 180]) / 5, atol=1)
    assert float(task.train["image"].max()) == 1.0 and float(task.train["image"].min()) == 0.0


def test_score_is_the_log_likelihood_of_the_label():
    task = pretrain_tasks.digits(load("eggroll"))
    zero = jax.tree.map(jnp.zeros_like, task.params)
    row = jax.tree.map(lambda x: x[0], task.train)
    np.testing.assert_allclose(task.score(zero, row), -np.log(10), rtol=1e-6)
    # all logits equal: argmax is class 0
    zeros = np.mean(np.asarray(task.test["label"]) == 0)
    assert float(pretrain_tasks.accuracy(task, zero, task.test)) == pytest.approx(zeros, abs=1e-6)


def test_minibatches_depend_on_seed_and_step_alone():
    data = {"x": jnp.arange(1000)}
    one = pretrain_tasks.minibatch(data, 3, 7, 64)["x"]
    np.testing.assert_array_equal(one, jax.jit(lambda t: pretrain_tasks.minibatch(data, 3, t, 64)["x"])(7))
    others = [pretrain_tasks.minibatch(data, 3, 8, 64)["x"], pretrain_tasks.minibatch(data, 4, 7, 64)["x"]]
    assert all(np.mean(one == other) < 0.1 for other in others)


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "least"), [("eggroll", 0.75), ("backprop", 0.9)])
def test_small_recipe_learns(variant, least, tmp_path):
    result = pretrain.train(load(variant), str(tmp_path))
    history = rows(tmp_path)
    assert result["score"] > 100 * least and result["measure"] == "test accuracy in %"
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert history[-1]["test_accuracy"] == pytest.approx(result["score"] / 100, abs=1e-6)
    assert [row["step"] for row in history if "test_accuracy" in row] == [20, 40, 60]
    assert history[-1]["examples"] == 60 * 64
    assert history[-1]["fitness_mean"] > history[0]["fitness_mean"] + 1


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_metrics(tmp_path, monkeypatch):
    config = load("eggroll", "es.members=64", "steps=30", "save_every=10")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    pretrain.train(config, str(whole))
    record = Run.record

    def failing(run, *args, **kwargs):
        if run.step == 17:
            raise KeyboardInterrupt
        record(run, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "record", failing)
        with pytest.raises(KeyboardInterrupt):
            pretrain.train(config, str(broken))
    assert len(rows(broken)) < 30
    pretrain.train(config, str(broken))
    assert (broken / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(config_lib.ConfigError, match="no key 'es.sgima' .did you mean es.sigma"):
        load("eggroll", "es.sgima=0.1")
    with pytest.raises(config_lib.ConfigError, match="no key 'es.sigma'"):
        load("backprop", "es.sigma=0.1")
    with pytest.raises(config_lib.ConfigError, match="unknown variant 'es'; known: eggroll, backprop"):
        load("es")
    for override, message in {
        "method=sgd": "unknown method 'sgd'; known: eggroll, integer, backprop",
        "task=mnist": "unknown task 'mnist'; known: digits",
        "es.population=mirrored": "known: crossed, antithetic, independent",
        "es.shaping=rank": "known: zscore, centred_rank, pair_sign",
    }.items():
        with pytest.raises(config_lib.ConfigError, match=message):
            pretrain.train(load("eggroll", override), str(tmp_path / "never"))
    assert not (tmp_path / "never").exists()
