"""Checkpoints on disk, atomically.

A checkpoint is the folder `<directory>/<step, 10 digits>` with `arrays/` (Orbax, Zarr) and `meta.json`: the caller's
`extra` values and, per leaf of the state, shape, dtype, the name of its array, and a CRC-32 of each of its `blocks`: one
process writes a leaf as one block. It is written under a temporary name, flushed to disk and renamed, so a folder with a
step's name was complete once; the checksums, which Orbax has none of, find what was damaged later.

Several processes (`jax.distributed`, one shared file system) all call `save` or `Writer.submit` with the same step. Through
Orbax each writes the blocks that it is the first to hold; process 0, which alone writes leaves of the host, commits when it has
everybody's checksums. They meet at barriers of the coordinator and at files, never in a collective: a thread runs none.
"""

import json
import math
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

from rl import mesh as meshes
from rl.checkpoint import backend, disk, leaves, retention
from rl.checkpoint.leaves import CheckpointError, NoRoomError, Row, Snapshot

_FORMAT = 2
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
      NoRoomError: a disk, a quota or a limit of this process is full.
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
    """`save` of a snapshot, whose `files` are on disk before the checkpoint appears; reads host memory only.

    Raises:
      NoRoomError: a disk, a quota or a limit of this process is full.
    """
    directory = Path(directory).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    room = shutil.disk_usage(directory).free
    try:
        _write(directory, step, snapshot, extra, keep, files)
    except Exception as error:
        takes = sum(value.nbytes for value in snapshot.values.values())
        message = no_room(error, directory, f"; step {step} takes {takes:,} bytes and {room:,} were free")
        if message is None:
            raise
        raise NoRoomError(message) from error


def no_room(error: Exception, directory: str | Path, sizes: str = "") -> str | None:
    """What to tell about a write that failed because something is full, and how to go on; None if that is not why."""
    if isinstance(error, NoRoomError):
        return str(error)
    full, saved = disk.full(error), steps(directory)
    if full is None:
        return None
    intact = f"the checkpoint of step {saved[-1]} is intact" if saved else "there is no checkpoint yet"
    again = "resumes from it" if saved else "begins again"
    reason = " ".join(str(error).split()).partition(" [")[0]  # without what TensorStore adds
    return f"{reason}: {full}{sizes}; {intact}: make room, and the same command {again}"


def _write(
    directory: Path,
    step: int,
    snapshot: Snapshot,
    extra: Mapping[str, Any],
    keep: retention.Keep,
    files: Sequence[BinaryIO],
) -> None:
    temporary, final = directory / f"{disk.TEMPORARY}{step:010d}", directory / f"{step:010d}"
    if jax.process_index() == 0:
        disk.remove(temporary)
        temporary.mkdir()
    arrays, rows = _described(snapshot)
    if arrays:
        backend.checkpointer(range(jax.process_count())).save(temporary / "arrays", arrays)
        disk.flush_all(temporary / "arrays")
    for file in files:
        os.fsync(file.fileno())
    if jax.process_index():
        disk.write_json(
            temporary / f"blocks.{jax.process_index()}.json", {name: row["blocks"] for name, row in rows.items()}
        )
        return _wait(lambda: not temporary.exists(), f"process 0 to commit {final}")
    for other in range(1, jax.process_count()):
        _gather(temporary / f"blocks.{other}.json", rows)
    meta = {"format": _FORMAT, "step": step, "saved": time.time(), "extra": dict(extra)}
    meta |= {"versions": {"jax": jax.__version__}, "leaves": rows}
    disk.write_json(temporary / "meta.json", meta | {"crc32": _meta_checksum(meta)})
    _commit(temporary, final)
    for old in retention.doomed(list(_entries(directory)), keep):
        disk.remove(directory / f"{old:010d}")


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
    disk.flush(temporary)
    os.replace(temporary, path)


# -- writing -----------------------------------------------------------------------------------------------------------


def _described(snapshot: Snapshot) -> tuple[dict[str, jax.Array | np.ndarray], dict[str, Row]]:
    """What Orbax gets to write, and the rows with the checksums of what this process contributes."""
    arrays: dict[str, jax.Array | np.ndarray] = {}
    rows: dict[str, Row] = {}
    for name, value in snapshot.values.items():
        rows[name] = snapshot.rows[name] | {"array": f"{len(arrays):05d}", "blocks": []}
        if value.size == 0:  # Orbax refuses empty arrays; their shape and dtype say all there is
            continue
        spread = isinstance(value, jax.Array) and not value.is_fully_addressable
        arrays[rows[name]["array"]] = value if spread else np.asarray(value)
        for start, block in _blocks(value) if spread else [([0] * value.ndim, np.asarray(value))]:
            if spread or jax.process_index() == 0:
                rows[name]["blocks"].append({"start": start, "shape": list(block.shape), "crc32": _checksum(block)})
    return arrays, rows


