"""Every optimizer on parameters that lie as `rl.mesh.LAYOUT` says, divided in every way it knows."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eggroll import sharding
from rl import mesh as meshes
from rl import optim
from tests.rl.optim.cases import MAKERS

ALL = MAKERS | {
    "adamw": optax.adamw,
    "adam8bit": functools.partial(optim.adam8bit, rules=(("up/kernel", "coded"),)),
}
# What they choose, or how they store it, depends on all entries of a matrix, which is put together for the update.
GATHER = {
    "galore",
    "fira",
    "adam8bit",
    *(f"frugal_{name}" for name in ("columns", "randk", "permutation", "svd", "project")),
}
WHOLE = re.compile(r"= f32\[(?:8,12|12,8|96|6,8|48)\]\S* (?!parameter)(\S+?)\(")  # a matrix that nothing is divided of


def tree(seed):
    rng = np.random.default_rng(seed)
    new = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    mlp = lambda: {"up": {"kernel": new(8, 12), "bias": new(12)}, "down": {"kernel": new(12, 8)}}
    layer = lambda: {"mlp": mlp(), "norm": {"scale": new(8)}}
    return {"embed": {"embedding": new(6, 8)}, "layer_0": layer(), "layer_1": layer()}


def lies_as_its_parameter(state, params):
    owner = sharding.owners(params)
    for path, x in jax.tree_util.tree_flatten_with_path(state)[0]:
        found = owner(path)
        if found is None:
            assert x.sharding.is_fully_replicated, path
        elif x.shape == found[1].shape:
            assert x.sharding.is_equivalent_to(found[1].sharding, x.ndim), (path, x.sharding)


@pytest.mark.parametrize("name", ["adamw", *sorted(set(ALL) - {"adamw"})])
def test_updates_are_those_of_one_device_and_states_lie_as_their_parameters(name):
    tx, mesh = ALL[name](1e-2), meshes.make({"data": 2, "fsdp": 2, "tensor": 2})

    def step(mesh, gradients, state, params):
        updates, state = tx.update(gradients, state, params)
        params, _, state = meshes.lay_out(mesh, optax.apply_updates(params, updates), None, state)
        return params, state

    alone = jax.jit(functools.partial(step, None))(tree(1), tx.init(tree(0)), tree(0))
    params, gradients = meshes.place(mesh, tree(0)), meshes.place(mesh, tree(1))
    state = meshes.init_optimizer(mesh, tx.init, params)
    assert params["layer_0"]["mlp"]["up"]["kernel"].addressable_shards[0].data.shape == (4, 6)
    lies_as_its_parameter(state, params)
    program = jax.jit(functools.partial(step, mesh)).lower(gradients, state, params).compile()
    after = program(gradients, state, params)
    lies_as_its_parameter(after[1], params)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, after[0], alone[0])
    jax.tree.map(lambda x, like: x.sharding.is_equivalent_to(like.sharding, x.ndim) or pytest.fail(), after[0], params)
    assert name in GATHER or not WHOLE.findall(program.as_text())
