"""Config files, variants, overrides, resolved JSON, and the messages of each mistake."""

from pathlib import Path

import ml_collections
import pytest

from rl import config as config_lib
from rl.config import ConfigError

FILE = str(Path(__file__).with_name("toy_config.py"))
RECIPE = str(Path(__file__).parents[2] / "configs" / "digits.py")


def test_variant_and_overrides_keep_types():
    config = config_lib.load(f"{FILE}:slow", ["learning_rate=1", "--config.optimizer.b1=0.5", "layers=(5, 6)"])
    assert config.pause == 0.008 and config_lib.load(FILE).pause == 0.0
    assert config.learning_rate == 1.0 and isinstance(config.learning_rate, float)
    assert config.optimizer.b1 == 0.5 and config.layers == (5, 6)
    with pytest.raises(AttributeError, match="locked|seeed"):
        config.seeed = 1


def test_command_line_in_both_spellings():
    arguments = config_lib.parse(
        ["x", "--config", FILE, "--config.seed", "7", "--config.optimizer.name=sgd", "--workdir=runs/a"]
    )
    assert arguments.config.seed == 7 and arguments.config.optimizer.name == "sgd"
    assert (arguments.workdir, arguments.tensorboard) == ("runs/a", False)
    assert config_lib.parse(["x", f"--config={FILE}", "--workdir=a", "--tensorboard"]).tensorboard
    assert config_lib.parse(["x", f"--config={FILE}"], workdir_required=False).workdir is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([f"--config={FILE}", "--config.learning_rat=1"], ["no key 'learning_rat'", "mean learning_rate?", "seed = 3"]),
        ([f"--config={FILE}", "--config.optimizer.b2=1"], ["no key 'optimizer.b2'", "optimizer.b1 = 0.9"]),
        ([f"--config={FILE}", "--config.seed=many"], ["--config.seed=many", "many"]),
        ([f"--config={FILE}", "--config.seed=1.5"], ["--config.seed=1.5"]),
        ([f"--config={FILE}", "--wrkdir=a"], ["wrkdir", "usage:"]),
        ([f"--config={FILE}", "stray"], ["unexpected argument 'stray'"]),
        ([f"--config={FILE}:fast"], ["KeyError", "fast"]),
        ([f"--config={RECIPE}:es"], ["error: unknown variant 'es'; known: eggroll, backprop\n"]),
        (["--config=nowhere.py"], ["nowhere.py' does not exist"]),
        (["--config", "nowhere.py"], ["nowhere.py' does not exist"]),
        (["--config"], ["'' does not exist"]),
        ([], ["--config is missing"]),
    ],
)  # fmt: skip
def test_mistakes_exit_with_a_message(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        config_lib.parse(["x", *arguments], workdir_required=False)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and message.startswith("error: ")
    assert all(word in message for word in words), message


def test_missing_workdir_and_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        config_lib.parse(["x", f"--config={FILE}"])
    assert stopped.value.code == 2 and "--workdir is missing" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        config_lib.parse(["x", "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "usage: x --config=FILE.py" in printed and "--workdir=DIR " in printed and "seed" not in printed
    for spelling in ([f"--config={FILE}:slow"], ["--config", f"{FILE}:slow"]):
        with pytest.raises(SystemExit) as stopped:
            config_lib.parse(["x", "-h", *spelling, "--config.seed=8"])
        printed = capsys.readouterr().out
        assert stopped.value.code == 0 and "\n  pause = 0.008\n" in printed and "\n  seed = 8" in printed


def test_resolved_is_plain_json():
    config = ml_collections.ConfigDict({"a": (1, 2), "b": {"c": None, "d": {}}, "e": 0.1})
    assert config_lib.resolved(config) == {"a": [1, 2], "b": {"c": None, "d": {}}, "e": 0.1}
    assert config_lib.flatten(config_lib.resolved(config)) == {"a": [1, 2], "b.c": None, "b.d": {}, "e": 0.1}


@pytest.mark.parametrize("value", [float("nan"), print, {1, 2}])
def test_values_json_cannot_hold_are_named(value):
    with pytest.raises(ConfigError, match="b.c is"):
        config_lib.resolved(ml_collections.ConfigDict({"a": 1, "b": {"c": value}}))


def test_differing_configs_name_key_and_both_values():
    config_lib.check_same({"a": [1, 2], "b": {"c": 1}}, {"b": {"c": 1}, "a": [1, 2]}, "w")
    with pytest.raises(ConfigError) as error:
        config_lib.check_same({"a": 1, "b": {"c": 0.1}, "same": 3}, {"a": True, "b": {"d": "x"}, "same": 3}, "runs/w")
    message = str(error.value)
    assert "runs/w" in message and "same" not in message
    assert "a: stored 1, this command true" in message
    assert "b.c: stored 0.1, this command (absent)" in message
    assert 'b.d: stored (absent), this command "x"' in message
