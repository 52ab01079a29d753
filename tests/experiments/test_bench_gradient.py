"""`grpo_step`: the twins compute what ours computes, and the rows say what was measured."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.bench import gradient, twins
from rl import estimate as estimates
from rl.data import packing
from rl.models.presets import make, preset
from rl.objectives.presets import PRESETS
from rl.types import Rollouts

WORK = gradient.Work(
    prompts=2, samples=2, prompt=40, completion=60, micro_batch=200
)  # beyond a block of rows, and a view
CONFIG = preset(WORK.model, vocab=64, layers=2)


@pytest.fixture(scope="module")
def problem():
    """(params, prompts [2, 40], tokens [4, 60], their log-probabilities by the twins' own samplers)."""
    params = make(CONFIG).init(jax.random.key(0))
    params = jax.tree.map(lambda x: 2 * x, params)  # far from uniform, so that an error in attention shows
    prompts = np.random.default_rng(1).integers(1, 64, (2, 40)).astype(np.int32)
    draw = lambda rollout: rollout(CONFIG, params, prompts, jax.random.key(2), 2, 60)
    return params, prompts, draw(twins.plain_rollout), draw(twins.tuned_rollout)


def shallow(monkeypatch):
    monkeypatch.setattr(gradient, "preset", lambda name, vocab=64: preset(name, vocab=vocab, layers=1))


def whole(prompts, tokens):
    return np.concatenate([np.repeat(prompts, 2, axis=0), tokens], axis=1)


@pytest.mark.slow
@pytest.mark.parametrize("twin", [2, 3])
def test_a_twin_samples_from_the_model_that_ours_scores(problem, twin):
    params, prompts, (tokens, logp) = problem[0], problem[1], problem[twin]
    model, ids = make(CONFIG), whole(prompts, tokens)
    logits = jax.jit(jax.vmap(lambda ids: model.head(params, model.forward(params, ids)[0])))(ids)
    expected = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], -1)[:, 39:, 0]
    np.testing.assert_allclose(logp, expected, atol=2e-5)
    assert expected.std() > 0.5 and len(np.unique(tokens)) > 20  # not one token, not the uniform distribution
    for scores in (twins.plain_logp, twins.tuned_scores):
        made = jax.jit(lambda ids, scores=scores: scores(CONFIG, params, ids, 60))(ids)
        np.testing.assert_allclose(made, expected, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rollout", [twins.plain_rollout, twins.tuned_rollout])
def test_twins_draw_in_proportion_to_the_probabilities(rollout):
    """First tokens of 4,000 samples of one prompt against the softmax: chi-square over 64 tokens."""
    config = preset(WORK.model, vocab=16, layers=1)
    params = jax.tree.map(lambda x: 4 * x, make(config).init(jax.random.key(0)))
    prompts, n = np.arange(8, dtype=np.int32)[None], 4000
    tokens, logp = rollout(config, params, prompts, jax.random.key(5), n, 1)
    model = make(config)
    probability = jax.nn.softmax(model.head(params, model.forward(params, prompts[0])[0][-1]))
    counts = np.bincount(np.asarray(tokens)[:, 0], minlength=16)
    assert float(((counts - n * probability) ** 2 / (n * probability)).sum()) < 37.7  # 99.9 % of chi-square with 15
    np.testing.assert_allclose(logp[:, 0], np.log(probability)[np.asarray(tokens)[:, 0]], atol=1e-5)


@pytest.mark.slow
def test_loss_and_gradient_are_ours(problem):
    params, prompts, (tokens, logp), _ = problem
    model, ids, grpo = make(CONFIG), whole(prompts, tokens), PRESETS["grpo"]
    rewards = np.array([0.1, 0.4, 0.8, 0.2], np.float32)
    advantage = twins.group_advantage(rewards, 2)
    # two of a group: +-(difference / 2) / (difference / sqrt 2 + 1e-6)
    np.testing.assert_allclose(advantage, np.array([-1, 1, 1, -1]) / 2**0.5, rtol=2e-5)
    reference = np.asarray(logp) + np.random.default_rng(3).normal(0, 0.3, logp.shape).astype(np.float32)
    rollouts = Rollouts.empty(np.full(4, -1), 60)
    rollouts.tokens[:], rollouts.length[:] = tokens, 60
    batch = gradient.packed(prompts, rollouts, packing.shape(200, 40, 60, per_row=1), 2)
    batch = batch.credit(np.ones((4, 60), bool), advantage, logp, reference=reference)
    ours = jax.jit(lambda params: estimates.estimate(model, params, batch, grpo.objective)[0])(params)
    mean = {name: float(total / count) for name, (total, count) in ours.metrics.items()}
    loss = twins.KL * mean["kl_reference"] - mean["objective"]
    assert mean["kl_reference"] > 0.01
    for twin in (twins.plain_gradient, twins.tuned_gradient):
        differentiate = jax.jit(lambda params, batch, twin=twin: twin(CONFIG, params, batch, 60))
        value, made = differentiate(params, twins.Batch(ids, advantage, reference))
        assert float(value) == pytest.approx(loss, abs=1e-6)
        scale = float(optax.global_norm(made))
        assert scale > 1e-2
        off = jax.tree.map(lambda a, b: float(abs(a - b).max()), made, ours.gradient)
        assert max(jax.tree.leaves(off)) < 1e-5 * scale


def test_adam_is_optax(problem):
    params = problem[0]
    state, tx = twins.adam_state(params), optax.adam(twins.STEP)
    expected, opt_state = params, tx.init(params)
    for i in range(3):
        made = jax.tree.map(lambda x, i=i: jnp.cos(x + i), params)
        state = twins.adam(made, state)
        updates, opt_state = tx.update(made, opt_state, expected)
        expected = optax.apply_updates(expected, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state[0], expected)


@pytest.mark.slow
def test_rows_hold_the_ratios_of_whole_steps_and_parts(monkeypatch):
    shallow(monkeypatch)
    monkeypatch.setattr(gradient, "Work", lambda: WORK)
    monkeypatch.setattr(gradient, "_memory", lambda repeats: iter(()))
    rows = list(gradient.grpo_step(1))
    assert [(row["measure"], row["setting"].get("part")) for row in rows] == [
        ("ours_over_plain", None), ("ours_over_tuned", None), *(("ours_over_tuned", part) for part in gradient.PARTS)
    ]  # fmt: skip
    for row in rows:
        seconds, twin = row["seconds"], row["measure"].removeprefix("ours_over_")
        assert row["value"] == pytest.approx(seconds["ours"] / seconds[twin], rel=0.02, abs=0.01)
        for name, rate in row["tokens_per_second"].items():
            assert rate == pytest.approx(2 * 2 * 60 / seconds[name], rel=0.02, abs=1)


@pytest.mark.slow
def test_every_side_takes_steps_of_its_own_policy(monkeypatch):
    shallow(monkeypatch)
    built = gradient.sides(WORK)
    for side in built.values():
        samples = side.rollout()
        before = np.array(side.logp(samples)).sum()
        assert not np.array_equal(side.tokens(samples), side.tokens(side.rollout()))
        for _ in range(3):
            learnt = side.learn(samples, gradient.reward(side.tokens(samples)))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(learnt))
        assert np.array(side.logp(samples)).sum() == before  # the reference stays
        assert gradient.reward(side.tokens(samples)).shape == (4,)


@pytest.mark.slow
def test_scoring_a_usual_vocabulary_takes_a_quarter_of_the_memory_and_says_the_same(monkeypatch):
    monkeypatch.setattr(gradient, "timed_in_turn", lambda fns, repeats: dict.fromkeys(fns, 1.0))
    (row,) = gradient._memory(1)
    assert row["value"] >= 4
    work = gradient.Work("tiny-transformer", prompts=2, samples=2, prompt=9, completion=21)
    programs, operands = gradient.scorers(make(preset(work.model, vocab=97)), work)
    made = {name: jax.jit(f)(*operands[name]) for name, f in programs.items()}
    batch = operands["ours"][1]
    for full, ours in zip(made["full"], made["ours"], strict=True):
        np.testing.assert_allclose(full[:, 9:], batch.gathered(np.asarray(ours)), atol=1e-5)


@pytest.mark.slow
def test_rows_of_adapters():
    rows = list(gradient.adapter(1, width=64, layers=2, rank=2))
    assert [row["measure"] for row in rows] == ["attached_over_merged", "attached_over_full"]
    for row in rows:
        attached, other = row["seconds"].values()
        assert row["value"] == pytest.approx(attached / other, rel=0.02) and all(row["temporary_bytes"].values())
