"""Bytes of Python source with AdamW.

    python -m experiments.pretrain --config=configs/pretrain_bytes_adamw.py --workdir=runs/bytes_adamw

`configs/pretrain_bytes.py` says what all these recipes share.
"""

import ml_collections

from configs.base import pick
from configs.pretrain_bytes import pretrain_bytes


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The recipe."""
    return pick(variant, {"adamw": lambda: pretrain_bytes("adamw", 3e-3)})
