"""Save and restore a state pytree, atomically.

A checkpoint is the folder `<directory>/<step, 10 digits>` with `arrays/` (Orbax, one entry per leaf) and `meta.json`
(the caller's `extra` values and, per leaf, shape, dtype and CRC-32). It is written under a temporary name, flushed to
disk and renamed, so a folder with a step's name was complete once; the checksums find what was damaged later.
"""

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

_TEMPORARY = "writing-"
_UNUSABLE = "unusable-"


class CheckpointError(ValueError):
    """A state that cannot be saved, or a checkpoint that does not fit the state it should fill."""


class Restored(NamedTuple):
    """What `restore` found."""

    step: int  # 0 where no usable checkpoint exists
    state: Any  # the target's structure
    extra: dict[str, Any]  # what `save` was given; empty where no usable checkpoint exists
    skipped: tuple[str, ...]  # one line per unusable checkpoint that was set aside


def save(directory: str | Path, step: int, state: Any, extra: Mapping[str, Any], keep: int = 2) -> None:
    """Writes one checkpoint and deletes all but the newest `keep`.

    Args:
      directory: folder of the checkpoints of one run.
      step: number of completed steps, at least 0.
      state: pytree of jax arrays, typed PRNG keys, NumPy arrays and Python numbers.
      extra: JSON values stored beside the state.
      keep: number of checkpoints kept, at least 1.

    Raises:
      CheckpointError: a leaf that cannot be stored (the message names it).
    """
    directory = Path(directory).absolute()
    temporary, final = directory / f"{_TEMPORARY}{step:010d}", directory / f"{step:010d}"
    arrays, leaves = {}, {}
    for name, leaf in _named_leaves(state).items():
        value = _to_numpy(name, leaf)
        leaves[name] = _describe(value, leaf)
        if value.size:  # Orbax refuses empty arrays; their shape and dtype say all there is
            arrays[f"{len(arrays):05d}"] = value
    _remove(temporary)
    temporary.mkdir(parents=True)
    if arrays:
        ocp.PyTreeCheckpointer().save(temporary / "arrays", arrays)
    meta = {"step": step, "extra": dict(extra), "leaves": leaves, "versions": {"jax": jax.__version__}}
    (temporary / "meta.json").write_text(json.dumps(meta, indent=1))
    _flush(temporary)
    _remove(final)
    os.rename(temporary, final)
    _flush_folder(directory)
    for old in _steps(directory)[:-keep]:
        _remove(old)


def restore(directory: str | Path, target: Any) -> Restored:
    """Reads the newest usable checkpoint into the structure of `target`.

    A checkpoint that cannot be read, or whose checksums differ, is renamed to `unusable-<step>` and the one before it
    is tried. Leaves come back with the dtype, weak type and PRNG implementation they were saved with, on the devices
    of `target`'s leaves.

    Args:
      directory: folder of the checkpoints of one run; need not exist.
      target: a state with the structure, shapes and dtypes to expect.

    Returns:
      `Restored`; `target` itself at step 0 if there is no usable checkpoint.

    Raises:
      CheckpointError: a readable checkpoint has other leaves, shapes or dtypes than `target`; names every one.
    """
    directory = Path(directory).absolute()
    if not directory.is_dir():
        return Restored(0, target, {}, ())
    for leftover in directory.glob(f"{_TEMPORARY}*"):
        _remove(leftover)
    skipped = []
    for folder in reversed(_steps(directory)):
        try:
            meta = json.loads((folder / "meta.json").read_text())
            leaves, extra, step = meta["leaves"], meta["extra"], int(meta["step"])
            values = _read_arrays(folder, leaves)
        except Exception as error:  # noqa: BLE001 - Orbax and TensorStore raise many types for damaged files
            aside = directory / f"{_UNUSABLE}{folder.name}"
            _remove(aside)
            os.rename(folder, aside)
            reason = " ".join(str(error).split())[:200]
            skipped.append(f"checkpoint {folder.name} is unusable ({type(error).__name__}: {reason}); kept as {aside}")
            continue
        return Restored(step, _fill(target, leaves, values, folder), extra, tuple(skipped))
    return Restored(0, target, {}, tuple(skipped))


