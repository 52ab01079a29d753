"""What the recipes for language models share; each key with its default.

* `task`: `name` and `options` of `rl.tasks`; `problems` to train on (drawn once, seen in another order every epoch),
  `eval_problems` held out, the same for every seed;
* `model`: `preset` of `rl.models.presets`, trained from scratch with the task's alphabet; or `path`, a checkpoint directory or
  a name on the hub; `dtype`, `scan_layers`;
* `warm_start`: supervised training on `examples` solved problems for `steps` of `batch`, cached in the workdir (0 steps: none);
* `prompts` per step, answered `samples` times (by every member of a population) in at most `budget` tokens;
* `selection`, `replay`: a method of `rl.data.selection` and of `rl.data.replay` with its own keys;
* `refills`: further rounds in which prompts whose answers all have one reward are replaced by others (0: none; DAPO);
* `sampling`: see `rl.rollout.sampling.Sampling`; temperature 0 is greedy. Evaluation is greedy;
* `score`: what the result is, the share of held-out problems "solved" (reward 1) or their mean "reward";
* `engine`: `slots`, `chunk`, `bucket`, `view`, `tail` of `rl.rollout.engine.Settings`;
* `reward`: `workers` and seconds until the `deadline` of one verdict;
* `log_samples`: completions written to `samples.jsonl` every step;
* `optimizer`, `mesh`: as in `configs/base.py`.

Evolution:

* `es`: as in `configs/base.py`;
* `common_random_numbers`: members share the randomness of each (prompt, sample);
* `fitness`: "mean" reward, or "pass_at" `k` of the samples.

Policy gradients:

* `gradient`: `objective`, every setting of `rl.objectives.policy_gradient.Objective` (a `weight` only where the preset has
  one); `advantage` and the preset's options of it; most `tokens` of a packed micro-batch; `remat`, activations made again
  instead of kept (on a CPU only with `scan_layers`); `max_grad_norm` (0: no clipping); `lora` (rank 0: all parameters learn);
  all else as `rl.learners.settings.Settings`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_collections
from ml_collections.config_dict import placeholder

from configs.base import es, mesh, optimizer
from rl import slots
from rl.objectives.presets import PRESETS

# None: not used
_OPEN = {
    "low": float,
    "high": float,
    "dual": float,
    "longest": int,
    "cap": float,
    "floor": float,
    "longest_failure": float,
}


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
    config = _base("eggroll", task, task_options, budget, steps, learning_rate)
    config.es = es(**es_changes)
    config.update({"common_random_numbers": True, "fitness": "mean", "k": 1})
    return config


def policy_gradient(
    task: str,
    method: str,
    *,
    budget: int,
    steps: int,
    task_options: dict[str, Any],
    samples: int,
    learning_rate: float,
) -> ml_collections.ConfigDict:
    """A recipe by backprop, a method of `rl.objectives.presets`; the caller changes what else it wants and locks it."""
    config = _base(method, task, task_options, budget, steps, learning_rate)
    config.samples = samples
    config.sampling.temperature = 1.0
    preset = PRESETS[method]
    config.gradient = {
        "objective": _settings(preset.objective),
        "advantage": preset.advantage,
        "advantage_options": _typed(preset.options),
        "minibatches": 1,
        "epochs": 1,
        "proximal": "recompute",
        "staleness": 0,
        "overlong": 0,
        "drop_truncated": False,
        "informative_only": False,
        "step_scale": 0.0,
        "norms": "exact",
        "kl_in_reward": 0.0,
        "kl_convex": False,
        "reincarnation": 0,
        "routing": "none",
        "lora": {"rank": 0, "alpha": 16.0, "pattern": "layer.*/kernel"},
        "limit": 3,
        "tokens": 1024,
        "remat": False,
        "max_grad_norm": 1.0,
    }
    if preset.objective.aggregation == "constant":
        config.gradient.objective.longest = budget
    return config


def _settings(settings: Any) -> dict[str, Any]:
    """A dataclass as a config block; what is None keeps its type, so that it can be set."""
    fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return _typed({name: _settings(x) if dataclasses.is_dataclass(x) else x for name, x in fields.items()})


def _typed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: placeholder(_OPEN[name]) if x is None and name in _OPEN else x for name, x in values.items()}


def _base(
    method: str, task: str, task_options, budget: int, steps: int, learning_rate: float
) -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "method": method,
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
            "selection": slots.block("rl.data.selection", "uniform"),
            "replay": slots.block("rl.data.replay", "none"),
            "refills": 0,
            "budget": budget,
            "sampling": {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
            "score": "solved",
            "engine": {"slots": 1024, "chunk": 8, "bucket": 16, "view": 128, "tail": 0},
            "reward": {"workers": 1, "deadline": 5.0},
            "mesh": mesh(),
            "optimizer": optimizer(learning_rate=learning_rate),
        }
    )
