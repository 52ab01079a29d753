"""What the recipes `pretrain_bytes_*.py` share: the next byte of Python source, one model, the same windows and schedule.

Data: the source of the running Python's standard library, split by file (`rl.data.bytes`); another version of Python is another
text, which `result.json` identifies by its SHA-256. Model: a Llama-like transformer of 857,216 parameters that reads bytes. The
result is the held-out bits per byte over 256 windows that share no byte with each other: lower is better, 8 knows nothing.

* `train_bytes`: cap of the training text (0: all of it);
* `window`: bytes that are predicted in a row of a batch, and in an evaluated one; `eval_windows` of these;
* `model`: fields of `rl.models.transformer.TransformerConfig`;
* `optimizer`: as in `configs/base.py`; nothing else differs between the recipes.
"""

from typing import Any

import ml_collections

from configs.base import optimizer


def pretrain_bytes(name: str, learning_rate: float, **options: Any) -> ml_collections.ConfigDict:
    """A recipe by backprop with the optimizer of this name."""
    return ml_collections.ConfigDict(
        {
            "task": "bytes",
            "method": "backprop",
            "seed": 0,
            "steps": 400,
            "batch": 8,
            "train_bytes": 0,
            "window": 128,
            "eval_windows": 256,
            "model": {
                "layers": 4,
                "width": 128,
                "hidden": 344,
                "heads": 4,
                "kv_heads": 4,
                "head_dim": 32,
                "scan_layers": False,
            },
            "optimizer": optimizer(
                name=name, learning_rate=learning_rate, schedule="warmup_cosine", warmup=0.1, options=options
            ),
            "save_every": 100,
            "eval_every": 50,
        }
    )