def _named_leaves(state: Any) -> dict[str, Any]:
    """Leaves by their path, such as `.params['dense']['kernel']`, in flattening order."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_numpy(name: str, leaf: Any) -> np.ndarray:
    if _is_key(leaf):
        return np.asarray(jax.random.key_data(leaf))
    if isinstance(leaf, jax.Array):
        return np.asarray(leaf)
    if isinstance(leaf, (np.ndarray, np.generic, bool, int, float)) and np.asarray(leaf).dtype != object:
        return np.asarray(leaf)
    raise CheckpointError(
        f"a state holds arrays, PRNG keys and numbers, but state{name} is a {type(leaf).__name__}: "
        "keep it outside the state, or turn it into an array"
    )


def _describe(value: np.ndarray, leaf: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"shape": list(value.shape), "dtype": value.dtype.name, "crc32": _checksum(value)}
    if _is_key(leaf):
        return row | {"kind": "key", "key": str(jax.random.key_impl(leaf))}
    if isinstance(leaf, jax.Array):
        return row | {"kind": "weak" if leaf.weak_type else "jax"}
    return row | {"kind": "numpy" if isinstance(leaf, (np.ndarray, np.generic)) else "number"}


def _checksum(value: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)


def _read_arrays(folder: Path, leaves: Mapping[str, Any]) -> dict[str, np.ndarray]:
    filled = [name for name, row in leaves.items() if 0 not in row["shape"]]
    arrays = ocp.PyTreeCheckpointer().restore(folder / "arrays") if filled else {}
    if len(arrays) != len(filled):
        raise OSError(f"{len(filled)} arrays expected, {len(arrays)} found")
    stored = dict(zip(filled, (np.asarray(arrays[key]) for key in sorted(arrays)), strict=True))
    values = {}
    for name, row in leaves.items():
        value = stored[name] if name in stored else np.zeros(row["shape"], jnp.dtype(row["dtype"]))
        if [*value.shape] != row["shape"] or value.dtype.name != row["dtype"] or _checksum(value) != row["crc32"]:
            raise OSError(f"checksum of {name} differs")
        values[name] = value
    return values


def _fill(target: Any, leaves: Mapping[str, Any], values: Mapping[str, np.ndarray], folder: Path) -> Any:
    wanted = _named_leaves(target)
    problems = [f"  {name}: in the checkpoint only" for name in leaves if name not in wanted]
    for name, leaf in wanted.items():
        if name not in leaves:
            problems.append(f"  {name}: not in the checkpoint")
            continue
        row, expected = leaves[name], _describe(_to_numpy(name, leaf), leaf)
        for field in ("shape", "dtype", "key"):
            if row.get(field) != expected.get(field) and not (field == "dtype" and _same_number(row, expected)):
                problems.append(f"  {name}: {field} {row.get(field)} in the checkpoint, {expected.get(field)} here")
    if problems:
        raise CheckpointError(
            f"a checkpoint fits only the state it was saved from, but {folder} differs:\n"
            + "\n".join(problems)
            + "\nresume with the code that wrote it, or use another --workdir"
        )
    filled = [_from_numpy(values[name], leaves[name], leaf) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(target), filled)


def _same_number(row: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    """Whether both are of one kind and one has no dtype of its own: a Python number is weakly typed after a jit."""
    loose = {"weak", "number"} & {row["kind"], expected["kind"]}
    return bool(loose) and jnp.dtype(row["dtype"]).kind == jnp.dtype(expected["dtype"]).kind


def _from_numpy(value: np.ndarray, row: Mapping[str, Any], leaf: Any) -> Any:
    """The leaf as it was saved; `leaf`, its counterpart in the target, says on which devices."""
    if row["kind"] == "number":
        return value.item()
    if row["kind"] == "numpy":
        return value if value.ndim else value[()]
    array = jnp.array(value)  # a copy: the state may be donated
    if row["kind"] == "weak":
        array = jnp.broadcast_to(jnp.asarray(value.dtype.type(0).item()), value.shape).at[...].set(array)
    if row["kind"] == "key":
        array = jax.random.wrap_key_data(array, impl=row["key"])
    # A committed copy of an uncommitted leaf would pin later computations to one device.
    return jax.device_put(array, leaf.sharding) if isinstance(leaf, jax.Array) and leaf.committed else array


def _steps(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.name.isdigit() and path.is_dir())


def _remove(path: Path) -> None:
    """Deletes a folder; renamed first, so a crash midway leaves nothing that looks like a checkpoint."""
    if path.exists():
        doomed = path.with_name(f"{_TEMPORARY}removed-{path.name}")
        if doomed.exists():
            shutil.rmtree(doomed)
        os.rename(path, doomed)
        shutil.rmtree(doomed)


def _flush(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            with open(os.path.join(root, name), "rb") as file:
                os.fsync(file.fileno())
        _flush_folder(Path(root))


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
