"""What answers are worth, by hand; norms by the logits; settings that are refused."""

import dataclasses
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import build
from rl import config as config_lib
from rl.config import ConfigError
from rl.data.packing import micro_batches
from rl.data.prompts import Prompts
from rl.data.replay import Groups
from rl.learners import credit
from rl.learners.settings import Settings
from rl.models.presets import make
from rl.objectives.policy_gradient import Objective
from rl.objectives.presets import PRESETS
from tests.experiments.tiny_train import ROOT
from tests.rl.learners import toy
from tests.rl.models.tiny import close

FREE = Objective(low=0.2, high=0.2)
STOP, LONGEST = 9, 4
# two groups of three answers: stopped, stopped, out of budget; stopped at the very end, unjudged, without a token
GROUPS = Groups(
    problem=np.array([0, 1], np.int32),
    tokens=np.array([[[1, 9, 0, 0], [1, 2, 9, 0], [1, 2, 3, 4]], [[1, 2, 3, 9], [1, 9, 0, 0], [0, 0, 0, 0]]], np.int32),
    length=np.array([[2, 3, 4], [4, 2, 0]], np.int32),
    logp=-np.arange(24, dtype=np.float32).reshape(2, 3, 4) / 8,
    version=np.full((2, 3, 4), 3, np.int32),
    value=np.array([[1, 0, 0.5], [1, 0, 1]], np.float32),
    ok=np.array([[True, True, True], [True, False, True]]),
)
THERE = np.arange(4) < GROUPS.length[..., None]


def assigned(objective=FREE, advantage="group_mean", *, step=5, updates=1, shift=None, **changes):
    """(credit, policies that were scored); a policy is a number, by which its log-probabilities exceed the sampler's."""
    asked = []

    def score(kind):
        def of(policy):
            asked.append((kind, policy))
            return GROUPS.logp + np.float32(policy)

        return of

    out, _ = credit.assign(
        Settings(objective, advantage, **changes), GROUPS, step, longest=LONGEST, stop=(STOP,), own=score("own"),
        free=score("free"), policies=shift or (0.5, 0.25, 0.125), updates=updates,
    )  # fmt: skip
    return out, asked


def test_tokens_of_judged_answers_count():
    out, asked = assigned()
    assert asked == [] and set(out) == {"mask", "behaviour", "counted", "advantage"}
    assert out["counted"].tolist() == GROUPS.ok.tolist()
    np.testing.assert_array_equal(out["mask"], THERE & GROUPS.ok[..., None])
    np.testing.assert_array_equal(out["behaviour"], GROUPS.logp)
    # by hand: means 0.5 and (of the judged) 1
    wanted = np.array([[0.5, -0.5, 0], [0, 0, 0]])[..., None] * out["mask"]
    np.testing.assert_array_equal(out["advantage"], wanted)


def test_groups_without_spread_may_count_nowhere():
    out, _ = assigned(informative_only=True)
    assert out["counted"].tolist() == [[True] * 3, [False] * 3] and not out["mask"][1].any()
    np.testing.assert_array_equal(out["mask"][0], THERE[0])


def test_truncated_answers_teach_nothing_but_count_in_statistics():
    out, _ = assigned(drop_truncated=True)
    assert out["mask"].any(axis=-1).tolist() == [
        [True, True, False],
        [True, False, False],
    ]  # the last one ended by itself
    assert out["counted"].tolist() == GROUPS.ok.tolist()
    np.testing.assert_array_equal(out["advantage"][0, :2, 0], [0.5, -0.5])  # mean 0.5 of all three
    opo, _ = assigned(advantage="length_weighted", drop_truncated=True)
    close(opo["advantage"][0, 0, 0], 1 - (2 * 1 + 3 * 0 + 4 * 0.5) / 9, 1e-6)


def test_the_overlong_penalty_is_part_of_the_reward():
    # from 2 tokens on, half a point per token: rewards (1, -0.5, -0.5), mean 0
    out, _ = assigned(overlong=2)
    close(out["advantage"][0, :, 0], [1, -0.5, -0.5], 1e-6)


@pytest.mark.parametrize(
    ("proximal", "updates", "wanted", "asked"),
    [
        ("recompute", 1, None, []),
        ("recompute", 2, GROUPS.logp + np.float32(0.5), [("own", 0.5)]),
        ("sampler", 1, GROUPS.logp, []),
        ("interpolated", 2, np.full((2, 3, 4), 3.0), []),  # written by version 3, the sixth step makes version 6
    ],
)
def test_the_proximal_policy(proximal, updates, wanted, asked):
    out, found = assigned(proximal=proximal, updates=updates)
    assert found == asked
    if wanted is None:
        assert "proximal" not in out
    else:
        np.testing.assert_array_equal(out["proximal"], wanted)


