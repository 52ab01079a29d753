"""A plan carried out: every group's sequences on its own devices, sharded over tokens, and the gradient of all of them."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rl import estimate as estimates
from rl.data import sequence_parallel as sp
from rl.data.packing import Shape, micro_batches
from rl.objectives.policy_gradient import Objective
from tests.rl.batches import LONGEST, made, rows
from tests.rl.models.tiny import prepared, trees_close

OBJECTIVE = Objective(low=0.2, high=0.3, kl=0.1, kl_estimator="k2", entropy=0.05)
ROW = 16  # tokens of a row, which every degree divides


@pytest.mark.slow
def test_the_gradient_does_not_depend_on_the_groups():
    model, params, _ = prepared("llama")
    run = jax.jit(lambda params, batch: estimates.estimate(model, params, batch, OBJECTIVE, block=8)[0].gradient)
    data = rows()
    lengths = data["prompt_length"] + data["length"]
    profile = sp.Profile(1e-3, 1e-2, 0.0, 1.0, {2: 1e9}, 1.0, 0.0)
    groups = sp.solve(lengths, profile, capacity=40, layouts=np.array([[1, 1]]))  # every group is a program to compile
    assert list(groups.degree) == [2, 1] and set(groups.group) == {0, 1}
    total, counted = None, 0
    for g, degree in enumerate(groups.degree):
        mine = groups.sequence[groups.group == g]
        tokens = data["mask"][mine].sum()
        first = groups.degree[:g].sum()
        mesh = jax.sharding.Mesh(np.array(jax.devices()[first : first + degree]), ("sequence",))
        gradient = run(*placed(mesh, params, batch_of(data, mine)))
        shards = {s.device for x in jax.tree.leaves(gradient) for s in x.addressable_shards}
        assert shards == set(mesh.devices.flat)
        weighted = jax.tree.map(lambda x, tokens=tokens: np.asarray(x) * tokens, gradient)
        total = weighted if total is None else jax.tree.map(np.add, total, weighted)
        counted += tokens
    assert counted == data["mask"].sum()
    expected = run(params, made())
    assert max(np.abs(x).max() for x in jax.tree.leaves(expected)) > 0.05
    trees_close(jax.tree.map(lambda x: x / counted, total), expected, 1e-5)


def batch_of(data, mine):
    """Some sequences as micro-batches of one row each."""
    some = {name: x[mine] for name, x in data.items()}
    tokens = [some.pop(name) for name in ("prompt", "prompt_length", "tokens", "length")]
    return micro_batches(*tokens, Shape(ROW, 1, 4, LONGEST)).credit(**some)


def placed(mesh, params, batch):
    """Parameters on every device of the group, tokens of each row spread over them."""
    put = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))
    batch = jax.tree.map(lambda x: put(x, None, None, "sequence") if x.shape[2:] == (ROW,) else put(x), batch)
    return jax.tree.map(put, params), batch
