"""Block sizes as data: `kernels/<op>/tuned.json` has one entry per device and class of shapes, written by `experiments.tune`.

    {"tpu": [{"device": "TPU v5e", "kind": "bfloat16", "shape": {"n": 8192}, "blocks": {"m": 512}, "seconds": 0.001}]}

The entry of this device and kind whose sizes are nearest, in octaves, is used; without one near, the default of the kernel.
"""

import contextlib
import functools
import json
import math
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import jax

_FOLDER = pathlib.Path(__file__).parent
FAR = 2  # octaves between a size and that of an entry, beyond which the entry says nothing


class _Trial(NamedTuple):
    sizes: dict[str, int]
    asked: list[tuple]


_trying: list[_Trial] = []


@functools.cache
def _entries(op: str, platform: str) -> tuple[dict, ...]:
    path = _FOLDER / op / "tuned.json"
    return tuple(json.loads(path.read_text()).get(platform, ())) if path.exists() else ()


def blocks(op: str, platform: str, default: dict[str, int], kind: str, **shape: int) -> dict[str, int]:
    """Block sizes of an operation for a shape.

    Args:
        op: its folder.
        platform: "tpu" or "gpu".
        default: where nothing was tuned; also says which sizes there are.
        kind: what an entry must have in common besides the device: types, where factors come from.
        shape: the sizes that decide.
    """
    if _trying:
        _trying[-1].asked.append((op, platform, default, kind, shape))
        return default | _trying[-1].sizes
    device = jax.devices()[0].device_kind
    apart = lambda entry: [abs(math.log2(max(entry["shape"][n], 1) / max(size, 1))) for n, size in shape.items()]
    same = lambda entry: (entry["device"], entry["kind"], entry["shape"].keys()) == (device, kind, shape.keys())
    near = [entry for entry in _entries(op, platform) if same(entry) and max(apart(entry)) <= FAR]
    return default | min(near, key=lambda entry: sum(apart(entry)))["blocks"] if near else default


def up(size: int, multiple: int) -> int:
    """The next multiple."""
    return -(-size // multiple) * multiple


@contextlib.contextmanager
def trying(sizes: dict[str, int]) -> Iterator[list[tuple]]:
    """These block sizes for whatever is traced inside; yields what is asked for: (op, platform, default, kind, shape)."""
    _trying.append(_Trial(sizes, []))
    try:
        yield _trying[-1].asked
    finally:
        _trying.pop()
