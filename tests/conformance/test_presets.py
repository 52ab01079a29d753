"""What every preset and every advantage keeps: found in `PRESETS` and `ADVANTAGES`, so none can be forgotten."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.objectives import policy_gradient
from rl.objectives.advantages import ADVANTAGES
from rl.objectives.policy_gradient import Credit
from rl.objectives.presets import PRESETS

P, G, L = 3, 4, 7
N = P * G
every_preset = pytest.mark.parametrize("name", list(PRESETS))
every_advantage = pytest.mark.parametrize("name", list(ADVANTAGES))


def verdicts(seed=0, prompts=P):
    """(rewards [P, G], ok): the first group all right, one answer unjudged."""
    random = np.random.default_rng(seed)
    rewards = random.integers(0, 2, (prompts, G)).astype(np.float32)
    rewards[0], rewards[1:, :2] = 1, [0, 1]
    ok = np.ones((prompts, G), bool)
    ok[1, 3] = False
    return rewards, ok


def batch(name, seed=0, spread=0.3):
    """(logp, entropy, credit) of N rows; lengths 0 to L, one row does not exist."""
    random = np.random.default_rng(100 + seed)
    draw = lambda scale, around=0.0: (around + scale * random.normal(size=(N, L))).astype(np.float32)
    behaviour = -np.abs(draw(1.0, -1.0))
    mask = np.arange(L) < random.permutation(np.resize(np.arange(L + 1), N))[:, None]
    mask[N - 1] = True
    rewards, ok = verdicts(seed)
    counted = np.arange(N) != N - 1  # a row that does not exist says otherwise
    credit = Credit(
        mask=mask, advantage=np.asarray(ADVANTAGES[PRESETS[name].advantage](rewards, ok, mask)), behaviour=behaviour,
        proximal=behaviour + draw(spread), reference=behaviour + draw(spread), counted=counted,
    )  # fmt: skip
    return behaviour + draw(spread), np.abs(draw(1.0)), jax.tree.map(jnp.asarray, credit)


@functools.cache
def compiled(name):
    """(logp, entropy, credit) -> (loss, gradients by logp and entropy, everything)."""
    objective = PRESETS[name].objective

    def mean(logp, entropy, credit):
        out = policy_gradient.loss(objective, logp, entropy, credit)
        return out.numerator / jnp.maximum(out.denominator, 1e-30), out

    def run(logp, entropy, credit):
        (value, out), gradients = jax.value_and_grad(mean, (0, 1), has_aux=True)(logp, entropy, credit)
        return value, gradients, out

    return jax.jit(run)


def live(credit):
    return np.asarray(credit.mask & credit.counted[:, None])


def poisoned(inputs, poison):
    logp, entropy, credit = inputs
    real = live(credit)
    dirty = lambda x: x if x is None or x.dtype == bool else jnp.where(real, x, poison)
    return dirty(logp), dirty(entropy), Credit(*map(dirty, credit))


def assert_finite(tree):
    for leaf in jax.tree.leaves(tree):
        assert np.isfinite(np.asarray(leaf, np.float32)).all()


def test_there_is_something_to_check():
    assert {"grpo", "dapo", "gspo", "rloo", "minirl", "remix", "dots_rr", "vcpo"} <= set(PRESETS)
    assert all(preset.about and preset.advantage in ADVANTAGES for preset in PRESETS.values())
    mask = live(batch("grpo")[2])
    assert mask.any() and not mask.all() and not mask.any(axis=1).all()


@every_preset
def test_compiles_once_and_means_what_it_means_without(name):
    run = compiled(name)
    first = run(*batch(name, 0))
    size = run._cache_size()
    run(*batch(name, 1))
    assert run._cache_size() == size
    with jax.disable_jit():  # with NaN where masked: compiling turns 0 * NaN into 0
        plain = run(*poisoned(batch(name, 0), np.nan))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), first, plain)
    assert_finite(first)
    assert np.abs(first[1][0]).max() > 1e-5  # it would move something


@every_preset
def test_half_precision_log_probs_give_single_precision_results(name):
    logp, entropy, credit = batch(name)
    half = lambda x: jnp.asarray(x, jnp.bfloat16)
    value, gradients, out = compiled(name)(half(logp), half(entropy), credit)
    assert {leaf.dtype for leaf in jax.tree.leaves((value, out))} == {jnp.dtype(jnp.float32)}
    same = compiled(name)(half(logp).astype(jnp.float32), half(entropy).astype(jnp.float32), credit)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), (value, out), (same[0], same[2]))
    for rounded, exact in zip(gradients, same[1], strict=True):
        assert rounded.dtype == jnp.bfloat16
        np.testing.assert_allclose(rounded.astype(jnp.float32), exact, rtol=2**-7, atol=1e-7)


def widened(x, rows, columns, fill):
    pad = [(0, rows), (0, columns)][: np.ndim(x)]
    return np.pad(np.asarray(x), pad, constant_values=fill)


@every_preset
def test_padding_of_rows_and_columns_does_not_matter(name):
    logp, entropy, credit = batch(name)
    more = lambda x, fill: None if x is None else jnp.asarray(widened(x, 2, 3, fill))
    wide = Credit(*(more(x, False if x is not None and x.dtype == bool else np.nan) for x in credit))
    value, gradients, out = compiled(name)(logp, entropy, credit)
    value_w, gradients_w, out_w = compiled(name)(more(logp, np.nan), more(entropy, np.inf), wide)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    close(value_w, value)
    jax.tree.map(close, (out_w.metrics, out_w.denominator, out_w.maxima), (out.metrics, out.denominator, out.maxima))
    close(out_w.log_weight, widened(out.log_weight, 2, 0, 0))
    for a, b in zip(gradients_w, gradients, strict=True):
        close(a, widened(b, 2, 3, 0))


@every_preset
def test_order_of_rows_does_not_matter(name):
    logp, entropy, credit = batch(name)
    turn = np.random.default_rng(1).permutation(N)
    value, gradients, out = compiled(name)(logp, entropy, credit)
    turned = compiled(name)(logp[turn], entropy[turn], jax.tree.map(lambda x: x[turn], credit))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    close(turned[0], value)
    jax.tree.map(lambda a, b: close(a, b[turn]), turned[1], gradients)
    close(turned[2].log_weight, out.log_weight[turn])


@every_preset
def test_micro_batches_add_up(name):
    logp, entropy, credit = batch(name)
    out = compiled(name)(logp, entropy, credit)[2]
    parts = [slice(0, 4), slice(4, 8), slice(8, N)]
    cut = [compiled(name)(logp[s], entropy[s], jax.tree.map(lambda x, s=s: x[s], credit))[2] for s in parts]
    for field in ("numerator", "denominator", "metrics"):
        whole, pieces = getattr(out, field), [getattr(part, field) for part in cut]
        total = jax.tree.map(lambda *xs: sum(xs), *pieces)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), total, whole)


@every_preset
def test_masked_tokens_have_exactly_no_gradient_and_no_say(name):
    logp, entropy, credit = batch(name)
    real = live(credit)
    result = compiled(name)(logp, entropy, credit)
    for gradient in result[1]:
        assert (np.asarray(gradient)[~real] == 0).all()
    assert float(result[2].log_weight[N - 1]) == 0
    for poison in (np.nan, np.inf, 1e30):
        found = compiled(name)(*poisoned((logp, entropy, credit), poison))
        jax.tree.map(np.testing.assert_array_equal, found, result)


@every_preset
def test_on_policy_nothing_is_off(name):
    logp, entropy, credit = batch(name, spread=0.0)
    _, (gradient, _), out = compiled(name)(logp, entropy, credit)
    tokens = live(credit).sum()
    at = {key: float(total) for key, (total, _) in out.metrics.items()}
    assert at["ratio"] == at["weight"] == tokens
    assert [at[key] for key in ("kl_behaviour", "kl_reference", "clip_fraction", "sampler_gap")] == [0, 0, 0, 0]
    assert (np.asarray(out.log_weight) == 0).all() and np.abs(gradient).max() > 0


@every_preset
@pytest.mark.parametrize("what", ["all masked", "equal rewards", "nobody judged", "far up", "far down", "impossible"])
def test_degenerate_batches_are_finite(name, what):
    logp, entropy, credit = batch(name)
    rule = ADVANTAGES[PRESETS[name].advantage]
    if what == "all masked":
        credit = credit._replace(mask=jnp.zeros_like(credit.mask))
    elif what in ("equal rewards", "nobody judged"):
        rewards, ok = np.full((P, G), 0.1, np.float32), np.full((P, G), what == "equal rewards")
        credit = credit._replace(advantage=rule(rewards, ok, credit.mask))
    elif what == "impossible":  # the sampler's own number was rounded to probability 0
        credit = credit._replace(behaviour=jnp.full((N, L), -1e30))
    else:
        credit = credit._replace(behaviour=credit.behaviour + (1e3 if what == "far down" else -1e3))
    value, (gradient, _), out = compiled(name)(logp, entropy, credit)
    assert_finite((value, gradient, out))
    still = PRESETS[name].objective.kl == 0 and PRESETS[name].advantage != "reward"
    if (
        what == "all masked"
        or what == "nobody judged"
        and PRESETS[name].objective.kl == 0
        or what == "equal rewards"
        and still
    ):
        assert (np.asarray(gradient) == 0).all()


# -- advantages ------------------------------------------------------------------------------------------------------


def some_mask(seed=0):
    return np.arange(L) < 1 + np.random.default_rng(seed).integers(0, L, (N, 1))


@every_advantage
def test_advantages_are_finite_single_precision_and_stand_at_real_tokens(name):
    rule = jax.jit(ADVANTAGES[name])
    (rewards, ok), mask = verdicts(), some_mask()
    found = rule(rewards, ok, mask)
    assert found.shape == (N, L) and found.dtype == jnp.float32
    assert_finite(found)
    assert (np.asarray(found)[~(mask & ok.reshape(-1, 1))] == 0).all() and np.abs(found).max() > 0.1
    size = rule._cache_size()
    rule(*verdicts(1), some_mask(1))
    assert rule._cache_size() == size
    for rewards in (np.full((P, G), 0.1, np.float32), np.full((P, G), -1e6, np.float32)):
        assert_finite(rule(rewards, ok, mask))
    assert (np.asarray(rule(verdicts()[0], np.zeros((P, G), bool), mask)) == 0).all()
    assert (np.asarray(rule(*verdicts(), np.zeros((N, L), bool))) == 0).all()


@every_advantage
def test_advantages_follow_their_rows_and_ignore_what_was_not_judged(name):
    rule = jax.jit(ADVANTAGES[name])
    (rewards, ok), mask = verdicts(), some_mask()
    found = np.asarray(rule(rewards, ok, mask)).reshape(P, G, L)
    prompts, samples = np.array([2, 0, 1]), np.array([3, 1, 0, 2])
    turn = lambda x: x.reshape(P, G, *x.shape[1 if x.shape[0] == N else 2 :])[prompts][:, samples].reshape(x.shape)
    turned = np.asarray(rule(turn(rewards), turn(ok), turn(mask))).reshape(P, G, L)
    np.testing.assert_allclose(turned, found[prompts][:, samples], rtol=1e-5, atol=1e-6)
    for poison in (np.nan, -np.inf, 7.0):
        dirty = np.where(ok, rewards, poison).astype(np.float32)
        np.testing.assert_array_equal(np.asarray(rule(dirty, ok, mask)).reshape(P, G, L), found)
