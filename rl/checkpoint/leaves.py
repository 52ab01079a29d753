"""The leaves of a state: what they are called, how they are described, copied, and made again from stored values.

A *row* describes a leaf: `shape` and `dtype` of its values (of a PRNG key: of its data), `kind` (jax, weak, key, numpy or
number) and, of a key, `key`, its implementation.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eggroll import sharding
from rl.checkpoint import disk

Row = dict[str, Any]


class CheckpointError(ValueError):
    """A state that cannot be saved, or a checkpoint that does not fit the state it should fill."""


class NoRoomError(CheckpointError, OSError):
    """A checkpoint that could not be written because something is full; those before it stand."""


class Snapshot(NamedTuple):
    """A state at one moment; both dictionaries have its leaves by name, in flattening order."""

    rows: dict[str, Row]
    values: dict[str, jax.Array | np.ndarray]


def named(state: Any) -> dict[str, Any]:
    """Leaves by their path, such as `.params['dense']['kernel']`, in flattening order."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}


def view(state: Any) -> Snapshot:
    """The state's own arrays: valid until they are donated or written to.

    Raises:
      CheckpointError: a leaf that cannot be stored (the message names it).
    """
    leaves = named(state)
    rows = {name: describe(name, leaf) for name, leaf in leaves.items()}
    data = {name: jax.random.key_data(leaf) if _is_key(leaf) else leaf for name, leaf in leaves.items()}
    return Snapshot(rows, {name: x if isinstance(x, jax.Array) else _host(x) for name, x in data.items()})


def copy(snapshot: Snapshot, spare: Snapshot | None = None) -> Snapshot:
    """The same values in arrays of their own, so that the state may be donated or overwritten right away.

    Arrays of an accelerator are copied into pinned host memory. That copy is only *enqueued*: it runs behind the step that made
    the values and beside the next one, and the runtime lets nobody overwrite a donated buffer that a pending copy still reads.
    The card of this design: DataStates-LLM, arXiv 2406.10707. On a CPU, and where a platform has no such memory, NumPy copies
    at once, when the step is done; quickly into memory that is there already, many times more slowly into new memory.

    Args:
      snapshot: of the state.
      spare: an earlier copy that nobody needs; its arrays of the same name, shape and dtype are overwritten.
    """
    arrays = {name: x for name, x in snapshot.values.items() if isinstance(x, jax.Array)}
    later = {name: x for name, x in arrays.items() if _enqueues(x)}
    shardings = [x.sharding.with_memory_kind("pinned_host") for x in later.values()]
    # Never an alias, even of an array that lives there.
    copies = jax.device_put(list(later.values()), shardings, may_alias=False)
    copied = dict(zip(later, copies, strict=True))
    old = spare.values if spare else {}
    return snapshot._replace(
        values={
            name: copied[name] if name in copied else _copied(x, old.get(name)) for name, x in snapshot.values.items()
        }
    )


def _copied(value: jax.Array | np.ndarray, old: jax.Array | np.ndarray | None) -> np.ndarray:
    """A copy, in `old` if that fits."""
    if not isinstance(old, np.ndarray) or (old.shape, old.dtype) != (value.shape, value.dtype):
        old = disk.aligned(value.shape, value.dtype)
    if isinstance(value, np.ndarray):
        old[...] = value
    else:
        for shard in value.addressable_shards:  # the array itself would keep what NumPy is shown of it
            if shard.replica_id == 0:
                old[shard.index] = shard.data
    return old


def describe(name: str, leaf: Any) -> Row:
    """The row of a leaf, which may also be a `jax.ShapeDtypeStruct`."""
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        if _is_key(leaf):
            data = jax.eval_shape(jax.random.key_data, leaf)
            return _row(data, "key") | {"key": _implementation(leaf)}
        return _row(leaf, "weak" if leaf.weak_type else "jax")
    if isinstance(leaf, np.ndarray | np.generic | bool | int | float) and np.asarray(leaf).dtype != object:
        return _row(np.asarray(leaf), "numpy" if isinstance(leaf, np.ndarray | np.generic) else "number")
    raise CheckpointError(
        f"a state holds arrays, PRNG keys and numbers, but state{name} is a {type(leaf).__name__}: "
        "keep it outside the state, or turn it into an array"
    )


