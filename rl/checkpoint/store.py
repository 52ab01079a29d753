"""Checkpoints on disk, atomically.

A checkpoint is the folder `<directory>/<step, 10 digits>` with `arrays/` (Orbax, uncompressed) and `meta.json`: the caller's
`extra` values and, per leaf of the state, shape, dtype and `parts`: which array of which folder holds which block of it, with
a CRC-32. One process writes every leaf as one block. It is written under a temporary name, flushed to disk and renamed, so
a folder with a step's name was complete once; the checksums, which Orbax has none of, find what was damaged later.

Several processes (`jax.distributed`, one shared file system) all call `save` or `Writer.submit` with the same step. Each
writes, to a folder of its own (`arrays.1/` and so on), the blocks that it is the first to hold; process 0, which alone writes
leaves of the host, waits for all of them and commits. They meet by files alone: a thread may not launch collectives.
"""

import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from rl.checkpoint import leaves, retention
from rl.checkpoint.leaves import CheckpointError, Row, Snapshot

_FORMAT = 2
_TEMPORARY = "writing-"
_UNUSABLE = "unusable-"
_Content = tuple[dict[str, Any], dict[str, np.ndarray]]  # meta data, and the values of leaves
_PATIENCE = 600.0  # seconds that a process waits for what the others write


class Restored(NamedTuple):
    """What `restore` found."""

    step: int  # 0 where no usable checkpoint exists
    state: Any  # the target's structure
    extra: dict[str, Any]  # what `save` was given; empty where no usable checkpoint exists
    skipped: tuple[str, ...]  # one line per unusable checkpoint that was set aside


def save(
    directory: str | Path, step: int, state: Any, extra: Mapping[str, Any], keep: retention.Keep = retention.KEEP
) -> None:
    """Writes one checkpoint, and deletes those that `keep` does not name.

    Args:
      directory: folder of the checkpoints of one run.
      step: number of completed steps, at least 0.
      state: pytree of jax arrays, typed PRNG keys, NumPy arrays and Python numbers.
      extra: JSON values stored beside the state; numbers under `metrics` are what `keep` compares.
      keep: which checkpoints outlive newer ones.

    Raises:
      CheckpointError: a leaf that cannot be stored (the message names it).
    """
    retention.check(keep)
    write(directory, step, leaves.view(state), extra, keep)


def write(
    directory: str | Path,
    step: int,
    snapshot: Snapshot,
    extra: Mapping[str, Any],
    keep: retention.Keep,
    files: Sequence[BinaryIO] = (),
) -> None:
    """`save` of a snapshot, whose `files` are on disk before the checkpoint appears; reads host memory only."""
    directory = Path(directory).absolute()
    temporary, final = directory / f"{_TEMPORARY}{step:010d}", directory / f"{step:010d}"
    process, processes = jax.process_index(), jax.process_count()
    if processes == 1:
        _remove(temporary)
    temporary.mkdir(parents=True, exist_ok=processes > 1)
    parts = _write_arrays(temporary, f"arrays.{process}" if process else "arrays", snapshot)
    for file in files:
        os.fsync(file.fileno())
    if process:
        _write_json(temporary / f"parts.{process}.json", parts)
        return _wait(lambda: not temporary.exists(), f"process 0 to commit {final}")
    for other in range(1, processes):
        theirs = temporary / f"parts.{other}.json"
        _wait(theirs.exists, f"process {other} to write its part of {final}")
        for name, blocks in json.loads(theirs.read_text()).items():
            parts[name] += blocks
        theirs.unlink()
    rows = {name: row | {"parts": parts[name]} for name, row in snapshot.rows.items()}
    meta = {"format": _FORMAT, "step": step, "saved": time.time(), "extra": dict(extra)}
    _write_json(temporary / "meta.json", meta | {"versions": {"jax": jax.__version__}, "leaves": rows})
    _commit(temporary, final)
    for old in retention.doomed(list(_entries(directory)), keep):
        _remove(directory / f"{old:010d}")


def restore(
    directory: str | Path, target: Any, *, step: int | None = None, only: str = "", cast: bool = False
) -> Restored:
    """Reads the newest usable checkpoint into the structure of `target`.

    A checkpoint that cannot be read, or whose checksums differ, is renamed to `unusable-<step>` and the one before it
    is tried. Leaves come back with the dtype, weak type and PRNG implementation they were saved with, and laid out as
    `target`'s leaves, whatever mesh, devices or processes they were saved from.

    Args:
      directory: folder of the checkpoints of one run; need not exist.
      target: a state with the structure, shapes and dtypes to expect; arrays, or `jax.ShapeDtypeStruct`, whose `sharding`
        (None: the default device) is then followed.
      step: the one checkpoint to read, and nothing is set aside; None for the newest usable.
      only: the path of a part, such as ".params"; `target` is then that part, and the rest is not read.
      cast: convert floating-point leaves to the dtype of `target`'s, instead of refusing them.

    Returns:
      `Restored`; `target` itself at step 0 if there is no usable checkpoint.

    Raises:
      CheckpointError: a readable checkpoint has other leaves, shapes or dtypes than `target` (names every one), or was
        written in another format; the checkpoint asked for by `step` is damaged or absent.
    """
    directory, skipped = Path(directory).absolute(), ()
    if step is None:
        found, skipped = _newest_usable(directory, only)
    else:
        found = _read(directory, step, only)
    if found is None:
        return Restored(0, target, {}, skipped)
    meta, values = found
    source = str(directory / f"{meta['step']:010d}")
    state = leaves.fill(target, _part(meta, only), values, within=only, cast=cast, source=source)
    return Restored(meta["step"], state, meta["extra"], skipped)


