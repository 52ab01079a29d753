"""One of two processes with two devices each, which save a state together; started by the test.

Arguments: process, port, folder.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from rl import checkpoint
from rl import mesh as meshes
from rl.checkpoint import retention
from tests.rl.checkpoint.test_store import flip

ROWS = np.arange(8000, dtype=np.float32).reshape(8, 1000)


def state(value: float = 1.0):
    """Of leaves spread over, and replicated on, all devices of both, and of this process alone."""
    mesh = jax.make_mesh((2, 2), ("a", "b"))

    def place(array, *spec):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        return jax.make_array_from_callback(array.shape, sharding, lambda index: value * array[index])

    leaves = {"rows": place(ROWS, ("a", "b")), "half": place(ROWS, "a"), "all": place(ROWS[0])}
    return leaves | {"host": np.arange(3) * int(value), "count": 7, "local": jax.numpy.ones(2) * value}


def check(found: checkpoint.Restored) -> None:
    """Every block on this process's devices, and what was found."""
    for name, leaf in state(found.step).items():
        if isinstance(leaf, jax.Array):
            for shard, expected in zip(found.state[name].addressable_shards, leaf.addressable_shards, strict=True):
                np.testing.assert_array_equal(shard.data, expected.data)
    print("restored", found.step, found.extra, len(found.skipped), found.state["host"].tolist(), found.state["count"])


def main() -> None:
    """Saves through the writer, restores, damages what process 1 wrote last, and restores again."""
    process, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, process)
    if process:  # of two that delete a checkpoint, one may find it gone
        retention.doomed = lambda *_: sys.exit("only process 0 deletes old checkpoints")
    with checkpoint.Writer(folder) as writer:
        for step in (1, 2):
            writer.submit(step, state(step), {"by": process})
    assert checkpoint.steps(folder) == [1, 2]  # for everybody, as soon as it is over
    check(checkpoint.restore(folder, state(0.0)))
    meshes.agreed(0)
    if process == 0:
        place = folder / f"{2:010d}"
        rows = json.loads((place / "meta.json").read_text())["leaves"]["['rows']"]
        flip(place / "arrays" / rows["array"] / "3.0")  # process 1 holds the last block of four
    check(checkpoint.restore(folder, state(0.0)))


if __name__ == "__main__":
    main()
