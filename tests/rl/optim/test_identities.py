"""What the formulas imply, by value: limits that are simpler methods, invariants, coverage of random choices."""

import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rl import optim
from rl.optim import blocks, projection
from rl.optim.adam8bit import BOOKS, decode, encode, nearest
from rl.optim.apollo import basis
from rl.optim.fira import limited
from tests.rl.optim.cases import tree

SUBSETS = ("block", "columns", "rows", "randk", "permutation")


def run(tx, gradients, params, steps):
    """Updates of every step, on constant parameters; `gradients` is a function of the step."""
    state, out = tx.init(params), []
    update = jax.jit(tx.update)
    for i in range(steps):
        updates, state = update(gradients(i), state, params)
        out.append(updates)
    return out


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def kernels(updates):
    return {path: np.asarray(x) for path, x in optim.groups.leaves(updates) if "kernel" in path}


def assert_trees(a, b, check=np.testing.assert_array_equal):
    jax.tree.map(check, a, b)


@pytest.mark.parametrize("kind", SUBSETS)
def test_the_first_step_after_every_refresh_is_a_sign_step(kind):
    made = run(optim.frugal(0.1, 0.5, projection=kind, every=3, split_scale=0.5), lambda i: tree(i + 1), tree(), 7)
    for i in (0, 3, 6):
        for path, update in kernels(made[i]).items():
            gradient = kernels(tree(i + 1))[path]
            np.testing.assert_allclose(update, -0.05 * np.sign(gradient), rtol=2e-4)  # eps over the smallest gradient
    assert any(np.ptp(np.abs(x)) > 1e-3 for x in kernels(made[1]).values())  # and the second is not


@pytest.mark.parametrize("density", (0.25, 0.5, 1.0))
def test_a_constant_gradient_makes_sign_steps_for_ever(density):
    made = run(optim.frugal(0.1, density, projection="columns", every=4), lambda i: tree(1), tree(), 9)
    for updates in made:
        for path, update in kernels(updates).items():
            np.testing.assert_allclose(update, -0.1 * np.sign(kernels(tree(1))[path]), rtol=1e-4)


@pytest.mark.parametrize("kind", (*SUBSETS, "svd", "random"))
def test_density_zero_is_sign_descent_bit_for_bit_without_state(kind):
    tx = optim.frugal(0.1, 0.0, projection=kind, rules=(("", "split"),) if kind == "block" else ())
    sign = optax.sign_sgd(0.1)
    made, plain = run(tx, tree, tree(), 3), run(sign, tree, tree(), 3)
    for a, b in zip(made, plain, strict=True):
        assert_trees(kernels(a), kernels(b))
    bytes_ = optim.report(tx, tree()).parameters
    assert all(size == 0 for path, size in bytes_.items() if "kernel" in path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SUBSETS)
def test_density_one_is_adamw_until_the_first_refresh(kind):
    tx, adamw = optim.frugal(0.1, 1.0, projection=kind, weight_decay=0.3), optax.adamw(0.1, weight_decay=0.3)
    two_ulp = lambda x, y: np.testing.assert_allclose(x, y, rtol=3e-7, atol=1e-9)
    for a, b in zip(run(tx, tree, tree(), 6), run(adamw, tree, tree(), 6), strict=True):
        assert_trees(a, b, two_ulp)
    with jax.disable_jit():  # operation by operation nothing is contracted: equal in every bit
        state, other = tx.init(tree()), adamw.init(tree())
        for i in range(2):
            a, state = tx.update(tree(i), state, tree())
            b, other = adamw.update(tree(i), other, tree())
            assert_trees(a, b)


def test_after_a_refresh_density_one_is_adamw_begun_again():
    made = run(optim.frugal(0.1, 1.0, every=3), tree, tree(), 6)
    again = run(optax.adam(0.1), lambda i: tree(i + 3), tree(), 3)
    for a, b in zip(made[3:], again, strict=True):
        assert_trees(kernels(a), kernels(b), lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6))


