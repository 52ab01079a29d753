"""One of two processes with two devices each, which save a state together; started by the test.

Arguments: process, port, folder, and what to do: `save` or `restore`.
"""

import sys
from pathlib import Path

import jax
import numpy as np

from rl import checkpoint

ROWS = np.arange(24, dtype=np.float32).reshape(8, 3)


def state(value: float = 1.0):
    """Of leaves spread over, and replicated on, all devices of both, and of this process alone."""
    mesh = jax.make_mesh((2, 2), ("a", "b"))

    def place(array, *spec):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        return jax.make_array_from_callback(array.shape, sharding, lambda index: value * array[index])

    leaves = {"rows": place(ROWS, ("a", "b")), "half": place(ROWS, "a"), "all": place(ROWS[0])}
    return leaves | {"host": np.arange(3) * int(value), "count": 7, "local": jax.numpy.ones(2) * value}


def main() -> None:
    """Saves twice through the writer, or restores what two processes saved."""
    process, port, folder, action = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, process)
    if action == "save":
        with checkpoint.Writer(folder) as writer:
            for step in (1, 2):
                writer.submit(step, state(step), {"by": process})
        assert checkpoint.steps(folder) == [1, 2]  # for everybody, as soon as it is over
    found = checkpoint.restore(folder, state(0.0))
    for name, leaf in state(found.step).items():
        for shard, expected in zip(
            found.state[name].addressable_shards if isinstance(leaf, jax.Array) else [],
            leaf.addressable_shards if isinstance(leaf, jax.Array) else [],
            strict=True,
        ):
            np.testing.assert_array_equal(shard.data, expected.data)
    print("restored", found.step, found.extra, len(found.skipped), found.state["host"].tolist(), found.state["count"])


if __name__ == "__main__":
    main()