def test_the_reference_routes_for_itself_and_shares_with_the_step_before():
    anchored = dataclasses.replace(FREE, kl=0.1)
    out, asked = assigned(anchored)
    assert asked == [("free", 0.25)] and "previous" not in out
    np.testing.assert_array_equal(out["reference"], GROUPS.logp + np.float32(0.25))
    out, asked = assigned(anchored, kl_convex=True, step=50)
    assert asked == [("free", 0.25)] and (out["share"] == 1).all() and out["previous"] is out["reference"]
    out, asked = assigned(anchored, kl_convex=True, step=61)
    assert asked == [("free", 0.25), ("free", 0.125)]
    np.testing.assert_array_equal(out["share"], np.full((2, 3), 0.8, np.float32))
    np.testing.assert_array_equal(out["previous"], GROUPS.logp + np.float32(0.125))


def test_kl_in_the_reward():
    """Every token is 0.5 - 0.25 nats from the reference: 0.2 of it, times tokens, is 0.1, 0.15 and 0.2 of reward."""
    out, asked = assigned(advantage="leave_one_out", kl_in_reward=0.4)
    assert asked == [("free", 0.25), ("own", 0.5)] and "reference" in out  # its distance is a metric of the loss
    value = np.array([1 - 0.2, 0 - 0.3, 0.5 - 0.4])
    close(out["advantage"][0, :, 0], [value[i] - np.delete(value, i).mean() for i in range(3)], 1e-6)
    close(out["advantage"][1, 0, 0], 1 - 0.4 - 1, 1e-6)
    _, asked = assigned(advantage="leave_one_out", kl_in_reward=0.4, proximal="sampler")
    assert asked == [("free", 0.25)]  # the sampler's log-probabilities are the policy's
    # per token: the return of token t is R - 0.1 (tokens from t on), whitened over all tokens that count
    out, _ = assigned(advantage="whitened_returns", kl_in_reward=0.4)
    returns = (GROUPS.value[..., None] - 0.1 * (GROUPS.length[..., None] - np.arange(4)))[out["mask"]]
    close(out["advantage"][out["mask"]], (returns - returns.mean()) / (returns.std() + 1e-6), 1e-5)


def test_an_interpolated_policy_by_hand():
    """The card's numbers: written by 3, version 6: -2 + 2/3 (-1.5 + 2) = -1.666667; of the proximal version: the sampler."""
    one = lambda x: jnp.array([[x]])
    for age, wanted in ((3.0, -1.666667), (1.0, -2.0), (2.0, -1.75)):
        micro = SimpleNamespace(
            mask=one(True), advantage=one(1.0), behaviour=one(-2.0), proximal=one(age), reference=None,
            counted=jnp.array([True]), previous=None, share=None,
        )  # fmt: skip
        close(credit.interpolated(micro, one(-1.5)).proximal, one(wanted), 1e-6)


def test_norms_by_the_logits_are_those_of_full_logits():
    model, params = toy.start()
    batch = toy.answers(spread=0.3)
    rows = np.repeat(batch.problem, toy.G)
    logp, _, agree = map(np.asarray, toy.scores(model, params, rows, batch.rollouts.tokens))
    prompt, length = toy.gradient.pad(toy.PROMPTS)
    mask = batch.rollouts.mask.copy()
    mask[0, 0] = False
    counted = np.arange(len(rows)) != 3
    packed = micro_batches(prompt[rows], length[rows], batch.rollouts.tokens, batch.rollouts.length, toy.SHAPE)
    packed = packed.credit(mask=mask, advantage=np.ones(len(rows)), behaviour=batch.rollouts.logp, counted=counted)
    norms, weight = credit.logit_norms(model, params, packed, temperature=1.0)
    mask &= counted[:, None]
    # |onehot - pi|^2 = 1 - 2 pi_t + sum pi^2
    close(packed.gathered(np.asarray(norms)), np.where(mask, 1 - 2 * np.exp(logp) + agree, 0).sum(1), 1e-5)
    close(packed.gathered(np.asarray(weight)), np.where(mask, logp - batch.rollouts.logp, 0).sum(1), 1e-5)


# -- what is refused -------------------------------------------------------------------------------------------------