def test_a_dense_basis_of_full_rank_leaves_no_residual_to_take_the_sign_of():
    gradients = tree(1)
    with_, without = (optim.frugal(0.1, 1.0, projection="svd", free=free) for free in ("sign", "none"))
    assert_trees(run(with_, lambda i: gradients, tree(), 2), run(without, lambda i: gradients, tree(), 2))


@pytest.mark.parametrize("kind", ("columns", "rows"))
def test_without_a_free_rule_the_rest_only_decays(kind):
    tx = optim.frugal(0.1, 0.5, projection=kind, free="none", free_scale=7.0, split_scale=3.0, weight_decay=0.5)
    params = tree()
    for path, update in kernels(run(tx, lambda i: tree(1), params, 1)[0]).items():
        still = update == -np.float32(0.1) * (np.float32(0.5) * kernels(params)[path])
        whole = still.all(axis=0) if kind == "columns" else still.all(axis=1)
        assert whole.sum() == len(whole) // 2


def test_weights_decay_by_the_learning_rate_alone_and_zero_gradients_move_nothing_else():
    tx = optim.frugal(0.1, 0.5, free_scale=7.0, split_scale=3.0, weight_decay=0.5, every=2)
    zero = jax.tree.map(jnp.zeros_like, tree())
    for updates in run(tx, lambda i: zero, tree(), 4):
        assert_trees(updates, jax.tree.map(lambda w: -jnp.float32(0.1) * (jnp.float32(0.5) * w), tree()))


def test_columns_are_active_as_often_as_their_share():
    project, like = projection.columns(0.4, seed=3), {"w": jnp.ones((2, 10))}
    small = project.down(project.where({}, 0, like), like)
    zero = jax.tree.map(jnp.zeros_like, like)
    window = jax.jit(lambda k: project.join(project.where({}, k, like), small, zero, small, None))
    # `down` of ones lifted: 1 where a column is active
    rounds = np.stack([np.asarray(window(k)["w"])[0] for k in range(400)])
    assert set(rounds.sum(axis=1)) == {4.0}  # floor(0.4 * 10)
    np.testing.assert_allclose(rounds.mean(axis=0), 0.4, atol=4 * math.sqrt(0.24 / 400))


def test_orders_of_blocks():
    family = blocks._family((2, 2), [(f"layer_{i}/w", i, ()) for i in (0, 10, 2, 1, 3)], lambda c: 2)
    names = [member.leaf for member in family.members]
    assert names == [0, 1, 2, 3, 10]
    windows = lambda order, count: [blocks.active(family, order, jnp.int32(w), 0).tolist() for w in range(count)]
    assert windows("ascending", 3) == [[0, 1], [2, 3], [4, 0]]
    assert windows("descending", 3) == [[4, 3], [2, 1], [0, 4]]
    assert windows("mirror", 3) == [[0, 4], [1, 3], [2, 0]]
    assert len({tuple(x) for x in windows("random", 20)}) > 5 and all(len(set(x)) == 2 for x in windows("random", 20))
    for start in (0, 3, 6):  # a round of ceil(5 / 2) windows shows every tensor
        assert set(sum(windows("reshuffled", start + 3)[start:], [])) == set(range(5))


def test_blocks_are_listed_by_number_not_by_letter():
    params = {f"layer_{i}": {"w": jnp.ones((2, 2))} for i in range(12)}
    family = blocks.by_shape(0.25)(params)[0]
    paths = [optim.groups.leaves(params)[member.leaf][0] for member in family.members]
    assert paths == [f"layer_{i}/w" for i in range(12)] and family.slots == 3


def test_choices_depend_on_seed_window_and_path_alone():
    """Neither on the other leaves, nor on their order."""
    project = projection.columns(0.5, seed=1)
    leaf = jax.random.normal(jax.random.key(0), (3, 16))
    alone, beside = {"m": leaf}, {"a": leaf + 1, "m": leaf, "z": leaf}
    taken = lambda project, window, tree: np.asarray(project.down(project.where({}, window, tree), tree)["m"])
    np.testing.assert_array_equal(taken(project, 4, alone), taken(project, 4, beside))
    assert np.any(taken(project, 5, alone) != taken(project, 4, alone))
    assert np.any(taken(projection.columns(0.5, seed=2), 4, alone) != taken(project, 4, alone))


