"""Bytes of Python source with FRUGAL (arXiv 2411.07837): AdamW on a changing part of the matrices, signs on the rest.

    python -m experiments.pretrain --config=configs/pretrain_bytes_frugal.py --workdir=runs/bytes_frugal
    python -m experiments.pretrain --config=configs/pretrain_bytes_frugal.py:zero --workdir=runs/bytes_frugal_zero

`configs/pretrain_bytes.py` says what all these recipes share.
"""

import ml_collections

from configs.base import pick
from configs.pretrain_bytes import pretrain_bytes


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The recipe: density 0.25 (default), or `zero`, signs on all of the matrices."""
    return pick(variant, {"frugal": lambda: _frugal(0.25), "zero": lambda: _frugal(0.0)})


def _frugal(density: float) -> ml_collections.ConfigDict:
    return pretrain_bytes("frugal", 2e-3, density=density, every=50)
