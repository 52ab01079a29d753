"""What every method of every slot keeps: found by looking into the folders of `rl.slots.FOLDERS`, so none can be forgotten.

A new folder needs one entry of `LIVES`: how the loop uses a method of it for some steps.
"""

import importlib

import jax
import ml_collections
import numpy as np
import pytest

from rl import checkpoint, slots
from rl.config import ConfigError
from rl.data import replay, selection
from rl.data.replay import Groups, Shape
from rl.data.selection import Judged, Pool

METHODS = [(folder, name) for folder in slots.FOLDERS for name in slots.names(folder)]
every_method = pytest.mark.parametrize(("folder", "name"), METHODS, ids=lambda x: x.rpartition(".")[2])


def frozen(tree):
    """The same arrays, read-only: whoever writes into them raises."""

    def freeze(x):
        if isinstance(x, np.ndarray):
            x = x.view()
            x.flags.writeable = False
        return x

    return jax.tree.map(freeze, tree)


def select(slot, state, step):
    """A selection's step: problem i is solved by chance, the more often the larger i."""
    random = np.random.default_rng(step)
    value = lambda rows, samples: (random.random((len(rows), samples)) * 12 < rows[:, None]).astype(float)
    measure = lambda rows, samples: (value(rows, samples), np.ones((len(rows), samples), bool))
    state, rows, metrics = selection.choose(slot, frozen(state), step, 4, measure)
    state, more = slot.update(frozen(state), frozen(Judged(step, rows, value(rows, 3), np.ones((4, 3), bool))))
    return state, (rows, metrics, more)


def replayed(slot, state, step):
    """A replay's step: 4 groups of 3 answers of up to 5 tokens."""
    drawn = slot.apply(frozen(state), step, 4)
    random, shape = np.random.default_rng(100 + step), (drawn.fresh, 3, 5)
    fresh = Groups(
        random.permutation(12)[: drawn.fresh].astype(np.int32), random.integers(1, 9, shape).astype(np.int32),
        random.integers(0, 6, shape[:2]).astype(np.int32), -random.random(shape, np.float32),
        np.full(shape, step, np.int32), random.integers(0, 2, shape[:2]).astype(np.float32), np.ones(shape[:2], bool),
    )  # fmt: skip
    batch = replay.join(fresh, drawn.groups)
    assert batch.size == 4
    state, metrics = slot.update(frozen(state), step, frozen(fresh))
    return state, (batch, metrics)


# folder -> (seed -> what `init` takes, (slot, state, step) -> (state, everything it put out))
EMBEDDING = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
LIVES = {
    "rl.data.selection": (lambda seed: Pool(12, seed, lambda: EMBEDDING), select),
    "rl.data.replay": (lambda seed: Shape(4, 3, 5, seed), replayed),
}
SMALL = {"references": 6, "samples": 3, "capacity": 6}  # keys of any method that are too large for these lives


def bound(folder, name):
    config = slots.block(folder, name)
    config.update({key: value for key, value in SMALL.items() if key in config})
    return slots.bind(folder, config)


def live(folder, slot, state, steps):
    trace = []
    for step in steps:
        state, out = LIVES[folder][1](slot, state, step)
        trace.append(out)
    return state, trace


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
        assert np.asarray(x).dtype == np.asarray(y).dtype


def test_every_folder_has_a_life_and_methods():
    assert set(LIVES) == set(slots.FOLDERS)
    assert {folder for folder, _ in METHODS} == set(slots.FOLDERS)
    assert {("rl.data.selection", "dots"), ("rl.data.replay", "fifo")} < set(METHODS)
    assert not [name for _, name in METHODS if name.startswith("_")]


@every_method
def test_config_is_flat_locked_and_refuses_what_it_does_not_know(folder, name):
    module = importlib.import_module(f"{folder}.{name}")
    config = module.default_config()
    assert isinstance(config, ml_collections.ConfigDict) and config.is_locked and module.__doc__
    assert not any(isinstance(value, ml_collections.ConfigDict) for value in config.values())
    with pytest.raises(ConfigError, match=rf"unknown keys \['nonsense'\] of {folder}.{name}; known: "):
        slots.block(folder, name, nonsense=1)
    with pytest.raises(ConfigError, match="unknown keys"):
        slots.bind(folder, ml_collections.ConfigDict({"name": name, "nonsense": 1}))
    for key in config:
        less = {k: v for k, v in config.items() if k != key}
        with pytest.raises(ConfigError, match=f"also has {[key]}".replace("[", r"\[")):
            slots.bind(folder, ml_collections.ConfigDict({"name": name} | less))
        with pytest.raises(ConfigError, match=f"{key} of {folder}.{name} must be a "):
            slots.block(folder, name, **{key: object()})


@every_method
def test_a_life_repeats_and_its_seed_matters(folder, name):
    slot, arguments = bound(folder, name), LIVES[folder][0]
    first = live(folder, slot, slot.init(arguments(1)), range(8))
    assert_equal(first, live(folder, slot, slot.init(arguments(1)), range(8)))
    if jax.tree.leaves(first[0]):  # a method without state has no randomness
        other = live(folder, slot, slot.init(arguments(2)), range(8))
        assert any(not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (first[1], other[1])), strict=False))


@every_method
def test_state_survives_a_checkpoint_at_every_step(folder, name, tmp_path):
    slot, arguments = bound(folder, name), LIVES[folder][0]
    state, _ = live(folder, slot, slot.init(arguments(1)), range(3))
    whole = live(folder, slot, state, range(3, 8))
    checkpoint.save(tmp_path, 3, {"slot": state}, {})
    restored = checkpoint.restore(tmp_path, {"slot": slot.init(arguments(1))})
    assert restored.step == 3
    assert_equal(restored.state["slot"], state)
    assert_equal(live(folder, slot, restored.state["slot"], range(3, 8)), whole)


@every_method
def test_states_have_one_shape_and_are_never_changed_in_place(folder, name):
    slot, (arguments, life) = bound(folder, name), LIVES[folder]
    state = slot.init(arguments(1))
    for step in range(6):
        before = jax.tree.map(np.array, state)
        new, _ = life(slot, state, step)  # which hands in read-only arrays
        assert_equal(state, before)
        kinds = [[(np.shape(x), np.asarray(x).dtype) for x in jax.tree.leaves(tree)] for tree in (state, new)]
        assert kinds[0] == kinds[1] and jax.tree.structure(state) == jax.tree.structure(new)
        state = new


@every_method
def test_metrics_are_finite_numbers(folder, name):
    slot = bound(folder, name)
    _, trace = live(folder, slot, slot.init(LIVES[folder][0](1)), range(5))
    for metrics in (x for out in trace for x in out if isinstance(x, dict)):
        assert all(type(value) is float and np.isfinite(value) for value in metrics.values()), metrics


@pytest.mark.parametrize("folder", slots.FOLDERS)
def test_unknown_methods_list_those_that_exist(folder):
    with pytest.raises(
        ConfigError, match=f"unknown method 'dotts' of {folder}; known: {', '.join(slots.names(folder))}"
    ):
        slots.block(folder, "dotts")
    with pytest.raises(ConfigError, match="a slot's config needs a name"):
        slots.bind(folder, ml_collections.ConfigDict({"window": 2}))