def test_projected_memory_stays_where_projections_overlap():
    """One step into the second window, momentum is b1 times the old where a column is in both, else 0, plus the gradient."""
    tx = optim.frugal(1.0, 0.5, projection="columns", every=1, state="project", full="momentum", free="none", b1=0.5)
    first, second = tree(1), tree(2)
    one, two = (kernels(x) for x in run(tx, lambda i: (first, second)[i], tree(), 2))
    for path, update in two.items():
        was, now = (np.any(x != 0, axis=0) for x in (one[path], update))
        g1, g2 = kernels(first)[path], kernels(second)[path]
        np.testing.assert_allclose(update, -np.where(now, g2 + np.where(was, 0.5 * g1, 0), 0), rtol=1e-6)


def test_momentum_in_a_full_basis_is_momentum():
    """SGD with momentum commutes with rotations; Adam does not."""
    tx = optim.frugal(0.1, 1.0, projection="svd", state="keep", full="momentum", free="none")
    rotated, plain = run(tx, tree, tree(), 5), run(optax.sgd(0.1, 0.9), tree, tree(), 5)
    for a, b in zip(rotated, plain, strict=True):
        assert_trees(kernels(a), kernels(b), lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5))
    adam = run(optim.frugal(0.1, 1.0, projection="svd", state="keep", free="none"), tree, tree(), 2)[1]
    assert any(
        np.abs(a - b).max() > 1e-3 for a, b in zip(kernels(adam).values(), kernels(plain[1]).values(), strict=True)
    )


def test_signs_of_noise_have_the_mean_of_the_error_function():
    """E[sign(g)] = erf(mu / (sigma sqrt 2)), variance 1 - E^2, for g ~ N(mu, sigma^2)."""
    draws = 0.3 + 0.8 * np.random.default_rng(0).normal(size=(1000, 200))
    leaf = {"kernel": jnp.asarray(draws)}
    signs = np.asarray(run(optim.frugal(1.0, 0.0), lambda i: leaf, leaf, 1)[0]["kernel"])
    mean = math.erf(0.3 / (0.8 * math.sqrt(2)))
    np.testing.assert_allclose(-signs.mean(), mean, atol=4 * math.sqrt((1 - mean**2) / signs.size))
    np.testing.assert_allclose(signs.var(), 1 - mean**2, atol=0.01)


def test_limited_norms_grow_by_a_hundredth_at_most():
    norms, previous = [], jnp.zeros(())
    for i in range(20):
        x, previous = limited((1.0 + i**2) * jnp.ones((3, 4)), previous)
        norms.append(float(jnp.linalg.norm(x)))
        np.testing.assert_allclose(norms[-1], previous, rtol=1e-6)
    np.testing.assert_allclose(norms[0], math.sqrt(12), rtol=1e-6)  # the first is not limited
    np.testing.assert_allclose(np.diff(np.log(norms)), math.log(1.01), rtol=1e-3)
    assert float(limited(jnp.ones((3, 4)), 100.0)[1]) == pytest.approx(math.sqrt(12))  # falling is free


def test_apollo_steps_along_the_gradient_row_by_row():
    params = {"kernel": jnp.ones((12, 8))}
    gradient = {"kernel": jax.random.normal(jax.random.key(1), (12, 8))}
    update = run(optim.apollo(1.0, 4), lambda i: gradient, params, 1)[0]["kernel"]
    ratio = np.asarray(-update / gradient["kernel"])
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1], ratio.shape), rtol=1e-5)
    # the first step of Adam is a sign: ||u_j|| = sqrt(r), so a row's factor is sqrt(r) / ||(G P)_j||
    p = basis("kernel", (8,), 4, 0, 0)
    np.testing.assert_allclose(ratio[:, 0], 2 / np.linalg.norm(gradient["kernel"] @ p, axis=1), rtol=1e-4)


