"""Steps of the gradient learner: against one written out, and everything the learner adds around the objective."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from rl import lora, slots
from rl.data.replay import Groups, Shape
from rl.learners.gradient import Lora, NonFinite, Settings
from rl.objectives.policy_gradient import Objective
from rl.objectives.presets import PRESETS
from tests.rl.learners.toy import (
    SEED,
    G,
    L,
    P,
    answers,
    made,
    optimizer,
    plain_grpo,
    scores,
    start,
)
from tests.rl.models.tiny import close, trees_close

GRPO = PRESETS["grpo"]
FREE = dataclasses.replace(GRPO.objective, kl=0.0)
equal = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)


def settings(objective=GRPO.objective, advantage="group_std", **changes):
    return Settings(objective, advantage, **changes)


def order(step, epoch, count):
    """The parts of an epoch, in an order of its own."""
    drawn = np.random.Generator(np.random.PCG64([SEED, step, epoch])).permutation(P)
    return [sorted(part) for part in np.split(drawn, count)]


# -- a step ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("minibatches", "epochs"), [(1, 1), (2, 2)])
def test_two_steps_are_the_plain_computation(minibatches, epochs):
    model, params = start()
    method = made(settings(minibatches=minibatches, epochs=epochs), 0.15)
    state, tx = method.init(params), optimizer(0.15)
    plain, opt_state = params, tx.init(params)
    for step in range(2):
        batch = answers(step, problem=(0, 1, 2, 3) if step == 0 else (5, 2, 4, 0))
        parts = [range(P)] if minibatches == 1 else [p for e in range(epochs) for p in order(step, e, minibatches)]
        plain, opt_state, measured = plain_grpo(
            model, plain, batch, tx, opt_state, reference=params, kl=0.04, parts=parts
        )
        state, metrics = method.learn(state, batch, None)
        trees_close(state.params, plain, 2e-5)
        objective, kl, clipped = zip(*measured, strict=True)
        close(metrics["objective"], np.mean(objective), 1e-5)  # parts of equally many answers
        if minibatches == 1:
            close(metrics["kl_reference"], kl[0], 1e-5)
        else:
            assert max(clipped) > 0 and metrics["clip_fraction"] > 0 and metrics["ratio_max"] > 1.2
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), params, state.params)
    assert min(jax.tree.leaves(moved)) > 1e-3 and int(state.step) == 2


def test_the_first_update_on_policy_has_ratio_one_and_no_kl_exactly():
    _, params = start()
    method = made(settings())
    _, metrics = method.learn(method.init(params), answers(spread=0.0), None)
    assert [metrics[name] for name in ("ratio", "ratio_max", "weight", "step_scale")] == [1, 1, 1, 1]
    assert [metrics[name] for name in ("kl_reference", "clip_fraction", "skipped", "replayed_groups", "age")] == [0] * 5
    assert metrics["sampler_gap_max"] < 1e-5 and abs(metrics["ess"] - 1) < 1e-6 and metrics["gradient_norm"] > 0.01
    value = answers().scored.value.reshape(P, G)
    advantage = (value - value.mean(1, keepdims=True)) / value.std(1, ddof=1, keepdims=True)
    length = answers().rollouts.length.reshape(P, G)
    close(metrics["advantage_size"], (np.abs(advantage) * length).sum() / length.sum(), 1e-5)


MINIRL = settings(PRESETS["minirl"].objective, "group_mean", proximal="interpolated")


def test_metrics_tell_how_far_the_sampler_is():
    """Old answers; the proximal policy lies between sampler and policy, a token's age decides where."""
    model, params = start()
    batch = answers(spread=0.3, version=-2, value=[1, 0, 0] * 3 + [1, 1, 1])
    method = made(MINIRL)
    _, metrics = method.learn(method.init(params), batch, None)
    logp, entropy, _ = map(np.asarray, scores(model, params, np.repeat(batch.problem, G), batch.rollouts.tokens))
    mask = batch.rollouts.mask
    gap = np.where(mask, logp - batch.rollouts.logp, 0)
    close(metrics["kl_behaviour"], -gap[mask].mean(), 1e-5)
    close(metrics["weight"], np.minimum(np.exp(gap), 5)[mask].mean(), 1e-5)
    close(metrics["weight_max"], np.exp(gap).max(), 1e-5)
    close(metrics["entropy"], entropy[mask].mean(), 1e-5)
    w = np.exp(gap.sum(axis=1))
    close(metrics["ess"], w.sum() ** 2 / (w**2).sum() / len(w), 1e-5)
    assert metrics["zero_spread_groups"] == 0.25 and metrics["age"] == 2
    # written by version -2, and the first step makes version 1: of age 3, so the proximal policy is 2/3 of the way
    close(metrics["sampler_gap"], 2 / 3 * np.abs(gap[mask]).mean(), 1e-5)
    close(metrics["sampler_gap_max"], 2 / 3 * np.abs(gap).max(), 1e-5)
    close(metrics["ratio"], np.exp(gap / 3)[mask].mean(), 1e-5)


