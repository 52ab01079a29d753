"""Replayed experts: what is recomputed, bit-identical passes, gates and gradients by hand, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.data import packing
from rl.estimate import completion_scores
from rl.models.experts import Experts, id_dtype
from rl.models.presets import make
from rl.rollout import engine
from rl.rollout.routing import changed, recompute
from tests.rl.models.tiny import SHAPES
from tests.rl.rollout.routed import SETTINGS, asked, expected, prepared, run, whole


@pytest.mark.slow
def test_recomputed_experts_are_those_recorded():
    model, params = prepared()
    got, requests = whole(), asked()
    for batch in (3, None, 1):
        chosen = recompute(model, params, requests, got, batch=batch)
        np.testing.assert_array_equal(chosen, expected(requests, got, newest=True))
    assert chosen.dtype == got.experts.dtype and changed(chosen, got.experts) == {
        "routing/decisions": 0, "routing/tokens": 0,
    }  # fmt: skip
    none = recompute(model, params, requests.take([]), got.take([]))
    assert none.shape == (0, *got.experts.shape[1:])


@functools.cache
def routed(model):
    return jax.jit(model.routed)


def sequence():
    """(ids [n], experts [layers, n, 2], prompt length, the sampler's log-probs) of the row with the longest completion."""
    requests, got = asked(), whole()
    row = int(got.length.argmax())
    n, m, columns = int(requests.prompt_length[row]), int(got.length[row]), requests.prompt.shape[1]
    at = [*range(n), *range(columns, columns + m)]
    return (
        jnp.asarray([*requests.prompt[row, :n], *got.tokens[row, :m]]),
        got.experts[row, at].swapaxes(0, 1),
        n,
        got.logp[row, :m],
    )


def logp(model, params, ids, experts=None):
    hidden = model.forward(params, ids, experts=experts)[0]
    return jnp.take_along_axis(jax.nn.log_softmax(model.head(params, hidden[:-1])), ids[1:, None], 1)[:, 0]


def test_forcing_the_record_is_bit_identical_and_reproduces_the_samplers_log_probs():
    model, params = prepared()
    ids, experts, n, sampled = sequence()
    run = jax.jit(functools.partial(logp, model))
    plain, forced = run(params, ids), run(params, ids, experts)
    np.testing.assert_array_equal(forced, plain)
    assert len(sampled) > 12
    np.testing.assert_allclose(forced[n - 1 :], sampled, atol=1e-5)
    # a record one token late is another policy
    assert np.abs(run(params, ids, np.roll(experts, 1, axis=1)) - plain).max() > 0.05


@pytest.mark.slow
def test_the_learner_replays_what_the_sampler_recorded():
    """From the engine through packed rows to the log-probabilities of the learner, several sequences to a row."""
    model, params = prepared()
    got, requests = whole(), asked()
    sizes = packing.shape(128, longest_prompt=31, longest=31, capacity=128)

    def gap(experts, params=params):
        batch = packing.micro_batches(
            requests.prompt, requests.prompt_length, got.tokens, got.length, sizes, experts=experts
        )
        scores = np.asarray(completion_scores(model, params, batch)[0])
        return np.abs(np.where(got.mask, batch.gathered(scores) - got.logp, 0)).max()

    assert gap(got.experts) < 1e-5 and gap(recompute(model, params, requests, got)) < 1e-5
    assert gap(np.roll(got.experts, 1, axis=1)) > 0.05
    # a router that turned round would choose the other experts; what was recorded keeps the policy near
    kernel = params["layers"]["moe"]["router"]["kernel"]
    router = {"kernel": -0.05 * kernel}  # nearly even gates
    turned = {**params, "layers": {**params["layers"], "moe": {**params["layers"]["moe"], "router": router}}}
    assert 1.3 * gap(got.experts, turned) < gap(None, turned)


@pytest.mark.optimised
def test_one_step_with_recomputed_experts_has_the_same_gradient():
    model, params = prepared()
    ids = sequence()[0]
    chosen = routed(model)(params, ids)[2]
    gradient = jax.jit(jax.grad(lambda params, experts: logp(model, params, ids, experts).sum()))
    plain, forced = gradient(params, None), gradient(params, chosen)
    jax.tree.map(np.testing.assert_array_equal, forced, plain)
    assert np.abs(plain["layers"]["moe"]["router"]["kernel"]).max() > 1e-3
    # after a step the router itself chooses otherwise; forced, it does not, and it still learns
    moved = jax.tree.map(lambda p, g: p + 0.1 * g, params, plain)
    own, used = routed(model)(moved, ids)[2], routed(model)(moved, ids, experts=chosen)[2]
    np.testing.assert_array_equal(used, chosen)
    assert (np.sort(own) != np.sort(chosen)).any()
    assert np.abs(gradient(moved, chosen)["layers"]["moe"]["router"]["kernel"]).max() > 1e-3


def gates(scores, forced, normalise=True):
    """g [5] of router logits `scores` [5]: experts whose output is the unit vector of their number."""
    module = Experts(5, 2, 1, normalise, "float32")
    one = 1 / (1 + np.exp(-1.0))  # silu(1)
    params = {
        "router": {"kernel": jnp.zeros((5, 5)).at[0].set(scores)},
        "experts_gate": jnp.ones((5, 5, 1)),
        "experts_up": jnp.full((5, 5, 1), 1 / one),
        "experts_down": jnp.eye(5)[:, None, :],
    }
    x = jnp.eye(5)[:1]  # logits are the first row of the kernel
    return module.apply({"params": params}, x, None if forced is None else jnp.array([forced]))[0][0]


@pytest.mark.slow
def test_gates_of_a_forced_set_by_hand():
    scores = jnp.array([2.0, 0.0, 1.0, -1.0, 0.5])
    np.testing.assert_allclose(gates(scores, None), [0.7310586, 0, 0.2689414, 0, 0], atol=1e-6)  # softmax(2, 1)
    g = gates(scores, [4, 1])
    np.testing.assert_allclose(g, [0, 0.3775407, 0, 0, 0.6224593], atol=1e-6)  # softmax(0, 1/2)
    np.testing.assert_allclose(g.sum(), 1, atol=1e-6)
    jacobian = np.asarray(jax.jacrev(gates)(scores, [4, 1]))
    assert (jacobian[:, [0, 2, 3]] == 0).all()
    np.testing.assert_allclose(jacobian[np.ix_([1, 4], [1, 4])], 0.2350037 * np.array([[1, -1], [-1, 1]]), atol=1e-6)
    # however improbable the set has become under the router
    far = scores.at[0].set(300.0)
    np.testing.assert_allclose(gates(far, [4, 1]), g, atol=1e-6)
    np.testing.assert_allclose(jax.jacrev(gates)(far, [4, 1]), jacobian, atol=1e-6)
    # not rescaled, the gates are probabilities under all experts: exp(0, 1/2) / sum exp(s)
    total = np.exp(np.asarray(scores, np.float64)).sum()
    np.testing.assert_allclose(
        gates(scores, [4, 1], normalise=False), [0, 1 / total, 0, 0, np.exp(0.5) / total], atol=1e-6
    )


def test_tokens_without_a_record_are_left_to_the_router():
    model, params = prepared()
    ids = sequence()[0]
    own = np.array(routed(model)(params, ids)[2])
    forced = (own + 1) % 5
    forced[:, 6:] = -1
    run = routed(model)
    hidden, _, used = run(params, ids, experts=forced.astype(np.int8))
    np.testing.assert_array_equal(used[:, :6], forced[:, :6])
    np.testing.assert_array_equal(used[0, 6:], own[0, 6:])  # the first layer's router reads the same as before
    assert np.isfinite(hidden).all() and (used >= 0).all()
    nothing = run(params, ids, experts=np.full_like(own, -1))
    np.testing.assert_array_equal(nothing[2], own)
    np.testing.assert_array_equal(nothing[0], run(params, ids)[0])


def test_how_much_two_routings_differ():
    one = np.full((2, 3, 2, 2), -1, np.int8)
    one[:, :2] = [[[0, 1], [2, 3]], [[4, 0], [1, 2]]]
    other = one[..., ::-1].copy()  # the same sets
    assert changed(one, other) == {"routing/decisions": 0.0, "routing/tokens": 0.0}
    other[0, 0, 1], other[1, 0, 0], other[1, 0, 1] = [2, 4], [3, 1], [0, 1]
    other[1, 1] = -1  # a token that one of them lacks: 3 tokens of 2 layers are left
    assert changed(one, other) == {"routing/decisions": 3 / 6, "routing/tokens": 2 / 3}
    assert changed(one[:0], one[:0]) == {"routing/decisions": 0.0, "routing/tokens": 0.0}
    with pytest.raises(ValueError, match=r"must have one shape; got \(2, 3, 2, 2\) and \(1, 3, 2, 2\)"):
        changed(one, one[:1])


def test_ids_are_held_in_the_smallest_type():
    sizes = {2: "int8", 128: "int8", 129: "int16", 2**15: "int16", 2**15 + 1: "int32"}
    assert {n: id_dtype(n).name for n in sizes} == sizes


# -- mistakes --------------------------------------------------------------------------------------------------------


def test_models_without_experts_record_none():
    message = "record_experts needs a mixture of experts; this model has none: set record_experts=False"
    with pytest.raises(ValueError, match=message):
        run(name="dense")
    rwkv = make(SHAPES["rwkv7"])
    with pytest.raises(ValueError, match=message):
        engine.init(rwkv, SETTINGS)
    with pytest.raises(ValueError, match="only a mixture of experts has experts to recompute"):
        recompute(rwkv, {}, asked(), whole())
    with pytest.raises(ValueError, match="record_experts must be True or False; got 1"):
        dataclasses.replace(SETTINGS, record_experts=1)


@pytest.mark.parametrize("name", ["scanned", "one dense layer"])
def test_ids_that_cannot_be_forced(name):
    model, params = prepared(name)
    layers, ids = model.config.layers, jnp.arange(4)
    good = np.zeros((layers, 4, 2), np.int8) + np.array([0, 1], np.int8)
    for value in (5, -2, 100):
        bad = good.copy()
        bad[1, 2, 0], bad[1, 3, 1] = value, value
        with pytest.raises(
            ValueError, match=rf"ids 0 to 4, or -1 .*; got {value} in layer 1 at token 2 \(2 such ids\)"
        ):
            model.forward(params, ids, experts=jnp.asarray(bad))
    with pytest.raises(ValueError, match=rf"\({layers}, 4, 2\); got \({layers}, 3, 2\)"):
        model.forward(params, ids, experts=good[:, :3])
    with pytest.raises(ValueError, match="must be integer ids; got float32"):
        model.routed(params, ids, experts=good.astype(np.float32))
    # where their values cannot be seen they are loud instead
    bad = good.copy()
    bad[0, 2, 1] = 5
    hidden = jax.jit(model.forward)(params, ids, experts=jnp.asarray(bad))[0]
    assert np.isnan(hidden[2:]).all()