def test_apollos_projections_have_the_variance_of_their_rank_and_change_with_window_and_path():
    p = basis("a", (3, 2000), 8, 0, 0)
    assert p.shape == (3, 2000, 8)
    np.testing.assert_allclose(np.mean(np.asarray(p) ** 2), 1 / 8, rtol=0.02)
    for path, window, seed in (("b", 0, 0), ("a", 1, 0), ("a", 0, 1)):
        other = basis(path, (3, 2000), 8, window, seed)
        assert abs(np.corrcoef(np.ravel(p), np.ravel(other))[0, 1]) < 0.02
    assert abs(np.corrcoef(np.ravel(p[0]), np.ravel(p[1]))[0, 1]) < 0.03


def test_adam_mini_with_blocks_of_one_entry_is_adam():
    params = {"kernel": jnp.ones((1, 9)), "bias": jnp.ones(9)}
    gradients = lambda i: jax.tree.map(lambda x: x * jnp.arange(1, 10.0) * (-1) ** i, params)
    for a, b in zip(
        run(optim.adam_mini(0.1), gradients, params, 4), run(optax.adam(0.1), gradients, params, 4), strict=True
    ):
        assert_trees(a, b, lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6))


def test_adam_mini_divides_a_head_by_one_number():
    params = {"query": {"kernel": jnp.ones((4, 6))}}
    gradient = {"query": {"kernel": jax.random.normal(jax.random.key(0), (4, 6))}}
    tx = optim.adam_mini(1.0, rules=(("query", "heads:2"),))
    g, update = np.asarray(gradient["query"]["kernel"]), run(tx, lambda i: gradient, params, 1)[0]["query"]["kernel"]
    rms = np.sqrt([np.mean(g[:, :3] ** 2), np.mean(g[:, 3:] ** 2)])
    np.testing.assert_allclose(update, -g / np.repeat(rms, 3), rtol=1e-5)
    assert optim.report(tx, params).total == 4 * (24 + 2) + 5 * 4  # five groups count steps


@pytest.mark.slow
@pytest.mark.parametrize("signed", (False, True))
def test_eight_bit_codes(signed):
    book = BOOKS[signed]
    assert len(book) == len(set(book)) == 256 and book[-1] == 1 and 0 in book
    # the upper decade has 64 or 128 equal parts of [0.1, 1], of which the book has the middles
    top = book[book >= 0.1]
    assert len(top) == (65 if signed else 129) and top[0] == np.float32(0.1 + 0.45 / (64 if signed else 128))
    np.testing.assert_array_equal(book[nearest(jnp.asarray(book), signed)], book)  # codes are fixed points
    x = np.random.default_rng(0).uniform(-signed, 1, 20000).astype(np.float32)
    x = np.concatenate([x, x * 1e-3, x * 1e-6, [0, 1e-9, 1]]).astype(np.float32)
    chosen = book[np.asarray(nearest(jnp.asarray(x), signed))]
    best = np.abs(book[None].astype(np.float64) - x[:, None]).min(axis=1)
    np.testing.assert_allclose(np.abs(chosen.astype(np.float64) - x), best, atol=1e-8)


def test_eight_bit_blocks_have_their_own_scale_and_zero_stays_zero():
    x = np.random.default_rng(0).normal(size=(3, 300)).astype(np.float32)
    x[0, :256] = 0
    x[2] *= 1e-6
    coded = encode(jnp.asarray(x), True)
    assert coded.codes.shape == (3, 300) and coded.codes.dtype == jnp.uint8 and coded.scale.shape == (4,)
    back, flat = np.asarray(decode(coded, True)), x.reshape(-1)
    np.testing.assert_array_equal(back[0, :256], 0)
    largest = np.repeat([np.abs(flat[i : i + 256]).max() for i in range(0, 900, 256)], 256)[:900].reshape(x.shape)
    np.testing.assert_array_equal(coded.scale, largest.reshape(-1)[::256])
    assert np.all(np.abs(back - x) <= (0.5 * 0.9 / 64 + 1e-6) * largest)


