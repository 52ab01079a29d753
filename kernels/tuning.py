"""Block sizes as data: `kernels/<op>/tuned.json` has one entry per device and class of shapes, written by `experiments.tune`.

    {"tpu": [{"device": "TPU v5e", "shape": {"n": 8192, "k": 8192}, "blocks": {"m": 512, ...}, "seconds": ...}]}

The entry of this device whose sizes are nearest, in octaves, is used; without one, the default that the kernel states.
"""

import contextlib
import functools
import json
import math
import pathlib
from collections.abc import Iterator

import jax

_FOLDER = pathlib.Path(__file__).parent
_asked: list[tuple[str, str, dict[str, int], dict[str, int]]] = []
_forced: dict[str, int] = {}


@functools.cache
def _entries(op: str, platform: str) -> tuple[dict, ...]:
    path = _FOLDER / op / "tuned.json"
    return tuple(json.loads(path.read_text()).get(platform, ())) if path.exists() else ()


def blocks(op: str, platform: str, default: dict[str, int], **shape: int) -> dict[str, int]:
    """Block sizes of an operation for a shape.

    Args:
        op: its folder.
        platform: "tpu" or "gpu".
        default: where nothing was tuned; also says which sizes there are.
        shape: the sizes that decide.
    """
    _asked.append((op, platform, default, shape))
    if _forced:
        return default | _forced
    device = jax.devices()[0].device_kind
    known = [
        entry for entry in _entries(op, platform) if entry["device"] == device and entry["shape"].keys() == shape.keys()
    ]
    octaves = lambda entry: sum(
        abs(math.log2(max(entry["shape"][name], 1) / max(size, 1))) for name, size in shape.items()
    )
    return default | min(known, key=octaves)["blocks"] if known else default


def up(size: int, multiple: int) -> int:
    """The next multiple."""
    return -(-size // multiple) * multiple


@contextlib.contextmanager
def trying(sizes: dict[str, int]) -> Iterator[list[tuple[str, str, dict[str, int], dict[str, int]]]]:
    """These block sizes for whatever is traced inside; yields what is asked for: (op, platform, default, shape)."""
    _asked.clear()
    _forced.update(sizes)
    try:
        yield _asked
    finally:
        _forced.clear()
