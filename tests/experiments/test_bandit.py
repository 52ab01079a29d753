"""Every recipe of a toy bandit can be run as it is, and what the committed comparisons say holds."""

import json

import pytest

from configs import bandit, staleness
from experiments import language, report
from rl import config as config_lib
from rl.objectives.presets import PRESETS

RECIPES = (
    *(f"bandit.py:{name}" for name in (*PRESETS, "eggroll")),
    *(f"staleness.py:{method}_64" for method in staleness.METHODS),
    *(f"dots.py:{name}" for name in ("uniform", "dots", "dots_rr")),
)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_fit_the_task_and_the_model(recipe):
    config = config_lib.load(f"{report.ROOT / 'configs' / recipe}")
    setup, _ = language.set_up(config, language.task_of(config), pool=None)
    name = recipe.partition(":")[2]
    assert setup.learner.members == (256 if name == "eggroll" else 0)
    assert not {problem.id for problem in setup.test.problems} & {problem.id for problem in setup.train.problems}
    assert setup.settings.length == 6  # three letters and the three that answer them
    if recipe.startswith("staleness"):
        assert (config.method, config.gradient.staleness) == (name.removesuffix("_64"), 64)


def test_unknown_variants_list_what_exists():
    with pytest.raises(config_lib.ConfigError, match="unknown variant 'grop'; known: grpo, reinforce,"):
        bandit.get_config("grop")
    with pytest.raises(config_lib.ConfigError, match="grpo_0, grpo_1, grpo_4, grpo_16, grpo_64, ppo_0"):
        staleness.get_config("grpo_2")


def test_every_method_reached_the_optimum_within_a_minute():
    results = json.loads((report.RESULTS / "bandit.json").read_text())
    assert {row["config"].partition(":")[2] for row in results} == {*PRESETS, "eggroll"}
    assert all(row["reach"] == 1 and row["reached"]["seconds"] < 60 for row in results)
