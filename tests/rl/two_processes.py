"""One process of a launch of several: a generation of evolution on all devices, printed as JSON by the first.

JAX_COORDINATOR_ADDRESS=127.0.0.1:1234 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=0 python -m tests.rl.two_processes SEED
"""

import json
import sys

import jax
import numpy as np
import optax

import eggroll
from rl import mesh as meshes


def score(params, row):
    return jax.numpy.sum(jax.numpy.tanh(row @ params["w"]))


def main(seed: int) -> None:
    meshes.connect()
    meshes.check_agreement({"seed": seed})
    es = eggroll.strategy(
        optax.adam(1e-2), population=eggroll.crossed(64), sigma=0.1, chunk=8, mesh=meshes.make({"population": -1}),
        axes=meshes.SPREAD,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(4, 8)).astype(np.float32)}
    state, row = es.init(params, jax.random.key(0)), rng.normal(size=(1, 4)).astype(np.float32)

    @jax.jit
    def generation(state):
        scores = es.evaluate(state, score, row)
        return scores, es.update(state, scores)[0]

    for _ in range(2):
        scores, state = generation(state)
    spread = meshes.place(
        meshes.make({"fsdp": -1}), {"embed": {"embedding": np.arange(32, dtype=np.float32).reshape(4, 8)}}
    )
    whole = [np.asarray(x) for x in (scores, state.params["w"], *jax.tree.leaves(meshes.on_host(spread)))]
    told = meshes.exchanged(f"{jax.process_index()} {'éé' * jax.process_index()}")
    print(f"told {told}", file=sys.stderr)
    if meshes.is_main():
        found = {"processes": jax.process_count(), "devices": jax.device_count()}
        print(json.dumps(found | {"bits": [x.tobytes().hex() for x in whole]}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
