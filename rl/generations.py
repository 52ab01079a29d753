"""The log that rebuilds an evolution run: what every generation's update was given.

theta_k = update(theta_{k-1}, f_k), where f_k holds N shaped fitness numbers and the noise follows from seed and generation.
So theta_0 and the log rebuild every theta_k without playing or answering anything: 4 bytes per member and generation, where
a checkpoint holds every weight. Bits are the same where program, mesh, versions and hardware are.

A record, all numbers little-endian u32:  "GEN1" | generation | n, bytes of the arrays | n bytes | CRC-32 of all before it
"""

import dataclasses
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import eggroll

NAME = "generations.bin"
_MARK, _HEAD, _CRC = b"GEN1", struct.Struct("<4sII"), struct.Struct("<I")


class LogError(ValueError):
    """A log that does not hold, whole and in order, the generations asked of it."""


def cut(
    es: eggroll.Strategy,
) -> tuple[Callable[[Any], tuple[jax.Array, dict]], Callable[..., tuple[eggroll.State, dict]]]:
    """`es.update` in two, so that a replay can run the very program that the run itself ran.

    Returns:
        (shape, update): scores -> (f32 [N] shaped fitness, metrics), and (state, shaped fitness) -> (state, metrics).
    """
    given = lambda fitness, population: (fitness, {})
    return lambda scores: es.shaping(scores, es.population), dataclasses.replace(es, shaping=given).update


def pack(generation: int, arrays: Any) -> bytes:
    """The record of a generation, counted from 1, from a pytree of arrays."""
    payload = b"".join(_little(np.asarray(x)).tobytes() for x in jax.tree.leaves(arrays))
    record = _HEAD.pack(_MARK, generation, len(payload)) + payload
    return record + _CRC.pack(zlib.crc32(record))


def record_bytes(like: Any) -> int:
    """Size of a record of such arrays."""
    return _HEAD.size + sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(like)) + _CRC.size


def read(path: str | Path, like: Any) -> Iterator[Any]:
    """The arrays of generations 1, 2, ... of a log, checked one by one as they are asked for.

    Args:
        path: the log; a record that a killed run left unfinished at its end is passed over.
        like: pytree of arrays (or shapes) as they were packed.

    Raises:
        LogError: no log, or a record that is damaged, missing, or of another shape; names the generation.
    """
    size = record_bytes(like)
    try:
        file = open(path, "rb")
    except OSError as error:
        raise LogError(
            f"a replay needs the log of the run's generations, but {path} cannot be read ({error.strerror}): only runs of "
            "evolution write one, from their first step on"
        ) from error
    with file:
        expected = 1
        while len(record := file.read(size)) == size:
            mark, generation, payload = _HEAD.unpack_from(record)
            where = f"{path}, record {expected}, byte {(expected - 1) * size}"
            if mark == _MARK and payload != size - _HEAD.size - _CRC.size:
                raise LogError(
                    f"{where}: it holds {payload} bytes of arrays and a generation of this config has "
                    f"{size - _HEAD.size - _CRC.size}: the log belongs to another config, or is damaged"
                )
            if zlib.crc32(record[: -_CRC.size]) != _CRC.unpack(record[-_CRC.size :])[0]:
                raise LogError(
                    f"{where}: its CRC-32 differs, so it is damaged and nothing from generation {expected} on can be rebuilt: "
                    "put the file back, or rebuild an earlier step"
                )
            if generation != expected:
                raise LogError(
                    f"{where}: generation {generation} stands where {expected} should: the log has a gap, and no later step "
                    "can be rebuilt. A run that was started by a version without this log has one"
                )
            yield _unpack(record[_HEAD.size : -_CRC.size], like)
            expected += 1


def count(path: str | Path, like: Any) -> int:
    """Whole records in a log, unchecked; 0 where there is none."""
    path = Path(path)
    return path.stat().st_size // record_bytes(like) if path.is_file() else 0


def _unpack(payload: bytes, like: Any) -> Any:
    leaves, tree = jax.tree.flatten(like)
    arrays, start = [], 0
    for leaf in leaves:
        dtype = np.dtype(leaf.dtype).newbyteorder("<")
        arrays.append(np.frombuffer(payload, dtype, leaf.size, start).reshape(leaf.shape).astype(leaf.dtype))
        start += leaf.size * leaf.dtype.itemsize
    return jax.tree.unflatten(tree, arrays)


def _little(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