def fill(
    target: Any, rows: Mapping[str, Row], values: Mapping[str, np.ndarray], *, within: str, cast: bool, source: str
) -> Any:
    """The target's structure with stored values; see `restore`.

    Raises:
      CheckpointError: other leaves, shapes or dtypes than the target's; names every one.
    """
    wanted = {within + name: leaf for name, leaf in named(target).items()}
    expected = {name: describe(name, leaf) for name, leaf in wanted.items()}
    problems = [f"  {name}: in the checkpoint only" for name in rows if name not in wanted]
    for name, row in expected.items():
        problems += _differences(name, rows.get(name), row, cast)
    if problems:
        raise CheckpointError(
            f"a checkpoint fits only the state it was saved from, but {source} differs:\n"
            + "\n".join(problems)
            + "\nresume with the code that wrote it, or use another --workdir"
        )
    made = [_make(values[name], rows[name], expected[name], leaf, cast) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(target), made)


def _row(array: Any, kind: str) -> Row:
    return {"shape": list(array.shape), "dtype": array.dtype.name, "kind": kind}


def _host(value: Any) -> np.ndarray:
    """As an array of the byte order that files have."""
    array = np.asarray(value)
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _implementation(key: jax.Array | jax.ShapeDtypeStruct) -> str:
    found = []
    jax.eval_shape(lambda k: found.append(str(jax.random.key_impl(k))), key)  # an abstract key tells only a trace
    return found[0]


def _enqueues(array: jax.Array) -> bool:
    """Whether the array is copied asynchronously: to the host from elsewhere, or as other processes have parts of it."""
    device = min(array.sharding.addressable_devices, key=lambda device: device.id)
    return _has_pinned_memory(device) and not (device.platform == "cpu" and array.is_fully_addressable)


@functools.cache
def _has_pinned_memory(device: jax.Device) -> bool:
    return any(memory.kind == "pinned_host" for memory in device.addressable_memories())


def _differences(name: str, row: Row | None, expected: Row, cast: bool) -> list[str]:
    if row is None:
        return [f"  {name}: not in the checkpoint"]
    differ = [field for field in ("shape", "dtype", "key") if row.get(field) != expected.get(field)]
    if "dtype" in differ and (_same_number(row, expected) or (cast and _both_floating(row, expected))):
        differ.remove("dtype")
    return [f"  {name}: {field} {row.get(field)} in the checkpoint, {expected.get(field)} here" for field in differ]


def _same_number(row: Row, expected: Row) -> bool:
    """Whether both are of one kind and one has no dtype of its own: a Python number is weakly typed after a jit."""
    loose = {"weak", "number"} & {row["kind"], expected["kind"]}
    return bool(loose) and jnp.dtype(row["dtype"]).kind == jnp.dtype(expected["dtype"]).kind


def _both_floating(*rows: Row) -> bool:
    return all(jnp.issubdtype(jnp.dtype(row["dtype"]), jnp.floating) for row in rows)


def _make(value: np.ndarray, row: Row, expected: Row, leaf: Any, cast: bool) -> Any:
    """The leaf as it was saved; `leaf`, its counterpart in the target, says on which devices and, if cast, in what dtype."""
    if row["kind"] == "number":
        return value.item()
    if cast and value.dtype.name != expected["dtype"] and _both_floating(row, expected):
        value = value.astype(jnp.dtype(expected["dtype"]))
    if row["kind"] == "numpy":
        return value if value.ndim else value[()]
    # A committed copy of an uncommitted leaf would pin later computations to one device.
    committed = (
        leaf.committed if isinstance(leaf, jax.Array) else isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding
    )
    if committed and row["kind"] == "jax":  # shard by shard: the whole need not fit on one device, or in one process
        return jax.make_array_from_callback(value.shape, leaf.sharding, lambda index: value[index].copy())
    array = jnp.array(value)  # a copy: the state may be donated
    if row["kind"] == "weak":
        array = jnp.broadcast_to(jnp.asarray(value.dtype.type(0).item()), value.shape).at[...].set(array)
    if row["kind"] == "key":
        array = jax.random.wrap_key_data(array, impl=row["key"])
    return sharding.put(array, leaf.sharding) if committed else array
