"""The kernels are what the rest of the code runs: members' forward passes, the estimate, the scorer, the engine's attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import eggroll
import kernels
from kernels import dispatch
from rl.models.presets import make, preset
from rl.rollout.score import score
from tests.kernels.harness import lowered

WIDTH = 32


@pytest.fixture
def switched():
    """Runs a function with every operation on this implementation, interpreted."""

    def run(name, fn, *args, how="interpret"):
        kernels.use(name)
        with dispatch.mode(how):
            return fn(*args)

    yield run
    kernels.use("auto")


def network(params, x):
    """Two layers, and a stack of two more by a scan."""
    x = jnp.tanh(x @ params["first"])
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"])
    return -jnp.sum((x @ params["last"] - 1) ** 2)


def start(population, rank=2, **settings):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"first": (8, WIDTH), "stack": (2, WIDTH, WIDTH), "last": (WIDTH, 4)}
    params = {n: 0.3 * jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}
    params["bias"] = jnp.zeros(4)
    rules = (("stack", "sio"), ("bias", "frozen"))
    es = eggroll.strategy(optax.sgd(0.1), population=population, rank=rank, sigma=0.1, rules=rules, **settings)
    return es, es.init(params, jax.random.key(1)), jax.random.normal(jax.random.key(2), (3, 8))


@pytest.mark.parametrize("population", [eggroll.crossed(24), eggroll.antithetic(10)], ids=["crossed", "antithetic"])
def test_a_generation_by_kernels_is_that_of_the_reference(population, switched):
    es, state, batch = start(population)
    evaluate = lambda state, batch: es.evaluate(state, network, batch)
    want = evaluate(state, batch)
    got = switched("pallas_tpu", jax.jit(evaluate), state, batch)
    assert np.ptp(np.asarray(want), axis=0).min() > 0.1  # members differ
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    kernels.use("auto")
    estimate = lambda state, scores: es.estimate(state, scores).gradient
    want = estimate(state, want)
    got = switched("pallas_tpu", jax.jit(estimate), state, evaluate(state, batch))
    for name in ("first", "stack", "last"):
        assert np.abs(want[name]).max() > 0.1
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-5)


def test_one_kernel_a_layer_and_no_factors_for_the_estimate(switched):
    """In the program for a TPU: three layers (one in a loop), two matrices and a stack of two."""
    es, state, batch = start(eggroll.crossed(24))
    module = switched(
        "pallas_tpu", lowered, "pallas_tpu", lambda s, b: es.evaluate(s, network, b), state, batch, how="lower"
    )
    assert module.count("stablehlo.custom_call @tpu_custom_call") == 3
    module = switched(
        "pallas_tpu",
        lowered,
        "pallas_tpu",
        lambda s, f: es.estimate(s, f).gradient,
        state,
        jnp.ones((24, 1)),
        how="lower",
    )
    assert module.count("stablehlo.custom_call @tpu_custom_call") == 4


def test_a_generation_lowers_on_a_mesh(switched):
    mesh = Mesh(np.array(jax.devices()[:4]), ("members",), axis_types=(AxisType.Auto,))
    es, state, batch = start(eggroll.crossed(16, blocks=4), mesh=mesh)
    spread = jax.device_put(batch, NamedSharding(mesh, P()))
    switched("pallas_tpu", lowered, "pallas_tpu", lambda s, b: es.evaluate(s, network, b), state, spread, how="lower")
    got = switched("pallas_tpu", jax.jit(lambda s, b: es.evaluate(s, network, b)), state, spread)
    kernels.use("auto")
    np.testing.assert_allclose(got, es.evaluate(state, network, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_the_scorer_and_its_gradient(tied, switched):
    model = make(preset("tiny-transformer", vocab=40, layers=1, tied=tied))
    params = model.init(jax.random.key(0))
    ids = jax.random.randint(jax.random.key(1), (2, 9), 0, 40)
    lengths = jnp.array([9, 5])

    def loss(params):
        logp, entropy = score(model, params, ids, lengths)
        return (logp - 0.1 * entropy).sum(), (logp, entropy)

    whole = jax.value_and_grad(loss, has_aux=True)
    (_, want), want_gradient = whole(params)
    (_, got), gradient = switched("pallas_tpu", whole, params)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient, want_gradient)
    module = switched("pallas_tpu", lowered, "pallas_tpu", lambda p: loss(p)[0], params, how="lower")
    assert module.count("stablehlo.custom_call @tpu_custom_call") == 1


def test_decoding_by_the_kernel_gives_the_references_tokens(switched):
    model = make(preset("tiny-transformer", vocab=40, layers=2))
    params = model.init(jax.random.key(0))

    @jax.jit
    def greedy(params, first):
        def step(carry, t):
            token, cache = carry
            hidden, cache = model.forward(params, token[None], cache, t)
            token = jnp.argmax(model.head(params, hidden)[0]).astype(jnp.int32)
            return (token, cache), token

        return jax.lax.scan(step, (first, model.empty(12)), jnp.arange(12))[1]

    many = jax.vmap(functools.partial(greedy, params))
    want = many(jnp.arange(3, dtype=jnp.int32))
    got = switched("pallas_tpu", many, jnp.arange(3, dtype=jnp.int32))
    np.testing.assert_array_equal(got, want)
    module = switched("pallas_tpu", lowered, "pallas_tpu", many, jnp.arange(3, dtype=jnp.int32), how="lower")
    assert module.count("stablehlo.custom_call @tpu_custom_call") >= 1
