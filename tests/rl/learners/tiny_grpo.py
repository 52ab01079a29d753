"""Config of a run by policy gradients that takes seconds; `config.model.path` is for the test to give."""

import ml_collections

from configs.language import policy_gradient
from rl import slots
from tests.experiments.tiny_language import COUNTDOWN


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = policy_gradient(
        "countdown", "grpo", task_options=COUNTDOWN, budget=4, steps=5, samples=4, learning_rate=0.01
    )
    config.save_every, config.eval_every, config.eval_problems, config.log_samples = 2, 5, 12, 4
    config.task.problems, config.prompts = 10, 4
    config.engine.update({"slots": 8, "chunk": 4, "bucket": 16, "view": 0})
    config.gradient.tokens = 128
    if variant == "mixed":
        config.selection = slots.block("rl.data.selection", "dots", references=2, samples=2)
        config.replay = slots.block("rl.data.replay", "fifo", fresh=0.5, capacity=6)
        config.refills = 1
        config.gradient.update({"staleness": 2, "minibatches": 2, "informative_only": True})
    if variant == "anchored":
        config.replay = slots.block("rl.data.replay", "recent", replayed=0.5, until=3)
        config.model.dtype = "bfloat16"
        config.gradient.update({"epochs": 2, "kl_convex": True, "reincarnation": 3, "step_scale": 1.0})
        config.gradient.lora.update({"rank": 2, "pattern": "attention/.*kernel"})
    if variant == "divided":
        config.gradient.advantage_options = {"delta": 0.0}
        config.gradient.limit = 2
    return config.lock()
