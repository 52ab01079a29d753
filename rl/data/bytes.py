"""Text that every machine has, as bytes: the source of Python's standard library, split by file, and windows of it."""

import gzip
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SEPARATOR = 0  # the byte after every file
_HELD_OUT = 0.05  # expected share of the files
_SKIPPED = {
    *("site-packages", "dist-packages"),
    *("test", "tests", "idle_test"),
    *("encodings", "pydoc_data"),  # tables, and a manual, written by programs
}
_BUILT = ("_sysconfigdata", "config-")  # written when Python was built: not the same on every machine


class Corpus(NamedTuple):
    """A text in two parts that share no file.

    Attributes:
        train, held_out: u8 [bytes] each.
        train_files, held_out_files: paths relative to the root, in the order of the text; a cap may have cut the last one.
        sha256: hex digest of train followed by held_out.
    """

    train: np.ndarray
    held_out: np.ndarray
    train_files: tuple[str, ...]
    held_out_files: tuple[str, ...]
    sha256: str

    @property
    def facts(self) -> dict:
        """What identifies the corpus, as JSON values: the digest, files and bytes of each part."""
        return {
            "sha256": self.sha256,
            "train_files": len(self.train_files),
            "train_bytes": len(self.train),
            "held_out_files": len(self.held_out_files),
            "held_out_bytes": len(self.held_out),
        }


def standard_library(limit: int = 0, root: str | Path | None = None) -> Corpus:
    """The `.py` files of the standard library without its tests, installed packages, and what programs wrote.

    A file is held out if the SHA-256 of its relative path, as a fraction of the largest, is below 0.05; within both parts files
    are in the order of that digest, so the start of the text is as good a sample as any. The corpus depends on the version of
    Python; its digest tells.

    Args:
        limit: most bytes of the training text (0: all); the held-out text is always whole.
        root: the folder searched; None: that of the running Python's standard library.

    Raises:
        ValueError: a negative limit, or a part without files.
    """
    if limit < 0:
        raise ValueError(f"a limit of bytes must be 0 (none) or more; got {limit}")
    root = Path(sysconfig.get_path("stdlib") if root is None else root)
    names = sorted(_names(root), key=_digest)
    parts = [tuple(name for name in names if held_out(name) == held) for held in (False, True)]
    if not all(parts):
        raise ValueError(
            f"both parts of the corpus need files; of {len(names)} .py files below {root} there are {len(parts[0])} to train "
            f"on and {len(parts[1])} held out: use a Python that comes with the source of its library"
        )
    (train, train_files), (rest, rest_files) = (
        _text(root, part, cap) for part, cap in zip(parts, (limit, 0), strict=True)
    )
    sha256 = hashlib.sha256(train + rest).hexdigest()
    return Corpus(np.frombuffer(train, np.uint8), np.frombuffer(rest, np.uint8), train_files, rest_files, sha256)


def corpus(limit: int = 0, train_file: str = "", held_out_file: str = "") -> Corpus:
    """`standard_library`, or two files of one's own.

    A file is read as bytes; `.npy` holds u8 [bytes]; of `.jsonl` each line's "text" is one document, after which a separator
    comes.

    Args:
        limit: most bytes of the training text (0: all).
        train_file, held_out_file: paths; both or none.

    Raises:
        ValueError: one of the files without the other, a file that is missing, empty, or not bytes.
    """
    if not (train_file or held_out_file):
        return standard_library(limit)
    if not (train_file and held_out_file):
        raise ValueError(
            "a corpus needs a file to train on and one that is held out; got "
            f"{train_file or 'none'} and {held_out_file or 'none'}"
        )
    if limit < 0:
        raise ValueError(f"a limit of bytes must be 0 (none) or more; got {limit}")
    train, rest = _file(train_file)[: limit or None], _file(held_out_file)
    sha256 = hashlib.sha256(train.tobytes() + rest.tobytes()).hexdigest()
    return Corpus(train, rest, (train_file,), (held_out_file,), sha256)


