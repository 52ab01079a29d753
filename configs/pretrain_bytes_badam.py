"""Bytes of Python source with BAdam (arXiv 2404.02827): one layer after the other.

    python -m experiments.pretrain --config=configs/pretrain_bytes_badam.py --workdir=runs/bytes_badam

`configs/pretrain_bytes.py` says what all these recipes share.
"""

import ml_collections

from configs.base import pick
from configs.pretrain_bytes import pretrain_bytes


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The recipe."""
    return pick(variant, {"badam": lambda: pretrain_bytes("badam", 3e-3, every=50)})