def test_the_step_is_scaled_by_the_effective_samples():
    _, params = start()
    batch = answers(spread=0.5)
    (whole, _), (scaled, metrics) = (
        method.learn(method.init(params), batch, None)
        for method in (made(MINIRL), made(dataclasses.replace(MINIRL, step_scale=1.0)))
    )
    scale = metrics["step_scale"]
    close(scale, metrics["ess"] ** 0.5, 1e-6)
    assert scale < 0.95
    trees_close(scaled.params, jax.tree.map(lambda p, q: p + scale * (q - p), params, whole.params), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("norms", ["exact", "logits"])
def test_baselines_of_least_variance_see_penalised_rewards(norms):
    """VCPO: b* = sum w^2 n R / sum w^2 n, n by full logits or, exactly, one gradient per answer."""
    model, params = start()
    batch = answers(spread=0.5)
    changes = {"norms": norms, "overlong": 2}
    method = made(settings(PRESETS["vcpo"].objective, "minimum_variance", **changes))
    _, metrics = method.learn(method.init(params), batch, None)
    where, mask = (np.repeat(batch.problem, G), batch.rollouts.tokens), batch.rollouts.mask
    logp, _, agree = map(np.asarray, scores(model, params, *where))
    if norms == "logits":
        n = np.where(mask, 1 - 2 * np.exp(logp) + agree, 0).sum(1)
    else:
        total = lambda p: jax.numpy.where(mask, scores(model, p, *where)[0], 0).sum(1)
        n = sum(
            (np.asarray(x).reshape(P * G, -1) ** 2).sum(1) for x in jax.tree.leaves(jax.jit(jax.jacrev(total))(params))
        )
    w = np.exp(np.where(mask, logp - batch.rollouts.logp, 0).sum(1))
    length = batch.rollouts.length.reshape(P, G)
    value = batch.scored.value.reshape(P, G) - np.clip((length - 3) / 2, 0, 1)
    weight = (w**2 * n).reshape(P, G)
    baseline = (weight * value).sum(1, keepdims=True) / weight.sum(1, keepdims=True)
    advantage = (value - baseline) / value.std(1, keepdims=True)
    terms = np.where(mask, logp, 0).sum(1) / batch.rollouts.length * np.minimum(w, 8) * advantage.reshape(-1)
    close(metrics["objective"], terms.mean(), 1e-4)


@pytest.mark.slow
def test_scaling_steps_leaves_the_rate_and_the_optimizer_alone():
    """VCPO: the same batch twice is scaled the same, and what the optimizer keeps is of unscaled gradients."""
    _, params = start()
    batch, method = answers(spread=0.5), made(dataclasses.replace(MINIRL, step_scale=1.0), 0.0)
    plain = made(MINIRL, 0.0)
    state, plain_state, scales = method.init(params), plain.init(params), []
    for _ in range(2):  # at a rate of 0 the policy, and so the weights, stay
        state, metrics = method.learn(state, batch, None)
        plain_state, _ = plain.learn(plain_state, batch, None)
        scales.append(metrics["step_scale"])
    assert scales[0] == scales[1] < 0.95
    equal(state.params, params)
    trees_close(state.opt_state, plain_state.opt_state, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("sign", [-1, 1])
def test_log_ratios_of_a_thousand_leave_numbers_finite(sign):
    _, params = start()
    batch = answers(spread=0.5)
    far = batch.rollouts.logp.copy()
    far[::2] += np.float32(sign * 1e3)
    batch = batch._replace(rollouts=dataclasses.replace(batch.rollouts, logp=far))
    vcpo = settings(PRESETS["vcpo"].objective, "minimum_variance", norms="logits", step_scale=1.0)
    for method in (made(settings(FREE)), made(MINIRL), made(vcpo)):
        state, metrics = method.learn(method.init(params), batch, None)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params)), metrics
        assert all(np.isfinite(x) for x in metrics.values()) and metrics["skipped"] == 0


