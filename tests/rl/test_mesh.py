"""Meshes from sizes; steps of policy gradients on eight devices, however they are divided."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from rl import mesh as meshes
from rl.learners import gradient
from rl.learners.settings import Settings
from rl.objectives.presets import PRESETS
from tests.rl.learners.toy import PROMPTS, SEED, SHAPE, STOP, G, answers, optimizer, start
from tests.rl.models.tiny import close, trees_close

GRPO = Settings(PRESETS["grpo"].objective, "group_std", minibatches=2)


def steps(sizes, settings=GRPO, tx=None):
    """(state, metrics) after two updates on so many devices."""
    model, params = start()
    shape = dataclasses.replace(SHAPE, rows=1, per_row=2)  # several micro-batches to deal out
    method = gradient.learner(
        model, tx or optimizer(), settings, shape, PROMPTS, G, SEED, (STOP,), meshes.make(sizes) if sizes else None
    )
    state, metrics = method.learn(method.init(params), answers(), None)
    return method, state, metrics


@functools.cache
def alone():
    return steps(None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "population": 2}], ids=str
)
def test_a_step_of_grpo_does_not_depend_on_the_devices(sizes):
    method, state, metrics = steps(sizes)
    _, want, measured = alone()
    trees_close(state.params, want.params, 1e-5)
    assert metrics.keys() == measured.keys()
    for name, value in measured.items():
        close(metrics[name], value, 1e-4)
    moments = state.opt_state[1][0].trace
    for tree in (state.params, moments):
        kernel = tree["layer_0"]["attention"]["query"]["kernel"]
        cut = (sizes.get("fsdp", 1), sizes.get("tensor", 1))
        assert kernel.addressable_shards[0].data.shape == tuple(np.array(kernel.shape) // cut)
    before = jax.tree.map(lambda x: x.sharding, state)
    after, _ = method.learn(state, answers(1), None)
    assert jax.tree.all(jax.tree.map(lambda x, old: x.sharding.is_equivalent_to(old, x.ndim), after, before))


def test_meshes_from_sizes():
    assert meshes.make({"data": 1}) is None
    assert dict(meshes.make({"data": -1, "tensor": 2}).shape) == {"population": 1, "data": 4, "fsdp": 1, "tensor": 2}
    assert meshes.make({"fsdp": 2}, jax.devices()[:2]).size == 2


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, "must multiply to the number of devices; got .*'data': 3.* and 8 devices"),
        ({"data": -1, "tensor": 3}, "and 8 devices"),
        ({"data": -1, "fsdp": -1}, "one of them at most -1"),
        ({"data": 0}, "each of a size from 1"),
        ({"model": 8}, "has the axes population, data, fsdp, tensor"),
    ],
)
def test_sizes_that_make_no_mesh(sizes, message):
    with pytest.raises(ValueError, match=message):
        meshes.make(sizes)
