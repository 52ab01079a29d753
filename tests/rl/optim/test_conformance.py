"""What every optimizer of `rl.optim` keeps: it converges, recompiles nothing, composes, drives evolution, can be restarted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import eggroll
from rl import checkpoint, optim
from tests.rl.optim.cases import MAKERS, stack, stepper, tree

every = pytest.mark.parametrize("name", MAKERS)
# one of each kind
KINDS = ("frugal_block", "frugal_columns", "frugal_svd", "badam", "fira", "apollo", "ldadam", "adam_mini", "adam8bit")
each_kind = pytest.mark.parametrize("name", KINDS)
copied = lambda tree: jax.tree.map(jnp.copy, tree)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def targets(key):
    """Name -> (params, loss): four problems whose least loss is 0, or known to be far below the start."""
    a, b, c, x = (jax.random.normal(k, (8, 12)) for k in jax.random.split(key, 4))
    scales = jnp.logspace(0, 1, 8)[:, None]
    labels = (x[:, 0] + x[:, 1] > 0).astype(jnp.float32)
    layer = lambda kernel: {"layer_0": {"kernel": kernel}, "layer_1": {"kernel": 0.5 * kernel}}
    bent = lambda p, x: jnp.tanh(x @ p["layer_0"]["kernel"].T) @ p["layer_1"]["kernel"]
    logit = lambda p, x: (x @ p["layer_0"]["kernel"].T @ p["layer_1"]["kernel"]).mean(axis=1)
    off = lambda p, want, size: sum(jnp.sum((size * (w["kernel"] - want)) ** 2) for w in p.values())
    return {
        "quadratic": (layer(a), lambda p: off(p, b, 1.0)),
        "ill-conditioned": (layer(a), lambda p: off(p, b, scales)),
        "regression": (layer(0.3 * a), lambda p: jnp.mean((bent(p, x) - bent(layer(0.4 * c), x)) ** 2)),
        "classes": (layer(0.3 * a), lambda p: jnp.mean(jax.nn.softplus(logit(p, x)) - labels * logit(p, x))),
    }


@every
def test_it_converges_on_four_targets(name):
    problems = targets(jax.random.key(0))
    losses = {key: loss for key, (_, loss) in problems.items()}
    # a tree per target: only the limits of norms and blocks of equal shape see more than one matrix
    params = {key: start for key, (start, _) in problems.items()}
    maker = MAKERS[name] if name != "adam8bit" else lambda rate: optim.adam8bit(rate, rules=(("kernel", "coded"),))
    if name == "badam":
        maker = lambda rate: optim.badam(rate, every=5, pattern=r"(\w|-)+/layer_\d+")
    tx = maker(optax.cosine_decay_schedule(0.1, 400))
    total = lambda p: sum(loss(p[key]) for key, loss in losses.items())

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(total)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (after, _), _ = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=400))(params)
    for key, loss in losses.items():
        assert loss(after[key]) < 0.1 * loss(params[key]), key


@every
def test_nothing_is_compiled_again_and_state_is_what_the_report_says(name):
    tx, step = stepper(name)
    params, state = tree(), tx.init(tree())
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    for i in range(12):
        params, state = step(tree(i + 1), state, params)
    assert step._cache_size() == 1 and jax.tree.map(lambda x: (x.shape, x.dtype), state) == shapes
    report = optim.report(tx, jax.eval_shape(tree))
    held = sum(x.nbytes for x in jax.tree.leaves(state))
    assert report.total == held == sum(report.groups.values()) == sum(report.parameters.values()) + report.shared
    assert set(report.parameters) == {"embed/embedding"} | {
        f"layer_{i}/{leaf}" for i in range(2) for leaf in ("dense/kernel", "dense/bias", "back/kernel", "norm/scale")
    }
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


@every
def test_a_restart_in_the_middle_of_a_window_changes_nothing(name, tmp_path):
    tx, step = stepper(name)
    params, state = tree(), tx.init(tree())
    for i in range(7):
        params, state = step(tree(i + 1), state, params)
    checkpoint.save(tmp_path, 7, (params, state), {})
    kept = checkpoint.restore(tmp_path, (tree(5), tx.init(tree()))).state
    ends = []
    for params, state in (copied((params, state)), kept):  # noqa: B020
        for i in range(7, 13):
            params, state = step(tree(i + 1), state, params)
        ends.append((params, state))
    same(*ends)


@every
def test_half_precision_keeps_f32_state_and_its_own_updates(name):
    tx, half = MAKERS[name](1e-2), tree(dtype=jnp.bfloat16)
    state = tx.init(half)
    assert not {x.dtype for x in jax.tree.leaves(state)} - {jnp.dtype(x) for x in ("float32", "int32", "uint8")}
    updates, after = jax.eval_shape(tx.update, half, state, half)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)


@each_kind
def test_half_precision_makes_the_steps_of_full_precision_rounded(name):
    tx, half, gradient = MAKERS[name](1e-2), tree(dtype=jnp.bfloat16), tree(1, dtype=jnp.bfloat16)
    wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
    updates, _ = jax.jit(tx.update)(gradient, tx.init(half), half)
    after, _ = stepper(name)[1](wide(gradient), tx.init(wide(half)), wide(half))
    close(wide(updates), jax.tree.map(jnp.subtract, after, wide(half)), rtol=1e-2, atol=1e-4)


@each_kind
def test_accumulated_gradients_make_the_step_of_their_mean(name):
    tx, step = stepper(name)
    several = optax.MultiSteps(tx, 2)
    params = tree()
    state, halves = several.init(params), (tree(1), tree(2))
    for part in halves:
        updates, state = several.update(part, state, params)
    mean = jax.tree.map(lambda *xs: sum(xs) / 2, *halves)
    after, _ = step(mean, tx.init(params), copied(params))
    close(optax.apply_updates(params, updates), after, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", (*KINDS, "apollo_mini"))
def test_injected_learning_rates_act_at_once(name):
    static = (
        "density",
        "every",
        "rank",
        "active",
        "seed",
        "projection",
        "rules",
        "state",
        "full",
        "free",
        "order",
        "kind",
    )
    maker = MAKERS[name]
    function, settings = getattr(maker, "func", maker), dict(getattr(maker, "keywords", {}))
    accepted = [key for key in static if key in function.__kwdefaults__ or key in function.__annotations__]
    tx = optax.inject_hyperparams(function, static_args=accepted)(learning_rate=0.0, **settings)
    params = tree()
    state = tx.init(params)
    update = jax.jit(tx.update)
    still, state = update(tree(1), state, params)
    assert all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(still))
    state.hyperparams["learning_rate"] = jnp.float32(0.1)
    moved, state = update(tree(2), state, params)
    compiled = update._cache_size()
    state.hyperparams["learning_rate"] = jnp.float32(0.2)
    update(tree(3), state, params)
    assert all(np.any(np.asarray(x) != 0) for x in moved["embed"].values()) and update._cache_size() == compiled


@functools.cache
def evolved():
    """Jitted (params, generation) -> (gradient by evolution, the loss it is of)."""
    es = eggroll.strategy(optax.sgd(1.0), population=eggroll.crossed(256), sigma=0.1, rules=(("", "full"),))
    score = lambda p, row: -sum(jnp.sum((x - row) ** 2) for x in jax.tree.leaves(p))

    def gradient(params, generation):
        state = es.init(params, jax.random.fold_in(jax.random.key(0), generation))
        made = es.estimate(state, es.evaluate(state, score, jnp.full((1,), 0.2)))
        return made.gradient, -score(params, 0.2)

    return jax.jit(gradient)


@pytest.mark.slow
@every
def test_it_takes_the_estimates_of_evolution(name):
    tx, step = stepper(name)
    gradient, params, state = evolved(), tree(), tx.init(tree())
    before = gradient(params, 0)[1]
    for i in range(30):
        params, state = step(gradient(params, i)[0], state, params)
    assert gradient(params, 0)[1] < 0.95 * before


# with refreshes; tests/rl/optim/test_layout.py has one step of every optimizer on another mesh
SPREAD = [(stack, name) for name in ("frugal_block", "frugal_columns", "badam")]
SPREAD += [(tree, name) for name in ("frugal_svd", "apollo", "ldadam")]


@pytest.mark.parametrize(("make", "name"), SPREAD)
def test_eight_devices_give_the_result_of_one_and_state_is_laid_out_as_the_parameters(make, name):
    tx, step = stepper(name)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    lay = lambda x: NamedSharding(mesh, PartitionSpec(*[None] * (x.ndim - 2), "a", "b"))
    new = lambda seed: make(tree(seed)) if make is stack else tree(seed)
    kernels = lambda path, x: jax.device_put(
        x, lay(x) if "kernel" in str(path) else NamedSharding(mesh, PartitionSpec())
    )
    start = jax.tree_util.tree_map_with_path(kernels, new(0))
    params, single = new(0), tx.init(new(0))
    state, eager = jax.jit(tx.init)(start), tx.init(start)
    for tried in (state, eager):
        close(tried, single, rtol=1e-6, atol=1e-6)
        for path, x in jax.tree_util.tree_flatten_with_path(tried)[0]:
            # both moments of a kernel, and of half of its columns, in the kernel's layout
            if x.ndim > 1 and x.shape[-2:] in ((8, 12), (12, 8), (8, 6), (12, 4)) and "kernel" in str(path):
                assert x.sharding.is_equivalent_to(lay(x), x.ndim), (path, x.shape, x.sharding)
    for i in range(8):
        spread = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), new(i + 1), start)
        start, state = step(spread, state, start)
        params, single = step(new(i + 1), single, params)
    close(start, params, rtol=2e-4, atol=2e-5)
