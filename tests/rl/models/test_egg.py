"""The integer recurrent model against its NumPy twin, its twin in f32, its size, and the text it writes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eggroll.integer import arithmetic
from rl.models import egg, egg_float
from tests.eggroll.integer import twin
from tests.eggroll.integer.models import assert_same, for_twin, random_params, random_text


@pytest.mark.parametrize(("layers", "width", "expansion"), [(2, 16, 4), (1, 12, 4), (3, 5, 3)])
@pytest.mark.parametrize("faithful", [False, True])
def test_logits_and_states_are_those_of_the_twin(layers, width, expansion, faithful):
    config = egg.EggConfig(layers, width, expansion, faithful)
    params, text = random_params(config, layers), np.asarray(random_text(0, 3, 12))
    step = jax.jit(lambda state, token: egg.step(config, egg.stack(params), state, token))
    state = jnp.asarray(np.random.default_rng(0).integers(-127, 128, (layers, 3, width)), jnp.int8)
    theirs = [np.stack([np.asarray(layer[row]) for layer in state]) for row in range(3)]
    for token in text.T:
        logits, state = step(state, jnp.asarray(token))
        for row in range(3):
            expected, theirs[row] = twin.token(for_twin(params), theirs[row], int(token[row]), faithful)
            assert_same(logits[row], expected)
            assert_same(state[:, row], theirs[row])


def test_sequences_add_up_and_hand_their_state_on():
    config = egg.EggConfig(layers=2, width=8)
    params, text = random_params(config, 0), random_text(1, 2, 9)
    run = jax.jit(lambda state, inputs, targets: egg.log_likelihood(config, params, state, inputs, targets))
    whole, after = run(egg.state(config, 2), text[:, :-1], text[:, 1:])
    first, state = run(egg.state(config, 2), text[:, :4], text[:, 1:5])
    second, state = run(state, text[:, 4:-1], text[:, 5:])
    assert whole == first + second and whole.dtype == jnp.int32
    np.testing.assert_array_equal(state, after)
    theirs = [
        twin.sequence(for_twin(params), np.zeros((2, 8), int), row[:-1], row[1:], False) for row in np.asarray(text)
    ]
    assert int(whole) == sum(value for value, _ in theirs)
    np.testing.assert_array_equal(after, np.stack([state for _, state in theirs]))


def test_a_separator_clears_the_state_before_it_is_read():
    config = egg.EggConfig(layers=2, width=8)
    weights = egg.stack(random_params(config, 2))
    full, empty = jnp.full((2, 1, 8), 99, jnp.int8), jnp.zeros((2, 1, 8), jnp.int8)
    logits = lambda state, n: egg.step(config, weights, state, jnp.asarray([n]))[0]
    assert_same(logits(full, 0), logits(empty, 0))
    assert (logits(full, 1) != logits(empty, 1)).any()


def test_parameters_are_as_many_as_published_and_as_spread():
    shapes = jax.eval_shape(lambda: egg.init(egg.EggConfig(), jax.random.key(0)))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 4_856_064
    params = egg.init(egg.EggConfig(layers=1, width=64), jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("int8")}
    assert np.asarray(params["head"], float).std() == pytest.approx(16, rel=0.02)
    assert np.unique(params["norm"]).tolist() == [16] and not params["block_0"]["recurrent"]["bf"].any()
    assert (params["embed"] != params["head"]).any()


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "width"), [(1, 16), (2, 64)])
def test_random_models_lose_what_they_should(layers, width):
    """8.50 to 8.53 bits a byte on random text; single seeds are up to 0.04 away."""
    config, found = egg.EggConfig(layers, width), []
    text = jnp.asarray(np.random.default_rng(0).integers(1, 256, (16, 201)), jnp.uint8)
    run = jax.jit(lambda p: egg.log_likelihood(config, p, egg.state(config, 16), text[:, :-1], text[:, 1:])[0])
    for seed in range(4):
        found.append(-int(run(egg.init(config, jax.random.key(seed)))) / (16 * 16 * 200))
    assert np.mean(found) == pytest.approx(8.515, abs=0.03)


def test_the_float_twin_is_the_model_without_rounding():
    """Logits of one step from one state differ by what rounding down accumulates to, and are the same model's."""
    config = egg.EggConfig(layers=2, width=64)
    params = egg.init(config, jax.random.key(1))
    real = egg_float.from_integers(params)
    token = jnp.asarray([65, 66, 200])
    state = jnp.asarray(np.random.default_rng(0).integers(-60, 60, (2, 3, 64)), jnp.int8)
    logits, after = egg.step(config, egg.stack(params), state, token)
    floats, real_after = egg.step(config, egg.stack(real), state / 16.0, token, egg_float)
    assert np.corrcoef(np.asarray(logits).ravel(), np.asarray(floats).ravel())[0, 1] > 0.99
    assert np.abs(np.asarray(after[0]) / 16 - np.asarray(real_after[0])).max() < 0.5