def _blocks(value: jax.Array) -> Iterator[tuple[list[int], np.ndarray]]:
    """Where each block of an array of several processes starts that is this one's to write, and the block."""
    for shard in value.addressable_shards:
        if shard.replica_id == 0:
            yield [axis.start or 0 for axis in shard.index], np.asarray(shard.data)


def _gather(path: Path, rows: Mapping[str, Row]) -> None:
    """Adds what another process has written to the rows."""
    _wait(path.exists, f"another process to write {path}")
    for name, blocks in json.loads(path.read_text()).items():
        rows[name]["blocks"] += blocks
    path.unlink()


def _commit(temporary: Path, final: Path) -> None:
    disk.flush(temporary)
    old = final.with_name(f"{disk.TEMPORARY}replaced-{final.name}")
    if final.exists():
        disk.remove(old)
        os.rename(final, old)
    os.rename(temporary, final)
    disk.flush(final.parent)
    disk.remove(old)


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
        for leftover in directory.glob(f"{disk.TEMPORARY}*"):
            shutil.rmtree(leftover)
        for candidate in reversed(steps(directory)):
            try:
                found = _read(directory, candidate, only)
                break
            except _Damaged as error:
                skipped.append(_set_aside(directory / f"{candidate:010d}", error))
    step = meshes.agreed(found[0]["step"] if found else -1)[0]
    if jax.process_index() and step >= 0:
        found = _read(directory, step, only)
    return found, tuple(skipped)


class _Damaged(CheckpointError):
    """A checkpoint that is there and cannot be used."""


def _set_aside(folder: Path, error: Exception) -> str:
    aside = folder.with_name(f"{_UNUSABLE}{folder.name}")
    disk.remove(aside)
    os.rename(folder, aside)
    return f"{error}; kept as {aside}"


def _read(directory: Path, step: int, only: str) -> _Content:
    """Meta data, and the values of the leaves of a part, all checked."""
    folder = directory / f"{step:010d}"
    if not folder.is_dir():
        raise CheckpointError(f"{directory} has no checkpoint of step {step}; it has {steps(directory)}")
    try:
        meta = json.loads((folder / "meta.json").read_text())
        written, crc32 = meta.get("format", 1), meta.pop("crc32", None)
        if (written == _FORMAT or crc32 is not None) and crc32 != _meta_checksum(meta):
            raise OSError("checksum of meta.json differs")
        if written == _FORMAT:
            return meta, _read_values(folder, _part(meta, only))
    except Exception as error:  # noqa: BLE001 - Orbax and TensorStore raise many types for damaged files
        reason = " ".join(str(error).split())[:200]
        raise _Damaged(f"checkpoint {folder.name} is unusable ({type(error).__name__}: {reason})") from error
    raise CheckpointError(
        f"{folder} is written in format {written}, this code reads {_FORMAT}: use the code that wrote it"
    )


def _meta_checksum(meta: Mapping[str, Any]) -> int:
    """Of all that `meta.json` says but this number: `extra` steers how a run resumes, and the rest what is read."""
    return zlib.crc32(json.dumps(meta).encode())


def _part(meta: Mapping[str, Any], only: str) -> dict[str, Row]:
    """The rows of the leaves at or below a path."""
    below = lambda name: name.startswith(only) and name[len(only) :][:1] in ("", ".", "[")
    return {name: row for name, row in meta["leaves"].items() if below(name)}


def _read_values(folder: Path, rows: Mapping[str, Row]) -> dict[str, np.ndarray]:
    """The leaves, of which every block is checked and no element is missing."""
    keys = [row["array"] for row in rows.values() if row["blocks"]]
    how = dict.fromkeys(keys, ocp.RestoreArgs(restore_type=np.ndarray))
    arguments = ocp.args.PyTreeRestore(item=dict.fromkeys(keys, 0), restore_args=how, partial_restore=True)
    stored = backend.checkpointer([jax.process_index()]).restore(folder / "arrays", args=arguments) if keys else {}
    values = {}
    for name, row in rows.items():
        dtype, shape = jnp.dtype(row["dtype"]), tuple(row["shape"])
        values[name] = value = np.asarray(stored[row["array"]]) if row["blocks"] else np.zeros(shape, dtype)
        if value.shape != shape or value.dtype != dtype:
            raise OSError(f"{name} is {value.dtype} {value.shape}, and was {dtype} {shape}")
        if sum(math.prod(block["shape"]) for block in row["blocks"]) != value.size:
            raise OSError(f"blocks of {name} are missing")
        for block in row["blocks"]:
            place = tuple(slice(at, at + n) for at, n in zip(block["start"], block["shape"], strict=True))
            if _checksum(value[place]) != block["crc32"]:
                raise OSError(f"checksum of {name} differs")
    return values


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