@pytest.mark.slow
def test_without_replay_and_selection_dots_rr_is_grpo():
    """sigma = 1: nothing is drawn from the buffer, and around a policy that is the sampler's the two objectives are one."""
    _, params = start()
    batch = answers(spread=0.0)
    buffer = slots.bind("rl.data.replay", slots.block("rl.data.replay", "fifo", fresh=1.0))
    memory, _ = buffer.update(
        buffer.init(Shape(P, G, L, 0)), 0, Groups.make(batch.problem, batch.rollouts, batch.scored)
    )
    assert buffer.apply(memory, 1, P) == (None, P)
    one, other = (
        made(settings(objective)) for objective in (PRESETS["dots_rr"].objective, Objective(low=0.2, high=0.2))
    )
    trees_close(
        one.learn(one.init(params), batch, None)[0].params, other.learn(other.init(params), batch, None)[0].params
    )


# -- policies of other steps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 1, 4])
def test_answers_come_from_exactly_the_policy_of_k_steps_ago(k):
    method = made(settings(FREE, staleness=k))
    state = method.init(start()[1])
    past = [jax.tree.map(np.array, state.params)]
    for step in range(7):
        weights, version = method.weights(state)
        assert version == max(0, step - k)
        equal(weights, past[version])
        equal(method.mean(state), past[-1])
        state, metrics = method.learn(state, answers(step, version=version), None)
        assert metrics["age"] == min(k, step)
        past.append(jax.tree.map(np.array, state.params))
    assert len({np.asarray(jax.tree.leaves(p)[0]).tobytes() for p in past}) == 8  # all of them differ


@pytest.mark.slow
def test_reincarnation_renews_the_reference_and_ends_the_epochs():
    method = made(settings(epochs=2, reincarnation=2, kl_convex=True))
    state, metrics = method.init(start()[1]), []
    for step in range(4):
        before, kept = jax.tree.map(np.array, (state.params, state.opt_state))
        old = jax.tree.map(np.array, state.reference)
        state, found = method.learn(state, answers(step), None)
        metrics.append(found)
        equal(state.reference, before if step == 2 else old)
        equal(state.previous, before)
        if step >= 2:  # momentum goes on: what is new in it is one clipped gradient
            fresh = jax.tree.map(lambda new, old: new - 0.9 * old, state.opt_state, kept)
            close(optax.tree.norm(fresh), min(1.0, found["gradient_norm"]), 1e-4)
            assert optax.tree.norm(kept) > 0.5
    # one update a step from then on, whose ratio is 1; the first begins at the reference itself
    assert [m["ratio"] == 1 for m in metrics] == [False, False, True, True]
    assert metrics[1]["kl_reference"] > 1e-3 < metrics[3]["kl_reference"] and metrics[2]["kl_reference"] == 0


# -- nothing to learn, and what cannot be learnt ---------------------------------------------------------------------


def test_where_nothing_is_to_be_learnt_parameters_stay_bit_equal():
    _, params = start()
    method = made(settings(FREE))
    nothing = answers(seed=1)
    empty = dataclasses.replace(nothing.rollouts, length=np.zeros(P * G, np.int32))
    cases = {
        "all rewards equal": answers(value=0.1),
        "nothing judged": answers(ok=False),
        "one answer of each group judged": answers(ok=[True, False, False] * P),
        "answers without a token": nothing._replace(rollouts=empty),
    }
    state = method.init(params)
    for name, batch in cases.items():
        state, metrics = method.learn(state, batch, None)
        equal(state.params, params)
        assert all(np.isfinite(x) for x in metrics.values()), (name, metrics)
        assert metrics["gradient_norm"] == 0 == metrics["skipped"], name


