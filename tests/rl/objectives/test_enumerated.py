"""Expected gradients over every sequence of a small policy: what is unbiased, and how biased the rest is."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.objectives.advantages import ADVANTAGES
from rl.objectives.policy_gradient import Credit, Objective, loss
from rl.objectives.weights import Weight

SEQUENCES = np.array(list(itertools.product(range(3), repeat=2)))  # two tokens of three symbols
REWARD = np.array([1.0, 0.2, -0.3, 0.0, 0.8, 0.5, -1.0, 0.4, 0.1])


def policy(seed, noise=0.0, base=None):
    """(logits of the first token [3], of the second given the first [3, 3])."""
    r = np.random.default_rng(seed)
    made = [r.normal(size=3), r.normal(size=(3, 3))]
    if base is None:
        return made
    return [x + noise * y for x, y in zip(base, made, strict=True)]


def logp(params):
    first, second = (jax.nn.log_softmax(jnp.asarray(x), axis=-1) for x in params)
    return jnp.stack([first[SEQUENCES[:, 0]], second[SEQUENCES[:, 0], SEQUENCES[:, 1]]], axis=1)


def flat(tree):
    return np.concatenate([np.ravel(x) for x in tree])


def true_gradient(params):
    return flat(jax.grad(lambda p: jnp.exp(logp(p).sum(1)) @ REWARD)([jnp.asarray(x) for x in params]))


@functools.partial(jax.jit, static_argnums=0)
def _gradient(objective, params, sampler):
    behaviour = logp(sampler)
    advantage = jnp.broadcast_to((REWARD * jnp.exp(behaviour.sum(1)) * 9)[:, None], (9, 2))

    def j(params):
        out = loss(objective, logp(params), jnp.zeros((9, 2)), Credit(jnp.ones((9, 2), bool), advantage, behaviour))
        return -out.numerator / out.denominator

    return jax.grad(j)(params)


def expected_gradient(objective, params, sampler):
    """Of J over sequences drawn from the sampler: each stands once, its advantage times its chance and their number."""
    return flat(_gradient(objective, *([jnp.asarray(x) for x in policy] for policy in (params, sampler))))


SUM = {"aggregation": "sequence_sum"}
FULL = [
    Objective(shape="ratio", weight=Weight(level="sequence"), **SUM),  # three policies, proximal = policy
    Objective(shape="score", weight=Weight(of="policy", level="sequence"), **SUM),
]
TOKEN = [
    Objective(shape="ratio", weight=Weight(), **SUM),
    Objective(shape="score", weight=Weight(of="policy"), **SUM),
]


@pytest.mark.parametrize("objective", FULL)
def test_sequence_weights_are_unbiased(objective):
    params = policy(0)
    sampler = policy(1, 0.7, params)
    with jax.enable_x64(True):
        np.testing.assert_allclose(expected_gradient(objective, params, sampler), true_gradient(params), atol=1e-12)
        # without the weight it is another gradient
        plain = expected_gradient(Objective(shape="ratio", **SUM), params, sampler)
        assert np.abs(plain - true_gradient(params)).max() > 0.02


@pytest.mark.parametrize("objective", TOKEN)
def test_token_weights_err_in_proportion_to_the_mismatch(objective):
    params = policy(0)
    with jax.enable_x64(True):
        errors = []
        for noise in (0.2, 0.1, 0.05, 0.025, 0.0):
            got = expected_gradient(objective, params, policy(1, noise, params))
            errors.append(np.linalg.norm(got - true_gradient(params)))
        assert errors[0] > 1e-3 and errors[-1] < 1e-12
        np.testing.assert_allclose(np.divide(errors[:3], errors[1:4]), 2, rtol=0.15)


@pytest.mark.parametrize("objective", TOKEN)
def test_token_weights_of_one_token_are_exact(objective):
    """The first tokens alone: a reward that depends on them only, and answers of one token."""
    params, sampler = policy(0), policy(1, 0.7)
    with jax.enable_x64(True):
        first = [jax.nn.log_softmax(jnp.asarray(x[0])) for x in (params, sampler)]
        reward = jnp.array([1.0, -0.5, 0.3])
        advantage = (reward * jnp.exp(first[1]) * 3)[:, None]
        credit = Credit(np.ones((3, 1), bool), advantage, first[1][:, None])

        def j(x):
            out = loss(objective, jax.nn.log_softmax(x)[:, None], jnp.zeros((3, 1)), credit)
            return -out.numerator / out.denominator

        x = jnp.asarray(params[0])
        np.testing.assert_allclose(
            jax.jit(jax.grad(j))(x), jax.grad(lambda x: jax.nn.softmax(x) @ reward)(x), atol=1e-12
        )


def test_first_order_of_a_product():
    """Ratios 1.01, 0.98, 1.005: the product is 0.994749, the sum of what they add to 1 gives 0.995."""
    log = jnp.log(jnp.array([[1.01, 0.98, 1.005]]))
    credit = Credit(jnp.ones((1, 3), bool), jnp.ones((1, 3)), jnp.zeros((1, 3)), jnp.zeros((1, 3)))
    out = loss(Objective(shape="ratio", **SUM), log, log, credit)
    assert -out.numerator - 2 == pytest.approx(0.995, abs=1e-6)
    assert jnp.exp(out.log_weight[0]) == pytest.approx(0.994749, abs=1e-6)


def group_gradient(name, chance, samples):
    """Expected gradient of the log-odds of a success, over every group of binary rewards; without advantages p (1 - p)."""
    groups = np.array(list(itertools.product((0.0, 1.0), repeat=samples)))
    ok, mask = np.ones(groups.shape, bool), np.ones((groups.size, 1), bool)
    advantage = np.array(ADVANTAGES[name](groups, ok, mask), np.float64).reshape(groups.shape)
    score = groups - chance  # d logp / d log-odds
    likely = chance ** groups.sum(1) * (1 - chance) ** (samples - groups.sum(1))
    return likely @ (advantage * score).mean(1)


@pytest.mark.parametrize("chance", [0.5, 0.1, 0.8])
def test_group_baselines(chance):
    true = chance * (1 - chance)
    assert group_gradient("reward", chance, 4) == pytest.approx(true, rel=1e-6)
    assert group_gradient("leave_one_out", chance, 4) == pytest.approx(true, rel=1e-6)
    assert group_gradient("group_mean", chance, 4) == pytest.approx(0.75 * true, rel=1e-6)


def test_std_weighs_prompts():
    """Dividing by the std favours the nearly solved and the nearly unsolved: no common factor."""
    factor = [group_gradient("group_std", p, 8) / (p * (1 - p)) for p in (0.5, 0.1, 0.9)]
    assert factor[1] == pytest.approx(factor[2], rel=1e-5) and factor[1] > 1.1 * factor[0]
