"""One process of a launch of several: evolution of all designs and all optimizers on all devices, printed as JSON by the first.

JAX_COORDINATOR_ADDRESS=127.0.0.1:1234 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=0 python -m tests.rl.two_processes SEED
"""

import json
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import eggroll
from rl import mesh as meshes
from tests.rl.optim.test_layout import ALL, tree

DESIGNS = {
    "independent": eggroll.independent(64),
    "antithetic": eggroll.antithetic(64),
    "crossed": eggroll.crossed(64),
    "blocks": eggroll.crossed(64, blocks=4),
}
OPTIMIZERS = {  # one projection of every kind
    name: maker
    for name, maker in ALL.items()
    if not name.startswith("frugal") or name in ("frugal_block", "frugal_columns", "frugal_svd", "frugal_project")
}
INTEGERS = {"integer_pairs": eggroll.antithetic(64), "integer_crossed": eggroll.crossed(128, rows=8, signs=2)}


def score(params, row):
    return jnp.sum(jnp.tanh(row @ params["w"]))


def evolved(population):
    """[scores, parameters] after two generations."""
    es = eggroll.strategy(
        optax.adam(1e-2),
        population=population,
        sigma=0.1,
        chunk=8,
        mesh=meshes.make({"population": -1}),
        axes=meshes.SPREAD,
    )
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(4, 8)).astype(np.float32)}
    state, row = es.init(params, jax.random.key(0)), rng.normal(size=(1, 4)).astype(np.float32)

    @jax.jit
    def generation(state):
        scores = es.evaluate(state, score, row)
        return scores, es.update(state, scores)[0]

    for _ in range(2):
        scores, state = generation(state)
    return [np.asarray(x) for x in (scores, state.params["w"])]


def evolved_in_integers(population):
    """[parameters, what members carry] after two generations."""
    es = eggroll.integer.strategy(population=population, alpha=0.5, mesh=meshes.make({"population": -1}))
    params = {"w": np.random.default_rng(0).integers(-60, 60, (8, 8)).astype(np.int8)}
    state, carry = es.init(params, jax.random.key(0)), es.carry(np.ones((1, 8), np.int8))

    def score(weights, carry, rows):
        carry = eggroll.integer.arithmetic.product(weights["w"], carry + rows)
        return jnp.sum(carry, dtype=jnp.int32), carry

    @jax.jit
    def generation(state, carry):
        scores, carry = es.evaluate(state, score, carry, jnp.ones((1, 8), jnp.int8))
        return es.update(state, scores)[0], carry

    for _ in range(2):
        state, carry = generation(state, carry)
    whole = jax.jit(lambda x: x, out_shardings=NamedSharding(es.mesh, PartitionSpec()))
    return [np.asarray(state.params["w"]), np.asarray(whole(carry))]


def stepped(maker):
    """Parameters after two steps of an optimizer, laid out over data, fsdp and tensor."""
    tx, mesh = maker(1e-2), meshes.make({"data": 2, "fsdp": 2, "tensor": 2})
    params, gradients = meshes.place(mesh, tree(0)), meshes.place(mesh, tree(1))
    state = meshes.init_optimizer(mesh, tx.init, params)

    @jax.jit
    def step(gradients, state, params):
        updates, state = tx.update(gradients, state, params)
        params, _, state = meshes.lay_out(mesh, optax.apply_updates(params, updates), None, state)
        return params, state

    for _ in range(2):
        params, state = step(gradients, state, params)
    return np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(meshes.on_host(params))]).tolist()


def main(seed: int) -> None:
    meshes.connect()
    meshes.check_agreement({"seed": seed})
    bits = {name: evolved(population) for name, population in DESIGNS.items()}
    bits |= {name: evolved_in_integers(population) for name, population in INTEGERS.items()}
    spread = meshes.place(
        meshes.make({"fsdp": -1}), {"embed": {"embedding": np.arange(32, dtype=np.float32).reshape(4, 8)}}
    )
    bits["spread"] = [np.asarray(x) for x in jax.tree.leaves(meshes.on_host(spread))]
    steps = {name: stepped(maker) for name, maker in OPTIMIZERS.items()}
    told = meshes.exchanged(f"{jax.process_index()} {'éé' * jax.process_index()}")
    print(f"told {told}", file=sys.stderr)
    if meshes.is_main():
        found = {"processes": jax.process_count(), "devices": jax.device_count()}
        crcs = {name: [zlib.crc32(x.tobytes()) for x in arrays] for name, arrays in bits.items()}
        print(json.dumps(found | {"bits": crcs, "steps": steps}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
