"""Bytes of Python source with Fira (arXiv 2410.01623): GaLore of rank 32, and the rest of the gradient rescaled.

    python -m experiments.pretrain --config=configs/pretrain_bytes_fira.py --workdir=runs/bytes_fira

`configs/pretrain_bytes.py` says what all these recipes share.
"""

import ml_collections

from configs.base import pick
from configs.pretrain_bytes import pretrain_bytes


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The recipe."""
    return pick(variant, {"fira": lambda: pretrain_bytes("fira", 2.4e-2, rank=32, every=50)})
