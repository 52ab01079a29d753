"""Configs of runs that take seconds; `config.model.path` is for the test to give."""

import ml_collections

from configs.language import language, policy_gradient

COUNTDOWN = {"numbers": (2, 2), "operands": (1, 20), "target": (1, 40), "operations": "+-"}
TASKS = {
    "": ("countdown", COUNTDOWN),
    "mistyped": ("countdown", COUNTDOWN | {"nubmers": (2, 2)}),
    "stories": ("stories", {"words": 1, "length": (3, 20)}),
    "gsm8k": ("gsm8k", {"path": ""}),
    "grpo": ("countdown", COUNTDOWN),
}


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    task, options = TASKS[variant]
    common = {"task_options": options, "budget": 4, "steps": 5, "learning_rate": 0.03}
    if variant == "grpo":
        config = policy_gradient(task, "grpo", samples=4, **common)
        config.gradient.tokens = 64
    else:
        config = language(task, es_changes={"members": 8, "sigma": 0.05}, **common)
    config.save_every, config.eval_every, config.eval_problems, config.log_samples = 2, 2, 12, 3
    config.task.problems, config.prompts = 10, 4
    config.warm_start.update({"examples": 10, "steps": 100, "batch": 8, "learning_rate": 0.01})
    config.engine.update({"slots": 8, "chunk": 4, "bucket": 16, "view": 0})
    return config.lock()
