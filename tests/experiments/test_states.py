"""Every field of every experiment's state is in its checkpoints: nothing that a step changes hides from them."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import control, pretrain, train
from rl import checkpoint
from rl import config as config_lib
from rl.checkpoint import leaves
from rl.run import Run
from tests.experiments.test_control import TINY_ES, TINY_PPO
from tests.experiments.tiny_train import FAST, save_start

ROOT = Path(__file__).parents[2]
LANGUAGE = [*FAST, "eval_problems=1", "reward.workers=1"]
RUNS = {
    "control": (control, "configs/control_cartpole.py:eggroll", TINY_ES),
    "ppo": (control, "configs/control_cartpole.py:ppo", TINY_PPO),
    "backprop": (pretrain, "configs/digits.py:backprop", ["width=32"]),
    "evolution": (train, "tests/experiments/tiny_language.py", LANGUAGE),
    "gradient": (train, "tests/rl/learners/tiny_grpo.py:mixed", LANGUAGE),
}


class _StoppedError(Exception):
    """After the first step."""


def arrays(value):
    """Every array that is reachable through fields, entries and attributes, whether or not jax calls it a leaf."""
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from arrays(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from arrays(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from arrays(getattr(value, field.name))
    elif hasattr(value, "__dict__") and not callable(value):
        yield from arrays(vars(value))


def hidden(state):
    """Arrays of the state that no checkpoint would have."""
    saved = {id(leaf) for leaf in jax.tree.leaves(state)}
    return [array for array in arrays(state) if id(array) not in saved]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return save_start(tmp_path_factory.mktemp("start") / "model")


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_all_of_a_state_is_saved_and_comes_back(start, tmp_path, monkeypatch, name):
    script, recipe, overrides = RUNS[name]
    seen = {}

    def restore(run, state):
        seen["before"] = jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, jax.Array) else leaf, state)
        return original(run, state)

    def record(run, state, metrics, work=None):
        seen["after"] = state
        raise _StoppedError

    original = Run.restore
    monkeypatch.setattr(Run, "restore", restore)
    monkeypatch.setattr(Run, "record", record)
    if script is train:
        overrides = [*overrides, f"model.path={start}"]
    config = config_lib.load(str(ROOT / recipe), overrides)
    with pytest.raises(_StoppedError):
        script.train(config, tmp_path / "run")
    before, after = seen["before"], seen["after"]
    assert [array.shape for array in hidden(after)] == []
    # Whatever is in the structure, and not in the leaves, a resumed run takes from its initial state: it must not change.
    assert jax.tree.structure(before) == jax.tree.structure(after)
    checkpoint.save(tmp_path / "saved", 1, after, {})
    found = leaves.view(checkpoint.restore(tmp_path / "saved", before).state)
    saved, started = leaves.view(after), leaves.view(before)
    assert found.rows == saved.rows
    for leaf, value in saved.values.items():
        assert np.asarray(found.values[leaf]).tobytes() == np.asarray(value).tobytes(), leaf
    # The step has changed something of what was compared.
    assert any(np.asarray(started.values[n]).tobytes() != np.asarray(v).tobytes() for n, v in saved.values.items())


@functools.partial(jax.tree_util.register_dataclass, data_fields=["x"], meta_fields=["memory"])
@dataclasses.dataclass(frozen=True)
class _Forgetful:
    x: jax.Array
    memory: object


def test_a_field_that_is_not_saved_is_noticed():
    assert hidden({"a": (_Forgetful(jnp.ones(1), None), jnp.ones(2)), "b": jax.random.key(0)}) == []
    memory = np.ones(3)
    assert hidden({"a": [_Forgetful(jnp.ones(1), {"moments": memory})]})[0] is memory
    changed = _Forgetful(jnp.ones(1), 2)
    assert jax.tree.structure(_Forgetful(jnp.ones(1), 1)) != jax.tree.structure(changed)