MISTAKES = {
    "gradient.proximal=old": "proximal must be one of recompute, sampler, interpolated; got 'old'",
    "gradient.norms=l2": "norms must be one of exact, logits, equal; got 'l2'",
    "gradient.routing=r4": "routing must be one of none, r2, r3; got 'r4'",
    "gradient.routing=r2": "only a mixture of experts has a routing to replay; got routing 'r2'",
    "gradient.objective.kl=-0.1": "kl is the coefficient of a penalty, at least 0; got -0.1",
    "gradient.minibatches=0": "minibatches must be at least 1",
    "gradient.minibatches=3": "got config.prompts = 64 and config.gradient.minibatches = 3",
    "gradient.staleness=-1": "staleness must be at least 0; got -1",
    "gradient.overlong=13": "overlong must be at most the budget, 12 tokens; got 13",
    "gradient.step_scale=1.5": "at most 1; got 1.5",
    "gradient.kl_in_reward=-0.1": "kl_in_reward must be at least 0; got -0.1",
    "gradient.kl_convex=True": "the objective's coefficient kl is 0: set it above 0",
    "gradient.kl_in_reward=0.1 gradient.objective.kl=0.1": "in the reward or in the loss; got kl_in_reward 0.1",
    "gradient.advantage=best": "advantage must be one of reward, group_std",
    "gradient.limit=0": "limit must be at least 1; got 0",
    "gradient.tokens=8": "at least one row of",
    "samples=1": "compares the samples of a prompt, so it needs at least 2; got 1",
    "sampling.temperature=0.0": "got temperature 0.0: raise it above 0",
    "sampling.top_k=3": "got sampling with top_k, top_p or min_p",
    "gradient.remat=True": "config.model.scan_layers = False: set both or neither",
    "gradient.objective.aggregation=constant": "longest belongs to the aggregation 'constant'",
}


def built(*overrides, variant="", config=toy.CONFIG):
    recipe = config_lib.load(f"{ROOT / 'configs' / 'countdown_grpo.py'}:{variant}", overrides)
    return build.learner(recipe, make(config), Prompts([None] * len(toy.PROMPTS), toy.PROMPTS), (0,))


@pytest.mark.parametrize("overrides", MISTAKES)
def test_a_mistake_is_refused_before_the_run(overrides):
    with pytest.raises(ConfigError) as error:
        built(*overrides.split())
    assert MISTAKES[overrides] in str(error.value)


def test_signs_that_turn_a_step_round_are_refused():
    for override, message in (
        ("gradient.max_grad_norm=-1.0", "config.gradient.max_grad_norm must be at least 0, not -1.0"),
        ("gradient.lora.alpha=-16.0", "config.gradient.lora.alpha must be greater than 0, not -16.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            build.check(config_lib.load(f"{ROOT / 'configs' / 'countdown_grpo.py'}", [override]))


def test_schedules_count_steps_whatever_number_of_updates_they_have():
    """Cosine to 0 over 120 steps of 2 updates: 1/2 (1 + cos(pi u / 240)) of the rate at update u."""
    config = config_lib.load(f"{ROOT / 'configs' / 'countdown_grpo.py'}", ["optimizer.name=sgd", "steps=120"])
    tx, gradient = build.optimizer(config, updates=2), np.ones(1, np.float32)
    state, rates = tx.init(gradient), []
    for _ in range(241):
        updates, state = tx.update(gradient, state)
        rates.append(-float(updates[0]))
    np.testing.assert_allclose(rates, 1e-4 * (1 + np.cos(np.pi * np.arange(241) / 240)), rtol=1e-4, atol=1e-9)


def test_the_two_switches_of_a_reincarnation_agree():
    with pytest.raises(ConfigError, match="config.replay.until = 50 and config.gradient.reincarnation = 80"):
        built("gradient.reincarnation=80", variant="remix")


def test_every_method_is_built_and_replay_excludes_r3():
    for name in PRESETS:
        assert built(variant=name).members == 0
    scanned = dataclasses.replace(toy.CONFIG, scan_layers=True)
    assert built("gradient.remat=True", "gradient.lora.rank=2", config=scanned).record_experts is False
    assert built("gradient.routing=r3", config=toy.MOE).record_experts
    assert built("gradient.routing=r2", variant="dots_rr", config=toy.MOE).record_experts is False
    with pytest.raises(
        ConfigError, match="config.replay.name = 'fifo': set it to 'none', or config.gradient.routing to 'r2'"
    ):
        built("gradient.routing=r3", variant="dots_rr", config=toy.MOE)
