"""Grade school math (gsm8k) by evolution of a pretrained model, after section 6.3 of arXiv 2511.16652.

    python -m experiments.train --config=configs/gsm8k_eggroll.py --workdir=runs/gsm8k \\
        --config.model.path=Qwen/Qwen3-0.6B --config.task.options.path=DIRECTORY

DIRECTORY holds train.jsonl and test.jsonl of openai/grade-school-math. The settings follow the published ones for a
7-billion-parameter RWKV-7 on 8 GPUs: rank 1, sigma 2e-3, greedy answers of up to 1,000 tokens, 512 members on 16 prompts a
step, norms and embedding frozen. The learning rate is ours (the published one belongs to plain gradient steps in another
scale). Never run: it needs an accelerator and a model from the hub.
"""

import ml_collections

from configs.base import pick
from configs.language import language


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The recipe."""
    return pick(variant, {"eggroll": _eggroll})


def _eggroll() -> ml_collections.ConfigDict:
    config = language(
        "gsm8k",
        task_options={"path": "../shared/data/gsm8k", "source": "jsonl", "template": "Question: {question}\nAnswer:"},
        budget=1000,
        steps=260,
        es_changes={"members": 512, "sigma": 2e-3, "frozen": ("norm", "embed")},
        learning_rate=1e-4,
    )
    config.model.update({"path": "Qwen/Qwen3-0.6B", "dtype": "bfloat16", "scan_layers": True})
    config.task.problems = 7473
    config.update({"prompts": 16, "eval_problems": 1319})
    config.engine.update({"slots": 256, "chunk": 32, "bucket": 64, "view": 512, "tail": 16})
    return config
