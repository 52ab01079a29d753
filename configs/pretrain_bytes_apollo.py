"""Bytes of Python source with APOLLO (arXiv 2412.05270): scales of channels from a random projection of rank 32.

    python -m experiments.pretrain --config=configs/pretrain_bytes_apollo.py --workdir=runs/bytes_apollo

`configs/pretrain_bytes.py` says what all these recipes share.
"""

import ml_collections

from configs.base import pick
from configs.pretrain_bytes import pretrain_bytes


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The recipe."""
    return pick(variant, {"apollo": lambda: pretrain_bytes("apollo", 2.4e-2, rank=32, every=50)})
