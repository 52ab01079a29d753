"""The engine's slots over eight devices: the same tokens, and every device keeps and computes those of its own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl import mesh as meshes
from rl.rollout import engine
from rl.rollout.generate import generate
from tests.rl.rollout import routed
from tests.rl.rollout.test_generate import KEY, equal, prepared, reference, requests


def watch(monkeypatch):
    """What `admit`, `decode` and `compact` return from now on: (name, slots, slots on one device) of their caches."""
    seen = set()

    def watched(name, call):
        def run(*args):
            out = call(*args)
            for x in jax.tree.leaves((out if name == "compact" else out[0]).cache):
                seen.add((name, len(x), x.addressable_shards[0].data.shape[0]))
            return out

        return run

    for name in ("admit", "decode", "compact"):
        monkeypatch.setattr(engine, name, watched(name, getattr(engine, name)))
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes", "spread"),
    [("llama", {"fsdp": 8}, 8), ("rwkv7", {"population": 2, "data": 2, "tensor": 2}, 4)],
    ids=str,
)
def test_slots_are_divided_and_tokens_stay(monkeypatch, name, sizes, spread):
    model, params, settings = prepared(name)
    mesh, seen = meshes.make(sizes), watch(monkeypatch)
    settings = dataclasses.replace(settings, slots=2 * spread, tail=spread, mesh=mesh)
    weights = meshes.place(mesh, meshes.place(mesh, params), whole=True)
    equal(generate(model, settings, weights, requests(), KEY), reference(name))
    assert {name for name, *_ in seen} == {"admit", "decode", "compact"}
    assert all(own == slots // spread for _, slots, own in seen), seen


@pytest.mark.slow
def test_recorded_experts_stay_too():
    model, params = routed.prepared()
    mesh = meshes.make({"data": 2, "fsdp": 2, "tensor": 2})
    weights = meshes.place(mesh, params, whole=True)
    got = generate(model, dataclasses.replace(routed.SETTINGS, slots=4, mesh=mesh), weights, routed.asked(), routed.KEY)
    np.testing.assert_array_equal(got.tokens, routed.whole().tokens)
    np.testing.assert_array_equal(got.experts, routed.whole().experts)
    np.testing.assert_allclose(got.logp, routed.whole().logp, atol=1e-5)


def test_a_decode_step_divides():
    """A device's operations: an eighth, and a little that all do, such as random keys."""
    model, params, settings = prepared("llama")
    flops = {}
    for mesh in (None, meshes.make({"data": 8})):
        some = dataclasses.replace(settings, slots=64, mesh=mesh)
        weights = meshes.place(mesh, params)
        program = engine.decode.lower(model, some, 16, weights, engine.init(model, some), KEY, jnp.int32(1)).compile()
        flops[mesh] = program.cost_analysis()["flops"]
    alone, spread = flops.values()
    assert spread < 1.25 / 8 * alone
