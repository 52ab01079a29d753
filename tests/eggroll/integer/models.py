"""Random integer models and members, in the shapes of `rl.models.egg` and of the twin, and one of three weights."""

import jax
import jax.numpy as jnp
import numpy as np

from eggroll.integer import Perturbed, arithmetic
from rl.models import egg
from tests.eggroll.integer import twin

SMALL = {"block": {"norm": (8,), "up": (40, 8)}, "head": (40, 8)}  # factors of a size are made together


def for_twin(weights):
    """The tree of `rl.models.egg` as the twin has it; leaves are arrays, or Perturbed."""

    def leaf(x):
        if isinstance(x, Perturbed):
            return twin.Perturbed(*(np.asarray(v) for v in (x.base, x.left, x.right)), int(x.sign), x.shift)
        return np.asarray(x)

    weights = jax.tree.map(leaf, weights, is_leaf=lambda x: isinstance(x, Perturbed))
    blocks = [weights[f"block_{i}"] for i in range(sum(name.startswith("block") for name in weights))]
    blocks = [
        {"norm_1": b["norm_1"], "gru": b["recurrent"], "norm_2": b["norm_2"], "mlp": {"up": b["up"], "down": b["down"]}}
        for b in blocks
    ]
    return {"embed": weights["embed"], "blocks": blocks, "norm": weights["norm"], "head": weights["head"]}


def random_params(config, seed):
    """Any numbers of the format, extremes among them, in every leaf."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: egg.init(config, jax.random.key(0)))
    draw = lambda x: np.clip(np.rint(rng.standard_normal(x.shape) * rng.choice([8, 16, 60])), -127, 127)
    return jax.tree.map(lambda x: jnp.asarray(draw(x), jnp.int8), shapes)


def random_text(seed, *shape):
    """Bytes with a separator now and then."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(np.where(rng.random(shape) < 0.1, 0, rng.integers(1, 256, shape)), jnp.uint8)


def numbers(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).integers(-127, 128, shape), jnp.int8)


def small_params(seed):
    """Every number of the format, in a few leaves."""
    shape = lambda x: isinstance(x, tuple)
    return jax.tree.map(lambda sizes: numbers(seed + sum(sizes), *sizes), SMALL, is_leaf=shape)


def small_score(weights, carry, rows):
    """A norm and a product of what is carried and the rows."""
    out = arithmetic.product(weights["head"], arithmetic.norm(arithmetic.add(carry, rows), weights["block"]["norm"]))
    return out.astype(jnp.int32).sum(), out[:, :8]


def assert_same(ours, theirs):
    """Equal integers, none of them -128 where they are int8."""
    ours = np.asarray(ours)
    np.testing.assert_array_equal(ours, theirs)
    assert ours.dtype != np.int8 or ours.min() >= -127