def test_ldadams_first_step_is_a_sign_step_in_its_subspace():
    """Moments are zero, so whatever the basis Q, the step is Q sign(Q^T G)."""
    params, gradient = {"kernel": jnp.ones((8, 12))}, {"kernel": jax.random.normal(jax.random.key(0), (8, 12))}
    tx = optim.ldadam(1.0, 3)
    updates, state = jax.jit(tx.update)(gradient, tx.init(params), params)
    q = next(x for path, x in jax.tree_util.tree_flatten_with_path(state)[0] if "basis" in str(path) and x.size)
    np.testing.assert_allclose(q.T @ q, np.eye(3), atol=1e-5)
    np.testing.assert_allclose(updates["kernel"], -q @ np.sign(q.T @ gradient["kernel"]), rtol=1e-4, atol=1e-5)


def test_apollo_that_projects_nothing_away_has_adams_norms_along_the_gradient(monkeypatch):
    identity = lambda path, shape, rank, window, seed: jnp.eye(shape[-1])
    monkeypatch.setattr(
        importlib.import_module("rl.optim.apollo"), "basis", identity
    )  # `rl.optim.apollo` is a function
    tx, adam = optim.scale_by_apollo(8, every=2), optax.scale_by_adam()
    gradient = {"w": normal(8, 12)}
    out, _ = tx.update(gradient, tx.init(gradient))
    step, _ = adam.update(gradient, adam.init(gradient))
    size = lambda x: jnp.linalg.norm(x["w"], axis=0)
    np.testing.assert_allclose(size(out), size(step), rtol=1e-5)
    np.testing.assert_allclose(out["w"] / size(out), gradient["w"] / size(gradient), rtol=1e-5)


def test_ldadam_of_full_rank_loses_nothing_of_its_momentum():
    tx = optim.scale_by_ldadam(8, b1=0.9, error_feedback=False)
    state, mean = tx.init({"w": jnp.zeros((8, 12))}), 0.0
    for i in range(6):
        gradient = normal(8, 12, seed=i)
        before = state.basis["w"]
        _, state = tx.update({"w": gradient}, state)
        change = state.basis["w"].T @ before
        np.testing.assert_allclose(change @ change.T, np.eye(8), atol=1e-5)
        mean = 0.9 * mean + 0.1 * gradient
        np.testing.assert_allclose(state.basis["w"] @ state.mu["w"], mean, atol=1e-5)


@pytest.mark.slow
def test_what_comes_from_optax_is_as_published():
    """Lion moves by 0 or 1, a rank-one square is factored without loss, SM3 bounds the sum of squares, Muon levels spectra."""
    gradient = normal(6, 10).at[0, 0].set(0)
    lion = optax.scale_by_lion()
    assert set(np.unique(np.abs(lion.update(gradient, lion.init(gradient))[0]))) == {0, 1}

    one = jnp.outer(jnp.exp(normal(6)), jnp.exp(normal(10, seed=1))) * jnp.sign(normal(6, 10, seed=2))
    factored = optax.scale_by_factored_rms(min_dim_size_to_factor=1)
    np.testing.assert_allclose(factored.update(one, factored.init(one), one)[0], jnp.sign(one), rtol=1e-5)

    sm3, total = optax.scale_by_sm3(b1=0.0, b2=1.0), 0.0
    state = sm3.init(gradient)
    for i in range(5):
        step = normal(6, 10, seed=i)
        _, state = sm3.update(step, state)
        total = total + step**2
        rows, columns = state.mu
        assert np.all(np.minimum(rows.reshape(-1, 1), columns.reshape(1, -1)) >= total - 1e-6)

    left, _, right = jnp.linalg.svd(normal(16, 64), full_matrices=False)
    spectrum = jnp.logspace(0, np.log10(0.004), 16)
    matrix = (left * spectrum) @ right
    muon = optax.contrib.scale_by_muon(weight_dimension_numbers={"w": optax.contrib.MuonDimensionNumbers()})
    apply = lambda x: muon.update({"w": x}, muon.init({"w": x}))[0]["w"]
    levelled = jnp.linalg.svd(apply(matrix), compute_uv=False)
    assert spectrum[-1] / jnp.linalg.norm(spectrum) > 0.002 and np.all((levelled > 0.68) & (levelled < 1.205))
    np.testing.assert_allclose(apply(100 * matrix), apply(matrix), atol=1e-3)