def steps(directory: str | Path) -> list[int]:
    """The steps of which there are checkpoints, ascending; whether they are intact, `verify` says."""
    directory = Path(directory)
    found = directory.iterdir() if directory.is_dir() else ()
    return sorted(int(path.name) for path in found if path.name.isdigit() and path.is_dir())


def verify(directory: str | Path, step: int, only: str = "") -> dict[str, Row]:
    """Reads a checkpoint, checks every checksum, and returns the rows of its leaves.

    Raises:
      CheckpointError: damaged, absent, or written in another format.
    """
    return _part(_read(Path(directory).absolute(), step, only)[0], only)


def export(directory: str | Path, step: int, path: str | Path, only: str = "") -> None:
    """Writes the leaves below `only`, checked, to a safetensors file, under the rest of their paths joined by dots.

    Raises:
      CheckpointError: the checkpoint is damaged or absent, or nothing in it is called `only`.
    """
    try:
        import safetensors.numpy
    except ImportError as error:
        raise CheckpointError("safetensors files need the package safetensors: pip install safetensors") from error
    meta, values = _read(Path(directory).absolute(), step, only)
    if not values:
        raise CheckpointError(
            f"the checkpoint of step {step} has no leaf below {only!r}; it has {sorted(meta['leaves'])}"
        )
    tensors = {_dotted(name.removeprefix(only)): np.ascontiguousarray(value) for name, value in values.items()}
    if len(tensors) < len(values):
        raise CheckpointError(
            f"leaves of a file need different names, but {len(values)} have {len(tensors)} among them"
        )
    note = {"step": str(step), "part": only, "format": "pt"}
    temporary = Path(f"{path}.writing")
    safetensors.numpy.save_file(tensors, temporary, metadata=note)
    _flush_path(temporary)
    os.replace(temporary, path)


# -- writing -----------------------------------------------------------------------------------------------------------


def _write_arrays(temporary: Path, folder: str, snapshot: Snapshot) -> dict[str, list[Row]]:
    """Writes the blocks that are this process's to write; returns what they are, by leaf."""
    arrays: dict[str, np.ndarray] = {}
    parts: dict[str, list[Row]] = {}
    for name, value in snapshot.values.items():
        parts[name] = []
        for start, block in _blocks(value):
            key = f"{len(arrays):05d}"
            arrays[key] = block
            place = {"array": f"{folder}/{key}", "start": start, "shape": list(block.shape)}
            parts[name].append(place | {"crc32": _checksum(block)})
    if arrays:
        _orbax().save(temporary / folder, arrays)
        _flush(temporary / folder)
    return parts


def _blocks(value: jax.Array | np.ndarray) -> Iterator[tuple[list[int], np.ndarray]]:
    """Where each block starts, and the block; nothing of an empty array, which Orbax refuses: its shape says all there is."""
    if value.size == 0:
        return
    if not isinstance(value, jax.Array) or value.is_fully_addressable:
        if jax.process_index() == 0:
            yield [0] * value.ndim, np.asarray(value)
        return
    for shard in value.addressable_shards:
        if shard.replica_id == 0:
            yield [axis.start or 0 for axis in shard.index], np.asarray(shard.data)


def _orbax() -> ocp.Checkpointer:
    """Writes and reads NumPy arrays for this process alone: how processes meet is decided here, not in Orbax."""
    alone = ocp.options.MultiprocessingOptions(primary_host=jax.process_index(), active_processes={jax.process_index()})
    # Weights are noise to a compressor: 8 % smaller, for three times the processor time that training would need.
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _commit(temporary: Path, final: Path) -> None:
    _flush_path(temporary)
    old = final.with_name(f"{_TEMPORARY}replaced-{final.name}")
    if final.exists():
        _remove(old)
        os.rename(final, old)
    os.rename(temporary, final)
    _flush_path(final.parent)
    _remove(old)


def _checksum(block: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)


def _wait(done: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"waited {_PATIENCE:.0f} s for {what}: is it alive, and is the folder shared by all processes?"
            )
        time.sleep(0.01)


# -- reading -----------------------------------------------------------------------------------------------------------


def _newest_usable(directory: Path, only: str) -> tuple[_Content | None, tuple[str, ...]]:
    """What it holds, and why others were set aside. Process 0 looks for it, and all others read the same one."""
    found, skipped = None, []
    if jax.process_index() == 0:
        for leftover in directory.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(leftover)
        for candidate in reversed(steps(directory)):
            try:
                found = _read(directory, candidate, only)
                break
            except _Damaged as error:
                skipped.append(_set_aside(directory / f"{candidate:010d}", error))
    if jax.process_count() > 1:
        step = int(multihost_utils.broadcast_one_to_all(np.int32(found[0]["step"] if found else -1)))
        if jax.process_index() and step >= 0:
            found = _read(directory, step, only)
    return found, tuple(skipped)


