"""Bytes of Python source with GaLore (arXiv 2403.03507): moments in a subspace of rank 32, a quarter of the width.

    python -m experiments.pretrain --config=configs/pretrain_bytes_galore.py --workdir=runs/bytes_galore

`configs/pretrain_bytes.py` says what all these recipes share.
"""

import ml_collections

from configs.base import pick
from configs.pretrain_bytes import pretrain_bytes


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The recipe."""
    return pick(variant, {"galore": lambda: pretrain_bytes("galore", 2.4e-2, rank=32, every=50)})
