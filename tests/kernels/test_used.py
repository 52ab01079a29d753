"""The kernels are what the rest of the code runs: members' forward passes, the estimate, the scorer, the engine's attention."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec

import eggroll
import kernels
from kernels import dispatch, lowrank_matmul
from rl.models import egg
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
    """A layer, and a stack of two more by a scan."""
    x = jnp.tanh(x @ params["first"])
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"])
    return -jnp.sum((x - 1) ** 2)


def start(population, **settings):
    shapes = {"first": (8, WIDTH), "stack": (2, WIDTH, WIDTH)}
    params = {n: 0.3 * jax.random.normal(jax.random.key(i), s) for i, (n, s) in enumerate(shapes.items())}
    es = eggroll.strategy(
        optax.sgd(0.1),
        population=population,
        rank=2,
        sigma=0.1,
        rules=(("stack", "sio"),),
        noise="rademacher",
        **settings,
    )
    return es, es.init(params, jax.random.key(2)), jax.random.normal(jax.random.key(3), (3, 8))


@pytest.mark.slow
def test_the_members_forward(switched):
    es, state, batch = start(eggroll.crossed(24))
    evaluate = jax.jit(lambda state, batch: es.evaluate(state, network, batch))
    want = evaluate(state, batch)
    got = switched("pallas_tpu", evaluate, state, batch)
    assert np.ptp(np.asarray(want), axis=0).min() > 0.1  # members differ
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    module = switched("pallas_tpu", lowered, "pallas_tpu", evaluate, state, batch, how="lower")
    # the layer of the loop; the first layer's rows are the same for all members, and multiplied once
    assert module.count("stablehlo.custom_call @tpu_custom_call") == 1


@pytest.mark.slow
def test_the_estimate_makes_its_factors(switched):
    es, state, _ = start(eggroll.antithetic(10))
    estimate = jax.jit(lambda state, scores: es.estimate(state, scores).gradient)
    scores = jax.random.normal(jax.random.key(4), (10, 1))
    want = estimate(state, scores)
    got = switched("pallas_tpu", estimate, state, scores)
    for name in ("first", "stack"):
        assert np.abs(want[name]).max() > 0.1
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-5)
    module = switched("pallas_tpu", lowered, "pallas_tpu", estimate, state, scores, how="lower")
    assert module.count("stablehlo.custom_call @tpu_custom_call") == 3  # a matrix, and each of a stack
    assert "threefry" not in module  # what is drawn at all is drawn inside the kernels


@pytest.mark.slow
def test_the_members_of_an_integer_model(switched):
    config = egg.EggConfig(layers=1, width=16, expansion=2)
    es = eggroll.integer.strategy(population=eggroll.crossed(16, rows=2, signs=2), alpha=0.5)
    state, carry = es.init(egg.init(config, jax.random.key(0)), jax.random.key(1)), es.carry(egg.state(config, 1))
    text = jnp.arange(2 * 4, dtype=jnp.uint8).reshape(2, 4) * 31
    score = lambda weights, carry, rows: egg.log_likelihood(config, weights, carry, rows[:, :-1], rows[:, 1:])
    evaluate = jax.jit(lambda state, carry: es.evaluate(state, score, carry, text))
    want = evaluate(state, carry)
    assert len(set(np.asarray(want[0]).tolist())) > 8  # members differ
    got = switched("pallas_tpu", evaluate, state, carry)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    module = switched("pallas_tpu", lowered, "pallas_tpu", evaluate, state, carry, how="lower")
    assert module.count("stablehlo.custom_call @tpu_custom_call") == 7  # four of the unit, two of the MLP, the head


def test_a_product_that_no_kernel_computes_is_logged(switched, caplog):
    es = eggroll.strategy(optax.sgd(0.1), population=eggroll.crossed(4), rank=1, sigma=0.1)
    state = es.init({"w": jnp.ones((8, 1)), "tied": jnp.ones((5, 8))}, jax.random.key(0))

    def score(p, x):  # a column, the same transposed, and a weight that is [out, in]
        return jnp.sum(jnp.einsum("d,vd->v", (x @ p["w"]) @ p["w"].T, p["tied"]))

    evaluate = lambda: jax.eval_shape(lambda state, x: es.evaluate(state, score, x), state, jnp.ones((3, 8)))
    with caplog.at_level(logging.INFO, "kernels"):
        switched("pallas_tpu", evaluate)
    said = [record.getMessage() for record in caplog.records]
    assert any("with tied does not run as a kernel: the weight is [out, in] here" in line for line in said), said
    assert any("w [1, 8], rank 1, stored factors runs as pallas_tpu" in line for line in said), said


def test_kernels_inside_a_shard_map():
    """How a mesh is used with them: each device has the members of its own."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("members",))
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    spread = PartitionSpec("members")
    product = jax.shard_map(
        functools.partial(lowrank_matmul.matmul, implementation="pallas_tpu"),
        mesh=mesh,
        in_specs=(spread, PartitionSpec(), spread, spread, spread),
        out_specs=spread,
        check_vma=False,
    )
    args = shape(64, 1, 256), shape(256, 512), shape(64, 1, 256), shape(64, 1, 512), shape(64)
    module = lowered("pallas_tpu", product, *args)
    assert "tensor<16x1x512xf32>" in module  # a quarter of the members


@pytest.mark.slow
def test_the_scorer_and_its_gradient(switched):
    model = make(preset("tiny-transformer", vocab=40, layers=1))
    params = model.init(jax.random.key(0))
    ids = jax.random.randint(jax.random.key(1), (2, 9), 0, 40)
    lengths = jnp.array([9, 5])

    def loss(params):
        logp, entropy = score(model, params, ids, lengths)
        return (logp - 0.1 * entropy).sum(), (logp, entropy)

    whole = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, want), want_gradient = whole(params)
    (_, got), gradient = switched("pallas_tpu", whole, params)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient, want_gradient)
    module = switched("pallas_tpu", lowered, "pallas_tpu", lambda p: loss(p)[0], params, how="lower")
    assert module.count("stablehlo.custom_call @tpu_custom_call") == 1


def test_decoding_by_the_kernel_gives_the_references_tokens(switched):
    model = make(preset("tiny-transformer", vocab=40, layers=1))
    params = model.init(jax.random.key(0))

    def greedy(params, first):
        def step(carry, t):
            token, cache = carry
            hidden, cache = model.forward(params, token[None], cache, t)
            token = jnp.argmax(model.head(params, hidden)[0]).astype(jnp.int32)
            return (token, cache), token

        return jax.lax.scan(step, (first, model.empty(12)), jnp.arange(12))[1]

    many = jax.jit(jax.vmap(functools.partial(greedy, params)))
    want = many(jnp.arange(3, dtype=jnp.int32))
    got = switched("pallas_tpu", many, jnp.arange(3, dtype=jnp.int32))
    np.testing.assert_array_equal(got, want)
    module = switched("pallas_tpu", lowered, "pallas_tpu", many, jnp.arange(3, dtype=jnp.int32), how="lower")
    assert module.count("stablehlo.custom_call @tpu_custom_call") >= 1
