"""Files that are complete, and on disk, when it is said that they are."""

import contextlib
import errno
import fcntl
import json
import math
import mmap
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

TEMPORARY = "writing-"  # how the name of a folder begins that is not yet, or no longer, a checkpoint
_PIECE = 4 << 20  # bytes that are handed to the system at a time


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array of any values that begins where a page of memory does: `write_array` writes it without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + mmap.PAGESIZE, np.uint8)
    start = -memory.ctypes.data % mmap.PAGESIZE
    return memory[start : start + size].view(dtype).reshape(shape)


def write_array(path: Path, value: np.ndarray) -> None:
    """Creates a file of an array's elements in C order, past the page cache where the file system has a way.

    Through the cache every byte is copied into a page of memory that may have to be got first: time of a processor that a
    training which uses all of them lacks. Past it nothing is copied, if the array is `aligned`.
    """
    content = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    with naming(path), open(path, "xb", buffering=0) as file:
        done = _write_pages(file, content)
        while done < len(content):
            done += file.write(content[done : done + _PIECE].data)


def _write_pages(file: BinaryIO, content: np.ndarray) -> int:
    """Writes whole pages with O_DIRECT, which takes aligned memory only; how many bytes, 0 where there is no such thing."""
    whole, done = len(content) // mmap.PAGESIZE * mmap.PAGESIZE, 0
    if not hasattr(os, "O_DIRECT") or not whole:
        return 0
    buffer, flags = aligned((min(whole, _PIECE),), np.dtype(np.uint8)), fcntl.fcntl(file, fcntl.F_GETFL)
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, flags | os.O_DIRECT)
        while done < whole:
            piece = content[done : min(done + _PIECE, whole)]
            if piece.ctypes.data % mmap.PAGESIZE:
                buffer[: len(piece)] = piece
                piece = buffer[: len(piece)]
            done += file.write(piece.data)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system without it, or an odd size where a limit cut a write short
            raise
    finally:
        fcntl.fcntl(file, fcntl.F_SETFL, flags)
    return done


def write_json(path: Path, content: Any) -> None:
    """Complete as soon as it has its name: another process may be waiting for it."""
    temporary = path.with_suffix(".writing")
    with naming(temporary):
        temporary.write_text(json.dumps(content))
    flush(temporary)
    os.rename(temporary, path)


def remove(path: Path) -> None:
    """Deletes a folder; renamed first, so a crash midway leaves nothing that looks like a checkpoint."""
    if path.exists():
        doomed = path.with_name(f"{TEMPORARY}removed-{path.name}")
        if doomed.exists():
            shutil.rmtree(doomed)
        os.rename(path, doomed)
        shutil.rmtree(doomed)


def flush_all(folder: Path) -> None:
    """`flush` of all that is in a folder, and of the folder."""
    for root, _, names in os.walk(folder):
        for name in names:
            flush(Path(root, name))
        flush(Path(root))


def flush(path: Path) -> None:
    """Returns when a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Errors of writing to a file, unlike those of opening it, do not say which."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def full(error: BaseException) -> str | None:
    """What is full, if that is why something could not be written (TensorStore has no error numbers): how much it holds."""
    if os.strerror(errno.EFBIG) in str(error):
        return f"a file may have at most {resource.getrlimit(resource.RLIMIT_FSIZE)[0]:,} bytes (ulimit -f)"
    if any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT)):
        return "the disk, or a quota, is full"
    return None
