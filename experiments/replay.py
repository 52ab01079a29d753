"""Rebuilds any generation of an evolution run from its log, and checks it against the checkpoint of that step.

    python -m experiments.replay runs/cartpole --step=40

A RUN is the --workdir of `experiments.control` or `experiments.train` with method eggroll or openes, finished or not; nothing
in it is changed. Its seed and config (and what its warm start made) give theta_0, its `generations.bin` the fitness of every
generation, and only updates are computed: no episode is played and no answer sampled. Without --step it is the newest step
that has a checkpoint, or else the last one logged. Exit status: 0 if the rebuilt state equals the checkpoint bit for bit, or
there is none to compare with (which is said); 1 if they differ; 2 if it cannot be rebuilt.

Of a language model it is the method's state that is rebuilt: weights, optimizer, generation, key. Which problems were asked is
not part of it.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

import kernels
from experiments import build, control
from experiments.evaluate import run_config
from experiments.language import set_up, task_of, warmed
from kernels.dispatch import IMPLEMENTATIONS
from rl import checkpoint, envs, generations
from rl.config import ConfigError
from rl.control.evolution import Generation
from rl.rewards.pool import Pool, PoolError
from rl.run import RunError
from rl.tasks.types import TaskError


class Start(NamedTuple):
    """An evolution run before its first step."""

    state: Any  # of the method: what a log rebuilds
    only: str  # the path of that state in a checkpoint
    update: Callable[[Any, Any], Any]  # (state, what a generation logged) -> state
    like: Any  # pytree of the shapes that a generation logs


def start_of(run: Path, config: ml_collections.ConfigDict) -> Start:
    """The start of a run, by the functions that started it.

    Raises:
        ConfigError: a run of another kind, or what its warm start made is gone.
    """
    scripts = {"env": _start_control, "task": _start_language}
    script = next((start for key, start in scripts.items() if key in config), None)
    method = config.get("method", "none")
    if script is None or method not in build.EVOLUTION:
        raise ConfigError(
            f"only runs of evolution ({' or '.join(build.EVOLUTION)}, by experiments.control or experiments.train) log what "
            f"rebuilds them; {run} has method {method}"
        )
    build.check(config)
    return script(run, config)


def _start_control(run: Path, config: ml_collections.ConfigDict) -> Start:
    learner = control.make_learner(config, envs.make(config.env, config.max_steps or None))
    return Start(
        state=learner.state,
        only="",
        update=lambda state, generation: learner.update(state, generation)[0],
        like=Generation(jax.ShapeDtypeStruct((config.es.members,), jnp.float32), learner.state.normalizer),
    )


def _start_language(run: Path, config: ml_collections.ConfigDict) -> Start:
    task = task_of(config)
    with Pool(task.verify, workers=1, deadline=config.reward.deadline) as pool:
        setup, params = set_up(config, task, pool)
    if setup.lessons is not None and not (run / "warm_start").is_dir():
        raise ConfigError(f"this run started from its warm start, but {run} has no folder warm_start: put it back")
    return Start(
        state=setup.learner.init(warmed(run, setup, params)),
        only=".learner",
        update=setup.learner.update,
        like=jax.ShapeDtypeStruct((setup.learner.members,), jnp.float32),
    )


def rebuild(run: Path, start: Start, step: int) -> Any:
    """The state after `step` steps.

    Raises:
        generations.LogError: the log is damaged before that step, or does not reach it.
    """
    path, done = run / generations.NAME, 0
    state = jax.tree.map(lambda x: x.copy(), start.state)  # updates may donate what they are given
    for record in itertools.islice(generations.read(path, start.like), step):
        state, done = start.update(state, record), done + 1
    if done < step:
        raise generations.LogError(f"{path} holds {done} generations, so --step must be 0 to {done}; got {step}")
    return state


def difference(rebuilt: Any, saved: Any) -> str:
    """The first leaf in which two states differ in a bit, with its first such element, or ""."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(rebuilt), jax.tree.leaves(saved), strict=True)
    for (path, ours), theirs in pairs:
        ours, theirs = _numbers(ours), _numbers(theirs)
        name = jax.tree_util.keystr(path)
        if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            return (
                f"{name}: {ours.dtype}{list(ours.shape)} rebuilt, {theirs.dtype}{list(theirs.shape)} in the checkpoint"
            )
        bits = lambda x: np.ascontiguousarray(x).reshape(-1, 1).view(np.uint8)
        unequal = (bits(ours) != bits(theirs)).any(axis=1) if ours.size else np.zeros(0, bool)
        if unequal.any():
            first = int(unequal.argmax())
            at = [int(i) for i in np.unravel_index(first, ours.shape)]
            return (
                f"{name}{at}: {ours.reshape(-1)[first]!s} rebuilt, {theirs.reshape(-1)[first]!s} in the checkpoint "
                f"({int(unequal.sum())} of {ours.size} elements differ)"
            )
    return ""


def _numbers(leaf: Any) -> np.ndarray:
    key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if key else leaf)


def replay(run: Path, step: int | None) -> int:
    """Rebuilds a step, compares, and says what came out; returns the exit status."""
    config = run_config(run)
    start = start_of(run, config)
    saved = checkpoint.steps(run / "checkpoints")
    if step is None:
        step = saved[-1] if saved else generations.count(run / generations.NAME, start.like)
    if step < 0:
        raise ConfigError(f"--step must be at least 0; got {step}")
    began = time.perf_counter()
    state = jax.block_until_ready(rebuild(run, start, step))
    seconds = time.perf_counter() - began
    size, members = generations.record_bytes(start.like), config.es.members
    print(
        f"rebuilt step {step} of {run} in {seconds:.1f} s from {step * size} bytes of log: {size} a generation, "
        f"{size / members:.1f} a member"
    )
    if step not in saved:
        print(
            f"not compared: there is no checkpoint of step {step}; there is one of {', '.join(map(str, saved)) or 'none'}"
        )
        return 0
    different = difference(
        state, checkpoint.restore(run / "checkpoints", start.state, step=step, only=start.only).state
    )
    leaves = len(jax.tree.leaves(state))
    print(f"different: {different}" if different else f"equal: all {leaves} arrays of the checkpoint, bit for bit")
    return 1 if different else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.replay", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="a job's --workdir")
    parser.add_argument("--step", type=int, help="by default the newest that has a checkpoint")
    parser.add_argument(
        "--kernels", default="auto", choices=IMPLEMENTATIONS, help="as the job ran; they differ in rounding"
    )
    arguments = parser.parse_args(argv)
    kernels.use(arguments.kernels)
    try:
        return replay(arguments.run, arguments.step)
    except (
        *(ConfigError, generations.LogError, checkpoint.CheckpointError, RunError),
        *(envs.EnvError, TaskError, PoolError, kernels.KernelError),
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