def reference_bits(train: np.ndarray, streams: np.ndarray) -> dict[str, float]:
    """Bits per byte that simple models of the training text need for held-out streams: lines to compare a learner with.

    `unigram`: the frequency of each byte; `bigram`: after each byte, mixed with the unigram's by Witten and Bell's rule; both
    from counts with one added. `gzip`: the streams one after the other, compressed at level 9, which learns from them.

    Args:
        train: u8 [bytes].
        streams: u8 [S, bytes], of which all but the first of each are predicted.
    """
    before, after = streams[:, :-1].reshape(-1), streams[:, 1:].reshape(-1)
    unigram = (np.bincount(train, minlength=256) + 1) / (len(train) + 256)
    pairs = np.bincount(256 * train[:-1].astype(np.int64) + train[1:], minlength=1 << 16).reshape(256, 256)
    total, kinds = pairs.sum(1, keepdims=True), (pairs > 0).sum(1, keepdims=True)
    bigram = (pairs + np.maximum(kinds, 1) * unigram) / (total + np.maximum(kinds, 1))
    packed = len(gzip.compress(streams.tobytes(), 9))
    return {
        "unigram": float(-np.log2(unigram[after]).mean()),
        "bigram": float(-np.log2(bigram[before, after]).mean()),
        "gzip": 8 * packed / streams.size,
    }


def held_out(name: str) -> bool:
    """Whether the file of this relative path is held out."""
    return int(_digest(name), 16) < _HELD_OUT * 16**64


def windows(text: jax.Array, seed: int, step: jax.Array, size: int, length: int) -> jax.Array:
    """`size` windows at random places of a text; a pure function of (seed, step).

    Args:
        text: [bytes], at least `length`.
        step: integer, may be traced.

    Returns:
        [size, length].
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), step)
    first = jax.random.randint(key, (size, 1), 0, len(text) - length + 1)
    return text[first + jnp.arange(length)]


def spread(text: np.ndarray, count: int, length: int) -> np.ndarray:
    """[count, length]: windows without overlap, spread evenly over the whole text.

    Raises:
        ValueError: the text is shorter than that.
    """
    most = len(text) // length
    if most < count:
        raise ValueError(
            f"{count} windows of {length} bytes without overlap need {count * length} bytes; got {len(text)}"
        )
    return text[: most * length].reshape(most, length)[np.arange(count) * most // count]


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _names(root: Path) -> Iterator[str]:
    """Relative paths of the files wanted, in no order."""
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED and not name.startswith(_BUILT)]
        for name in files:
            if name.endswith(".py") and not name.startswith(_BUILT):
                yield (Path(folder) / name).relative_to(root).as_posix()


def _file(path: str) -> np.ndarray:
    try:
        if path.endswith(".npy"):
            data = np.load(path)
        elif path.endswith(".jsonl"):
            with open(path, encoding="utf-8") as lines:
                text = b"".join(json.loads(line)["text"].encode() + bytes([SEPARATOR]) for line in lines)
            data = np.frombuffer(text, np.uint8)
        else:
            data = np.fromfile(path, np.uint8)
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a corpus ({type(error).__name__}: {error})") from error
    if data.dtype != np.uint8 or data.ndim != 1 or not len(data):
        raise ValueError(f"a corpus is u8 [bytes], at least one; {path} is {data.dtype}{list(data.shape)}")
    return data


def _text(root: Path, names: tuple[str, ...], limit: int) -> tuple[bytes, tuple[str, ...]]:
    """The files one after the other, cut after `limit` bytes if that is not 0; and which files those bytes are of."""
    text = bytearray()
    for count, name in enumerate(names, 1):
        text += (root / name).read_bytes() + bytes([SEPARATOR])
        if limit and len(text) >= limit:
            return bytes(text[:limit]), names[:count]
    return bytes(text), names
