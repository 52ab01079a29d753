"""What the recipes for language models share; each key with its default.

* `task`: `name` and `options` of `rl.tasks`; `problems` to train on (drawn once, seen in another order every epoch),
  `eval_problems` held out, the same for every seed;
* `model`: `preset` of `rl.models.presets`, trained from scratch with the task's alphabet; or `path`, a checkpoint directory or
  a name on the hub; `dtype`, `scan_layers`;
* `warm_start`: supervised training on `examples` solved problems for `steps` of `batch`, cached in the workdir (0 steps: none);
* `prompts` per step, which every member answers `samples` times in at most `budget` tokens;
* `sampling`: see `rl.rollout.sampling.Sampling`; temperature 0 is greedy. Evaluation is greedy;
* `common_random_numbers`: members share the randomness of each (prompt, sample);
* `score`: what the result is, the share of held-out problems "solved" (reward 1) or their mean "reward";
* `fitness`: "mean" reward, or "pass_at" `k` of the samples;
* `engine`: `slots`, `chunk`, `bucket`, `view`, `tail` of `rl.rollout.engine.Settings`;
* `reward`: `workers` and seconds until the `deadline` of one verdict;
* `log_samples`: completions written to `samples.jsonl` every step;
* `es`, `optimizer`: as in `configs/base.py`.
"""

from typing import Any

import ml_collections

from configs.base import es, optimizer


def language(
    task: str,
    *,
    budget: int,
    steps: int,
    task_options: dict[str, Any],
    es_changes: dict[str, Any],
    learning_rate: float,
) -> ml_collections.ConfigDict:
    """A recipe by evolution; the caller changes what else it wants and locks it."""
    return ml_collections.ConfigDict(
        {
            "method": "eggroll",
            "seed": 0,
            "steps": steps,
            "save_every": 20,
            "eval_every": 20,
            "eval_problems": 512,
            "log_samples": 8,
            "task": {"name": task, "options": task_options, "problems": 4096},
            "model": {"preset": "tiny-transformer", "path": "", "dtype": "float32", "scan_layers": False},
            "warm_start": {"examples": 512, "steps": 0, "batch": 64, "learning_rate": 3e-3},
            "prompts": 64,
            "samples": 1,
            "budget": budget,
            "sampling": {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
            "common_random_numbers": True,
            "score": "solved",
            "fitness": "mean",
            "k": 1,
            "engine": {"slots": 1024, "chunk": 8, "bucket": 16, "view": 128, "tail": 0},
            "reward": {"workers": 1, "deadline": 5.0},
            "es": es(**es_changes),
            "optimizer": optimizer(learning_rate=learning_rate),
        }
    )