class _Damaged(CheckpointError):
    """A checkpoint that is there and cannot be used."""


def _set_aside(folder: Path, error: Exception) -> str:
    aside = folder.with_name(f"{_UNUSABLE}{folder.name}")
    _remove(aside)
    os.rename(folder, aside)
    return f"{error}; kept as {aside}"


def _read(directory: Path, step: int, only: str) -> _Content:
    """Meta data, and the values of the leaves of a part, all checked."""
    folder = directory / f"{step:010d}"
    if not folder.is_dir():
        raise CheckpointError(f"{directory} has no checkpoint of step {step}; it has {steps(directory)}")
    try:
        meta = json.loads((folder / "meta.json").read_text())
        written = meta.get("format", 1)
        if written == _FORMAT:
            return meta, _read_values(folder, _part(meta, only))
    except Exception as error:  # noqa: BLE001 - Orbax and TensorStore raise many types for damaged files
        reason = " ".join(str(error).split())[:200]
        raise _Damaged(f"checkpoint {folder.name} is unusable ({type(error).__name__}: {reason})") from error
    raise CheckpointError(
        f"{folder} is written in format {written}, this code reads {_FORMAT}: use the code that wrote it"
    )


def _part(meta: Mapping[str, Any], only: str) -> dict[str, Row]:
    """The rows of the leaves at or below a path."""
    below = lambda name: name.startswith(only) and name[len(only) :][:1] in ("", ".", "[")
    return {name: row for name, row in meta["leaves"].items() if below(name)}


def _read_values(folder: Path, rows: Mapping[str, Row]) -> dict[str, np.ndarray]:
    wanted: dict[str, list[str]] = {}
    for row in rows.values():
        for part in row["parts"]:
            place, key = part["array"].split("/")
            wanted.setdefault(place, []).append(key)
    stored = {place: _read_arrays(folder / place, keys) for place, keys in wanted.items()}
    return {name: _assembled(name, row, stored) for name, row in rows.items()}


def _read_arrays(folder: Path, keys: Sequence[str]) -> dict[str, np.ndarray]:
    how = dict.fromkeys(keys, ocp.RestoreArgs(restore_type=np.ndarray))
    arguments = ocp.args.PyTreeRestore(item=dict.fromkeys(keys, 0), restore_args=how, partial_restore=True)
    return _orbax().restore(folder, args=arguments)


def _assembled(name: str, row: Row, stored: Mapping[str, Mapping[str, np.ndarray]]) -> np.ndarray:
    """The leaf from its blocks, each of them checked, and all of it covered."""
    dtype, shape, covered, whole = jnp.dtype(row["dtype"]), tuple(row["shape"]), 0, None
    for part in row["parts"]:
        place, key = part["array"].split("/")
        block = np.asarray(stored[place][key])
        if [*block.shape] != part["shape"] or block.dtype != dtype or _checksum(block) != part["crc32"]:
            raise OSError(f"checksum of {name} differs")
        covered += block.size
        if block.shape == shape:
            whole = block
        else:
            whole = np.empty(shape, dtype) if whole is None else whole
            whole[tuple(slice(at, at + n) for at, n in zip(part["start"], block.shape, strict=True))] = block
    if covered != int(np.prod(shape)):
        raise OSError(f"{name} has {int(np.prod(shape))} elements, {covered} are there")
    return np.zeros(shape, dtype) if whole is None else whole


def _entries(directory: Path) -> Iterator[retention.Entry]:
    """What the rules of retention look at; a damaged checkpoint has no metrics, and is found out by `restore`."""
    for step in steps(directory):
        try:
            meta = json.loads((directory / f"{step:010d}" / "meta.json").read_text())
            yield retention.Entry(step, float(meta["saved"]), dict(meta["extra"].get("metrics", {})))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            yield retention.Entry(step, 0.0, {})


def _dotted(name: str) -> str:
    """`['layer']['kernel'].value[0]` as `layer.kernel.value.0`."""
    return name.replace("']['", ".").replace("']", "").replace("['", ".").replace("[", ".").replace("]", "").strip(".")


# -- files -------------------------------------------------------------------------------------------------------------


def _write_json(path: Path, content: Any) -> None:
    """Complete as soon as it has its name: another process may be waiting for it."""
    temporary = path.with_suffix(".writing")
    temporary.write_text(json.dumps(content))
    _flush_path(temporary)
    os.rename(temporary, path)


def _remove(path: Path) -> None:
    """Deletes a folder; renamed first, so a crash midway leaves nothing that looks like a checkpoint."""
    if path.exists():
        doomed = path.with_name(f"{_TEMPORARY}removed-{path.name}")
        if doomed.exists():
            shutil.rmtree(doomed)
        os.rename(path, doomed)
        shutil.rmtree(doomed)


def _flush(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            _flush_path(Path(root, name))
        _flush_path(Path(root))


def _flush_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
