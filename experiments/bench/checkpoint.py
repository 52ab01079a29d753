"""What saving costs a training loop: see the package."""

import functools
import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from experiments.bench.harness import Row, row
from rl import checkpoint
from rl.checkpoint import leaves

Save = Callable[[int, Any], None]


class Size(NamedTuple):
    """Bytes of state in MB, seconds of a step, steps that are timed in a round, rounds at most."""

    megabytes: int
    step: float
    steps: int
    rounds: int


class Round(NamedTuple):
    """Seconds: of a step with its save, in the mean; that `save` took of it; from the last save until it is on disk."""

    step: float
    blocked: float
    durable: float


def _sizes() -> Iterator[Size]:
    yield Size(200, 1.2, 3, 3)
    yield Size(50, 1.2, 3, 1)
    yield Size(400, 1.2, 3, 1)


def state_of(megabytes: float) -> dict[str, jax.Array]:
    """Layers of weights with two moments each, in f32."""
    layers = 4
    width = round((megabytes * 1e6 / 4 / 3 / layers) ** 0.5)
    names = [f"{kind}_{i}" for kind in ("weights", "mean", "variance") for i in range(layers)]
    return {name: jax.random.normal(jax.random.key(i), (width, width)) for i, name in enumerate(names)}


@functools.partial(jax.jit, donate_argnums=0)
def _step(state, x: jax.Array, rounds: jax.Array):
    """Products that read nothing of the state, then an update of all of it in place."""
    x = jax.lax.fori_loop(0, rounds, lambda _, y: jnp.tanh(y @ x), x)
    return jax.tree.map(lambda leaf: 0.999 * leaf + 1e-3 * x[0, 0], state), x[0, 0]


def calibrated(seconds: float) -> Callable[[Any], Any]:
    """state -> state in about so many seconds on this machine, complete when it returns."""
    x, state = jax.random.normal(jax.random.key(0), (1024, 1024)), {"x": jnp.zeros(())}

    def took(rounds: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready(_step({"x": jnp.zeros(())}, x, jnp.int32(rounds)))
        return time.perf_counter() - start

    jax.block_until_ready(_step(state, x, jnp.int32(1)))
    trial = 8
    rounds = max(1, round(trial * seconds / min(took(trial) for _ in range(3))))

    def step(state):
        state, scalar = _step(state, x, jnp.int32(rounds))
        scalar.block_until_ready()
        return state

    return step


@contextmanager
def _plain(folder: Path) -> Iterator[tuple[Save, Callable[[], None]]]:
    yield (lambda number, state: None), lambda: None


@contextmanager
def _writer(folder: Path) -> Iterator[tuple[Save, Callable[[], None]]]:
    with checkpoint.Writer(folder) as writer:
        yield (lambda number, state: writer.submit(number, state, {})), writer.wait


@contextmanager
def _synchronous(folder: Path) -> Iterator[tuple[Save, Callable[[], None]]]:
    yield (lambda number, state: checkpoint.save(folder, number, state, {})), lambda: None


@contextmanager
def _orbax(folder: Path) -> Iterator[tuple[Save, Callable[[], None]]]:
    """Orbax's own, with its defaults: no checksums, no flush to disk."""
    with ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:

        def save(number: int, state: Any) -> None:
            checkpointer.save(folder / str(number), args=ocp.args.PyTreeSave(state))
            if number > 2:  # it waited for the one before; the one before that is not kept by anybody else either
                shutil.rmtree(folder / str(number - 2))

        yield save, checkpointer.wait_until_finished


WAYS = {"plain": _plain, "writer": _writer, "synchronous": _synchronous, "orbax": _orbax}


def timed(way: str, step: Callable[[Any], Any], state: Any, steps: int, folder: Path) -> tuple[Round, Any]:
    """Saves after every step; the first step does not count, and the state comes back."""
    started, blocked = [], []
    with WAYS[way](folder) as (save, wait):
        for number in itertools.count(1):
            started.append(time.perf_counter())
            if len(started) == steps + 2:
                break
            state = step(state)
            before = time.perf_counter()
            save(number, state)
            blocked.append(time.perf_counter() - before)
        wait()
        before = time.perf_counter()
        save(number, state)  # alone: nothing is computed meanwhile
        wait()
        durable = time.perf_counter() - before
    shutil.rmtree(folder)
    return Round((started[-1] - started[1]) / steps, statistics.median(blocked[1:]), durable), state


def saving(repeats: int) -> Iterator[Row]:
    """A loop that saves after every step against one that does not, all ways in turn."""
    for size in _sizes():
        step, state, rounds = calibrated(size.step), state_of(size.megabytes), min(repeats, size.rounds)
        measured: dict[str, list[Round]] = {way: [] for way in WAYS}
        with tempfile.TemporaryDirectory() as folder:
            for turn in range(rounds):
                for way in WAYS:
                    (path := Path(folder, f"{way}{turn}")).mkdir()
                    made, state = timed(way, step, state, size.steps, path)
                    measured[way].append(made)
            yield from _compared(size, state, measured, rounds)
            yield _restored(size, state, Path(folder), rounds)


def _compared(size: Size, state: Any, measured: dict[str, list[Round]], rounds: int) -> Iterator[Row]:
    median = lambda way, field: statistics.median(getattr(made, field) for made in measured[way])
    plain, copy = median("plain", "step"), _copy_seconds(state)
    for way in list(WAYS)[1:]:
        seconds = {"plain": plain, way: median(way, "step")}
        setting = {"state_mb": size.megabytes, "step_seconds": size.step, "way": way}
        yield row(
            setting, "saving_over_plain", seconds[way] / plain, seconds, rounds,
            blocked_over_step=round(median(way, "blocked") / plain, 4), blocked_seconds=round(median(way, "blocked"), 5),
            durable_seconds=round(median(way, "durable"), 4), copy_seconds=round(copy, 4), steps=size.steps,
        )  # fmt: skip


def _copy_seconds(state: Any) -> float:
    """Copying the state once, as the writer does: nobody who copies can be faster."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        snapshot = leaves.copy(leaves.view(state))
        jax.block_until_ready(list(snapshot.values.values()))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _restored(size: Size, state: Any, folder: Path, rounds: int) -> Row:
    """Reading, checking and placing the state, against Orbax's reading of the same arrays."""
    checkpoint.save(folder / "ours", 1, state, {})
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    arrays = folder / "ours" / f"{1:010d}" / "arrays"
    fns = {
        "restore": lambda: checkpoint.restore(folder / "ours", like).state,
        "orbax": lambda: ocp.PyTreeCheckpointer().restore(arrays),
    }
    seconds: dict[str, list[float]] = {name: [] for name in fns}
    for _, (name, fn) in itertools.product(range(max(2, rounds)), fns.items()):
        start = time.perf_counter()
        jax.block_until_ready(fn())
        seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    setting = {"state_mb": size.megabytes}
    return row(setting, "restore_over_orbax", medians["restore"] / medians["orbax"], medians, max(2, rounds))


CASES = {"checkpoint": saving}
