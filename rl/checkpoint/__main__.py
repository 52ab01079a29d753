"""What a run has saved, and whether it is intact: `python -m rl.checkpoint RUN`.

    python -m rl.checkpoint runs/x                                          # reads and checks every checkpoint
    python -m rl.checkpoint runs/x --step=200 --leaves                      # names, shapes and dtypes of one
    python -m rl.checkpoint runs/x --only=.params --export=w.safetensors    # the weights of the newest intact one

RUN is a working directory or its folder `checkpoints`. The exit status is 1 if anything asked for is damaged or absent.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp

from rl.checkpoint import store
from rl.checkpoint.leaves import CheckpointError, Row


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m rl.checkpoint", description="Lists and checks the checkpoints of a run, and exports weights."
    )
    parser.add_argument("run", type=Path, help="a working directory, or its folder of checkpoints")
    parser.add_argument("--step", type=int, help="only this checkpoint")
    parser.add_argument("--only", default="", help="only the part of the state with this path, such as .params")
    parser.add_argument("--leaves", action="store_true", help="also list the leaves")
    parser.add_argument("--export", metavar="FILE", help="write the newest intact one as safetensors")
    options = parser.parse_args(argv)
    nested = options.run / "checkpoints"
    directory = nested if nested.is_dir() else options.run
    present = store.steps(directory)
    if not present:
        return _failed(f"{directory} has no checkpoints: give the --workdir of a run that has saved one")
    status, intact = 0, None
    for step in present if options.step is None else [options.step]:
        try:
            rows = store.verify(directory, step, options.only)
        except CheckpointError as error:
            status = _failed(str(error))
            continue
        intact = step
        print(f"step {step}: intact, {len(rows)} leaves, {sum(map(_bytes, rows.values())):,} bytes")
        if options.leaves:
            print("\n".join(f"  {name}: {row['dtype']} {row['shape']}" for name, row in rows.items()))
    if options.export:
        if intact is None:
            return _failed("nothing was exported")
        try:
            store.export(directory, intact, options.export, options.only)
        except CheckpointError as error:
            return _failed(str(error))
        print(f"step {intact} written to {options.export}")
    return status


def _bytes(row: Row) -> int:
    return math.prod(row["shape"]) * jnp.dtype(row["dtype"]).itemsize


def _failed(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
