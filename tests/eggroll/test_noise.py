"""Factors as a pure function of seed, leaf path, generation and factor identity."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eggroll import noise

KEY = (jnp.uint32(1), jnp.uint32(2), jnp.uint32(3))
IDS = jnp.arange(5, dtype=jnp.uint32)


def leaf(path="a", shape=(6, 4), form="io"):
    return noise.Leaf(path, shape, jnp.dtype("float32"), form)


draw = functools.partial(jax.jit, static_argnums=(0, 3, 4))(noise.draw)


def drawn(leaf, key=KEY, ids=IDS, role=noise.LEFT, rank=2, kind="gaussian"):
    return np.asarray(draw(((leaf, role),), key, ids, rank, kind)[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", noise.KINDS)
def test_company_order_and_chunks_do_not_matter(kind):
    leaves = [leaf("a", (6, 400)), leaf("b", (3, 400, 7), "soi"), leaf("c", (9,), "full"), leaf("d", (2000, 3))]
    alone = [drawn(x, kind=kind, role=noise.ROW if x.form == "full" else noise.LEFT) for x in leaves]
    requests = [(x, noise.ROW if x.form == "full" else noise.LEFT) for x in leaves]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        together = draw(tuple(requests[i] for i in order), KEY, IDS, 2, kind)
        for i, x in zip(order, together, strict=True):
            np.testing.assert_array_equal(x, alone[i])
    shuffled = noise.draw(requests, KEY, IDS[jnp.array([4, 0])], 2, kind)
    jitted = jax.jit(lambda ids: noise.draw(requests, KEY, ids[:, None], 2, kind))(IDS)
    for x, y, z in zip(alone, shuffled, jitted, strict=True):
        np.testing.assert_array_equal(y, x[[4, 0]])
        np.testing.assert_array_equal(z[:, 0], x)


def test_noise_differs_in_everything_it_depends_on():
    big = leaf("a", (64, 64))
    variants = {
        "base": drawn(big),
        "path": drawn(leaf("b", (64, 64))),
        "seed": drawn(big, (KEY[0] + 1, *KEY[1:])),
        "generation": drawn(big, (*KEY[:2], KEY[2] + 1)),
        "identity": drawn(big, ids=IDS + 5),
        "role": drawn(big, role=noise.RIGHT),
        "layers": drawn(leaf("a", (2, 64, 64), "sio"))[:, 1:],
    }
    names = list(variants)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            x, y = variants[a].ravel(), variants[b].ravel()
            assert abs(np.corrcoef(x, y)[0, 1]) < 5 / np.sqrt(x.size), (a, b)


def test_factors_of_a_stack_are_laid_out_by_axis():
    stacked = leaf("q", (3, 5, 2, 4), "sioo")
    left = noise.unfold(stacked, drawn(stacked), noise.LEFT)
    right = noise.unfold(stacked, drawn(stacked, role=noise.RIGHT), noise.RIGHT)
    assert left.shape == (5, 3, 1, 2, 4, 2)
    assert right.shape == (5, 3, 5, 1, 1, 2)
    np.testing.assert_array_equal(left[:, :, 0, 1, 3, 1], drawn(stacked)[:, :, 1, 7])
    # folding is unfolding's inverse on a gradient
    gradient = np.arange(3 * 8 * 5).reshape(3, 8, 5)
    folded = noise.fold(stacked, jnp.asarray(gradient))
    assert folded.shape == (3, 5, 2, 4)
    assert folded[2, 3, 1, 2] == gradient[2, 6, 3]


def test_golden_factors():
    """Frozen: these numbers are part of every checkpoint."""
    np.testing.assert_array_equal(drawn(leaf("layers/0/kernel", (2, 3)), ids=IDS[3:4])[0, 0], GOLDEN)


GOLDEN = np.array(
    [
        [-0.5308315753936768, 1.1473701000213623, -0.595518171787262],
        [-0.5994939208030701, -2.269745349884033, -0.009316855110228062],
    ],
    np.float32,
)


def test_plan_defaults_and_rules():
    params = {"emb": jnp.ones((7, 4)), "out": {"b": jnp.ones(4), "w": jnp.ones((4, 2))}, "s": jnp.ones(())}
    forms = lambda rules=(), rank=1: {x.path: x.form for x in noise.plan(params, rules, rank)}
    assert forms() == {"emb": "io", "out/b": "full", "out/w": "io", "s": "full"}
    rules = (("out/w", "frozen"), ("^out", "full"), ("emb", "oi"))
    assert forms(rules) == {"emb": "oi", "out/b": "full", "out/w": "frozen", "s": "full"}
    assert forms((("", "full"),)) == dict.fromkeys(forms(), "full")


@pytest.mark.parametrize(
    ("params", "rules", "rank", "error", "message"),
    [
        ({"n": jnp.arange(3)}, (), 1, TypeError, "'n' is int32.*freeze it"),
        ({"k": jax.random.key(0)}, (), 1, TypeError, "'k' is key"),
        ({"w": jnp.ones((3, 4, 5))}, (), 1, ValueError, r"'w' has shape \(3, 4, 5\).*'sio'.*infer_rules"),
        ({"w": jnp.ones((3, 4))}, (), 4, ValueError, "rank 4 > 3 for 'w'.*'full'"),
        ({"w": jnp.ones((3, 4))}, (("v", "full"),), 1, ValueError, r"\['v'\] match none of \['w'\]"),
        ({"w": jnp.ones((3, 4))}, (("w", "lowrnk"),), 1, ValueError, "got 'lowrnk' for 'w'"),
        ({"w": jnp.ones((3, 4))}, (("w", "sio"),), 1, ValueError, "one letter i, o or s per axis"),
        ({"w": jnp.ones((3, 4))}, (("w", "ii"),), 1, ValueError, "at least one i and one o"),
        ({"b": jnp.ones(3)}, (("b", "lowrank"),), 1, ValueError, "only a matrix"),
    ],
)
def test_bad_parameters_and_rules(params, rules, rank, error, message):
    with pytest.raises(error, match=message):
        noise.plan(params, rules, rank)


def test_integer_leaves_may_be_frozen():
    plan = noise.plan({"count": jnp.arange(3), "w": jnp.ones((2, 2))}, (("count", "frozen"),), 1)
    assert [x.form for x in plan] == ["frozen", "io"]


@pytest.mark.parametrize(
    "key", [jax.random.PRNGKey(0), jax.random.split(jax.random.key(0)), jax.random.key(0, impl="rbg")]
)
def test_only_one_default_key_is_a_seed(key):
    with pytest.raises(TypeError, match="jax.random.key"):
        noise.seed_words(key)
