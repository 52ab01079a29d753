"""What the recipes `pretrain_bytes_*.py` share: the next byte of Python source, one model, the same windows and schedule.

Data: the source of the running Python's standard library, split by file (`rl.data.bytes`); another version of Python is another
text, which `result.json` identifies by its SHA-256. Model: a Llama-like transformer of 857,216 parameters that reads bytes. The
result is the held-out bits per byte over 256 windows that share no byte with each other: lower is better, 8 knows nothing.

Best learning rate of each method on seed 0 (next to it others tried on both sides, with their bits), held-out bits per byte at
the end for seeds 0, 1 and 2, bytes of optimizer state; 70 to 80 s of training on one CPU core:

    adamw         3e-3     (2e-3 2.693, 4e-3 2.672)      2.656 2.617 2.654   6,857,736
    frugal 0.25   2e-3     (1e-3 2.760, 3e-3 2.694)      2.657 2.641 2.684   2,114,576
    frugal 0      2e-3     (1e-3 2.835, 3e-3 2.748)      2.704 2.705 2.747     533,520
    galore        2.4e-2   (1.2e-2 2.770, 4.8e-2 2.780)  2.666 2.668 2.719   2,573,328
    fira          2.4e-2   (1.2e-2 2.648, 4.8e-2 2.767)  2.624 2.544 2.632   2,573,440
    apollo        2.4e-2   (1.2e-2 2.622, 4.8e-2 2.591)  2.572 2.486 2.502   2,114,688
    badam         3e-3     (1.5e-3 3.164, 6e-3 3.049)    3.038 3.030 2.997   2,108,432

FRUGAL is closest to AdamW, as published, with 31 % of its state, and without any state in the matrices it loses 0.05 to 0.1
bits; APOLLO and Fira are better than AdamW in these 400 steps, BAdam, which moves one layer at a time, far behind. One learning
rate serves all parameters, so the methods that like a large one also move embeddings faster.

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