def test_an_unjudged_answer_is_as_if_it_were_not_there():
    """Three answers, one of them unjudged: the update of the two others, whatever the third one says."""
    _, params = start()
    method = made(settings(FREE))
    ok = np.tile([True, True, False], P)
    batch = answers(ok=ok)
    other = dataclasses.replace(
        batch.rollouts, tokens=np.where(ok[:, None], batch.rollouts.tokens, 1), logp=batch.rollouts.logp - ~ok[:, None]
    )
    one, metrics = method.learn(method.init(params), batch, None)
    two, _ = method.learn(method.init(params), batch._replace(rollouts=other), None)
    trees_close(one.params, two.params, 1e-6)
    # (0, 1) in every group: +-1/sqrt(2) by hand, a mean over sequences that are judged: 8, not 12
    mask = batch.rollouts.mask & ok[:, None]
    close(metrics["advantage_size"], np.full(mask.sum(), 0.5**0.5).mean(), 1e-5)
    close(metrics["objective"], 0, 1e-6)


def test_updates_that_are_not_finite_are_skipped_and_too_many_in_a_row_raise():
    """Without delta, the advantage of a group of equal rewards is 0 / 0; the third update has a step beyond all numbers."""
    _, params = start()
    method = made(settings(FREE, advantage_options=(("delta", 0.0),), minibatches=2), _third_too_far)
    bad, good = answers(value=1.0), answers(seed=3)
    state, metrics = method.learn(method.init(params), bad, None)
    equal(state.params, params)
    assert (int(state.skipped), metrics["skipped"], metrics["skipped_in_a_row"], int(state.step)) == (2, 1, 2, 1)
    state, metrics = method.learn(state, good, None)
    assert (int(state.skipped), metrics["skipped"], metrics["skipped_in_a_row"]) == (0, 0, 0)
    moved = jax.tree.map(np.array, state.params)
    assert np.abs(jax.tree.leaves(moved)[0] - jax.tree.leaves(params)[0]).max() > 1e-4
    state, metrics = method.learn(state, good, None)
    assert metrics["skipped"] == 1 and np.isfinite(metrics["gradient_norm"])  # the step alone is not finite
    equal(state.params, moved)
    with pytest.raises(
        NonFinite, match="4 updates in a row had no finite gradient.*the limit is 3.*learning rate"
    ) as e:
        method.learn(state, bad, None)
    np.testing.assert_array_equal(e.value.groups.tokens, bad.rollouts.tokens.reshape(P, G, L))


def _third_too_far(count):
    return jax.numpy.where(count == 2, 1e38, 0.5)


# -- what is mixed in ------------------------------------------------------------------------------------------------


def test_replayed_groups_are_learnt_from_as_fresh_ones():
    _, params = start()
    batch = answers(problem=(0, 1, 2, 3))
    groups = Groups.make(batch.problem, batch.rollouts, batch.scored)
    method = made(settings(minibatches=2, epochs=2), 0.15)
    whole, _ = method.learn(method.init(params), batch, None)
    mixed, metrics = method.learn(method.init(params), batch.take(np.arange(3)), groups.take(np.array([3])))
    equal(whole.params, mixed.params)
    assert metrics["replayed_groups"] == 1
    with pytest.raises(ValueError, match="got 5 groups and 2 minibatches"):
        method.learn(mixed, batch, groups.take(np.array([3])))


@pytest.mark.slow
def test_only_the_factors_of_an_adapter_learn():
    model, params = start()
    adapter = Lora(rank=2, alpha=6.0, pattern="kernel")
    method = made(settings(lora=adapter, staleness=1))
    state, tx = method.init(params), optimizer()
    equal(method.mean(state), params)
    factors = jax.tree.map(np.array, state.params)
    assert {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(factors)} == {"a", "b"}
    learning = sum(x.size for x in jax.tree.leaves(factors))
    assert (
        sum(x.size for x in jax.tree.leaves(state.opt_state))
        == learning
        == sum(x.size for x in jax.tree.leaves(state.history))
        < sum(x.size for x in jax.tree.leaves(params))
    )
    merge = lambda factors: lora.merge(params, factors, 6.0)
    plain, opt_state = factors, tx.init(factors)
    for step in range(2):
        batch = answers(step)
        plain, opt_state, _ = plain_grpo(
            model, plain, batch, tx, opt_state, reference=factors, kl=0.04, parts=[range(P)], merge=merge
        )
        before = jax.tree.map(np.array, method.mean(state))
        state, _ = method.learn(state, batch, None)
        trees_close(state.params, plain, 2e-5)
        equal(method.weights(state)[0], before)
    equal(state.base, params)
    trees_close(method.mean(state), merge(state.params), 1e-6)