def test_float_operations_by_hand():
    np.testing.assert_allclose(egg_float.product(jnp.asarray([[1.0, 2, 3, 4]]), jnp.asarray([[1.0, 1, 1, 1]])), [[5.0]])
    np.testing.assert_allclose(egg_float.product(jnp.asarray([[100.0]]), jnp.asarray([[1.0]])), [[127 / 16]])
    np.testing.assert_allclose(egg_float.norm(jnp.asarray([1.0, -3]), jnp.asarray([1.0, 2])), [0.5, -3.0])
    np.testing.assert_allclose(egg_float.norm(jnp.zeros(2), jnp.ones(2)), [0, 0])
    np.testing.assert_allclose(egg_float.gated(jnp.asarray(1 / 16), jnp.asarray(2.0)), 1.0)
    np.testing.assert_allclose(egg_float.blend(jnp.asarray(1 / 16), jnp.asarray(2.0), jnp.asarray(4.0)), 3.0)
    ours = egg_float.log_likelihood(jnp.asarray([[1.0, 2.0, 2.0]]), jnp.asarray([0]))
    np.testing.assert_allclose(ours, [16 * np.log2(2 / (2 + 4 + 4))], rtol=1e-6)


def test_the_exact_likelihood_of_integer_logits():
    logits = np.random.default_rng(0).integers(-127, 128, (5, 256))
    target = np.arange(5)
    weight = 2.0 ** (logits / 16)
    expected = 16 * np.log2(weight[np.arange(5), target] / weight.sum(1))
    ours = egg_float.of_integers(jnp.asarray(logits, jnp.int8), jnp.asarray(target))
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    rounded = arithmetic.log_likelihood(jnp.asarray(logits, jnp.int8), jnp.asarray(target))
    assert np.abs(np.asarray(rounded) - expected).max() < 2  # one for the logarithm, less for the powers


def test_backprop_reaches_every_parameter():
    config = egg.EggConfig(layers=2, width=16)
    params = egg_float.from_integers(egg.init(config, jax.random.key(0)))
    text = random_text(0, 8, 30)
    state = egg.state(config, 8, jnp.float32)
    loss = lambda p: egg.log_likelihood(config, p, state, text[:, :-1], text[:, 1:], egg_float)[0]
    gradient = jax.jit(jax.grad(loss))(params)
    assert all(np.isfinite(g).all() and (np.asarray(g) != 0).any() for g in jax.tree.leaves(gradient))


def test_text_is_drawn_with_the_model_s_probabilities():
    """A model whose head ignores its input: 3 has 2^(64/16) times the probability of every other byte."""
    config = egg.EggConfig(layers=1, width=16)
    params = jax.tree.map(jnp.zeros_like, egg.init(config, jax.random.key(0)))
    params["embed"] = params["embed"] + 16
    params["norm"] = params["norm"] + 16
    params["head"] = params["head"].at[3].set(16)
    step = egg.step(config, egg.stack(params), jnp.zeros((1, 1, 16), jnp.int8), jnp.asarray([7]))[0][0]
    assert int(step[3]) == 64 and not step[4:].any()
    drawn = np.asarray(jax.jit(lambda key: egg.sample(config, params, key, 400, 20))(jax.random.key(0)))
    assert drawn.shape == (400, 20) and drawn.dtype == np.uint8
    assert (drawn == 3).mean() == pytest.approx(16 / (16 + 255), abs=0.012)
    again = egg.sample(config, params, jax.random.key(0), 400, 20)
    np.testing.assert_array_equal(drawn, again)


def test_a_prompt_is_gone_on_from():
    config = egg.EggConfig(layers=1, width=8)
    params, prompt = random_params(config, 0), jnp.asarray([10, 20, 30])
    free = np.asarray(egg.sample(config, params, jax.random.key(0), 2, 5))
    after = np.asarray(egg.sample(config, params, jax.random.key(0), 2, 5, prompt))
    assert after.shape == (2, 5) and (after != free).any()


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"width": 300}, "width 300 times expansion 4 is 1200"),
        ({"width": 0}, "width must be a whole number of at least 1; got 0"),
        ({"layers": 1.5}, "layers must be a whole number of at least 1; got 1.5"),
    ],
)
def test_sizes_that_make_no_model(sizes, words):
    with pytest.raises(ValueError, match=words):
        egg.EggConfig(**sizes)
