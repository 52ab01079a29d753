"""Every optimizer of `rl.optim`, with settings small enough for small trees, and the tree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rl import optim

PROJECTIONS = ("block", "columns", "rows", "randk", "permutation", "svd", "random")
MAKERS = {
    **{f"frugal_{p}": functools.partial(optim.frugal, density=0.5, projection=p, every=5) for p in PROJECTIONS},
    "frugal_project": functools.partial(optim.frugal, density=0.5, projection="columns", every=5, state="project"),
    "frugal_lion": functools.partial(optim.frugal, density=0.5, every=5, full="lion", free="sgd", free_scale=0.01),
    "frugal_zero": functools.partial(optim.frugal, density=0.0),
    "galore": functools.partial(optim.galore, rank=4, every=5, scale=1.0),
    "badam": functools.partial(optim.badam, every=5),
    "fira": functools.partial(optim.fira, rank=4, every=5, scale=1.0),
    "ldadam": functools.partial(optim.ldadam, rank=4),
    "ldadam_plain": functools.partial(optim.ldadam, rank=4, error_feedback=False),
    "apollo": functools.partial(optim.apollo, rank=4, every=5),
    "apollo_mini": functools.partial(optim.apollo_mini, every=5, scale=1.0),
    "adam_mini": optim.adam_mini,
    "adam8bit": functools.partial(optim.adam8bit, rules=(("dense/kernel", "coded"),)),
}


def tree(seed: int = 0, layers: int = 2, dtype=jnp.float32):
    """An embedding [6, 8], and layers with kernels [8, 12] and [12, 8], a bias and a norm's scale."""
    rng = np.random.default_rng(seed)
    new = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    layer = lambda: {
        "dense": {"kernel": new(8, 12), "bias": new(12)},
        "back": {"kernel": new(12, 8)},
        "norm": {"scale": new(8)},
    }
    return {"embed": {"embedding": new(6, 8)}, **{f"layer_{i}": layer() for i in range(layers)}}


def stack(params):
    """The same tree with its layers stacked."""
    layers = [value for key, value in params.items() if key.startswith("layer_")]
    return {"embed": params["embed"], "layers": jax.tree.map(lambda *xs: jnp.stack(xs), *layers)}


@functools.cache
def stepper(name: str):
    """(optimizer, its jitted update and apply): (gradients, state, params) -> (params, state), the last two donated."""
    tx = MAKERS[name](1e-2)

    def step(gradients, state, params):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return tx, jax.jit(step, donate_argnums=(1, 2))
