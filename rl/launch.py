"""From a command line to a run: what the scripts share around `rl.run.Run`."""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections

import kernels
from rl import checkpoint
from rl import config as config_lib
from rl import mesh as meshes
from rl.workdir import RunError


def launch(
    train: Callable[[ml_collections.ConfigDict, str, bool], dict[str, Any]],
    argv: Sequence[str] | None = None,
    errors: tuple[type[Exception], ...] = (),
) -> tuple[str, dict[str, Any]]:
    """Runs `train(config, workdir, tensorboard)` as the command line asks (`rl.config.parse`), in all processes of a launch.

    Returns in the first process; the others end when it is done. A process that was lost ends them all, with status 3 or by
    an abort of jax (`rl.mesh.connect`).

    Args:
      train: trains and returns the run's result.
      argv: the command line with the program's name first; `sys.argv` if None.
      errors: besides `ConfigError`, `RunError` and `CheckpointError`, what a user can cause and correct: printed as one
        message, with exit status 2. So is a full disk, which leaves the last checkpoint to resume from.

    Returns:
      (workdir, result).
    """
    config, workdir, tensorboard, implementation = config_lib.parse(argv)
    try:
        meshes.connect()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    kernels.use(implementation)
    if implementation != "auto" or jax.default_backend() != "cpu":
        logging.basicConfig(format="%(name)s: %(message)s")
        logging.getLogger("kernels").setLevel(logging.INFO)
    try:
        result = train(config, workdir, tensorboard)
        meshes.agreed(0)  # a device that has not met its peers yet would hang a process that ends
        if not meshes.is_main():
            raise SystemExit(0)
        return workdir, result
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        reason = " ".join(str(error).split())[:300]
        print(
            f"error: process {jax.process_index()} of {jax.process_count()} lost another one ({reason}): start all of them "
            "again by the same command, which resumes from the newest checkpoint", file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(3)  # what waits for the lost one would wait for long
    except OSError as error:
        message = checkpoint.no_room(error, Path(workdir) / "checkpoints")
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr, flush=True)
        if jax.process_count() > 1:
            os._exit(2)  # the others wait for this one, which would wait for them
        raise SystemExit(2) from error
    except (kernels.KernelError, config_lib.ConfigError, RunError, checkpoint.CheckpointError, *errors) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
