"""What fits: the search, and the needs of tiny runs."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from experiments import fit, train
from rl import config as config_lib
from rl import mesh as meshes
from rl.learners import gradient
from rl.learners.settings import Settings
from rl.models import presets
from rl.objectives.presets import PRESETS
from rl.run import RunError
from tests.experiments.tiny_train import FAST, ROOT, SHAPE, config_of
from tests.rl.learners import toy


@pytest.mark.parametrize(
    ("fixed", "per", "limit", "start", "most", "expected"),
    [
        (100, 10, 1000, 8, 512, 64),  # 740 fits, 1380 does not
        (100, 10, 1000, 48, 512, 48),  # 580 fits, 1060 does not
        (100, 10, 10**9, 8, 100, 128),  # the first that holds a whole step
        (100, 10, 150, 64, 512, 4),
        (100, 10, 99, 64, 512, 0),
        (100, 10, 110, 1, 1, 1),
    ],
)
def test_largest(fixed, per, limit, start, most, expected):
    seen = []
    found = fit.largest(lambda n: seen.append(n) or fixed + per * n, limit, start, most)
    assert found == expected and len(set(seen)) <= 5  # of a straight line, few are measured


def test_a_bent_line_is_measured_and_not_guessed():
    assert fit.largest(lambda n: n * n, 10_000, 8, 10**6) == 64  # 64 fits, 128 does not; a straight line says 512


def test_what_a_program_takes():
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    fresh = jax.jit(lambda x: x + 1).lower(x).compile()
    over = jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile()
    assert fit.taken(fresh) == 4 * 256**2 and fit.taken(over) == 0


def test_what_is_passed_on_is_not_held_twice():
    mesh = meshes.make({"fsdp": 8})
    lying = lambda spec: jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
    given = {"whole": lying(()), "cut": lying(("fsdp",)), "other": lying(())}

    def make(tree):
        everywhere = NamedSharding(mesh, PartitionSpec())
        whole = {name: jax.lax.with_sharding_constraint(x, everywhere) for name, x in tree.items()}
        return whole | {"other": whole["other"] + 1, "number": jnp.float32(1)}

    made = fit.laid_out(mesh, make, given)
    again = fit.anew(make, given, made)
    assert fit.held(again) == 2 * 64 * 64 * 4 + 4  # "cut", put together, "other", computed, and the number
    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), given)
    assert fit.anew(lambda tree: tree, plain, plain) == []


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "tiny-transformer", SHAPE)


def test_evolution(tiny):
    config = config_of("", *FAST)
    found = fit.fit(config, 2**24)
    assert found["held"]["noise"] > 0 and found["sampling"] > found["held"]["parameters"]
    assert found["slots"] == 32 and found["tokens"] is None  # 8 members x 4 prompts


def backprop(*overrides):
    small = ["warm_start.steps=0", "gradient.tokens=256", "prompts=2", "engine.slots=8"]
    return config_lib.load(f"{ROOT}/configs/countdown_grpo.py", [*small, *overrides])


@pytest.mark.slow
def test_backprop(tiny):
    config = backprop()
    found = fit.fit(config, 2**21)
    assert found["learning"] > 3 * found["held"]["parameters"]  # with the gradient and two moments
    stale = fit.fit(backprop("gradient.staleness=1"), 2**40)  # the one older policy is kept, and taken out to sample
    assert stale["sampling"] == pytest.approx(found["sampling"] + 2 * found["held"]["parameters"], rel=0.01)
    assert 8 <= found["slots"] <= 2 * config.samples and found["tokens"] in (64, 128, 256, 512, 1024)


@pytest.mark.slow
def test_a_mesh_is_planned_for_one_of_its_devices(tiny):
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    config = backprop("engine.slots=16", "prompts=8", *(f"mesh.{name}={size}" for name, size in sizes.items()))
    found, alone = fit.fit(config, 2**18), fit.fit(backprop("engine.slots=16", "prompts=8"), 2**18)
    assert found["learning"] < alone["learning"] and found["sampling"] < 0.5 * alone["sampling"]
    assert found["slots"] == 8 * 16 > alone["slots"] > 16  # all answers of a step
    assert found["held"] == alone["held"]


@pytest.mark.slow
def test_what_a_device_holds_is_what_it_will_hold():
    model, params = toy.start()
    mesh = meshes.make({"data": 2, "fsdp": 2, "tensor": 2})
    settings = Settings(PRESETS["grpo"].objective, "group_std", staleness=2)
    method = gradient.learner(model, optax.adam(1e-3), settings, toy.SHAPE, toy.PROMPTS, toy.G, 0, (), mesh)
    planned, made = fit.laid_out(mesh, method.init, params), method.init(params)
    own = lambda x: x.addressable_shards[0].data.nbytes
    assert fit.held(planned) == fit.held(made) == sum(map(own, jax.tree.leaves(made)))
    assert fit.held(planned) < 0.5 * sum(x.nbytes for x in jax.tree.leaves(made))


@pytest.mark.slow
def test_recorded_experts_count(monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "tiny-transformer", dataclasses.replace(
        SHAPE, experts=4, experts_per_token=2, expert_hidden=8, normalise_experts=True
    ))  # fmt: skip
    plain, recorded = (fit.fit(backprop("samples=4", f"gradient.routing={kind}"), 2**40) for kind in ("none", "r3"))
    tokens = 2 * 4 * 24 // 2  # of one minibatch in rows of 24; a layer has two experts a token, a byte each
    assert recorded["learning"] >= plain["learning"] + 2 * tokens
    assert recorded["sampling"] > plain["sampling"]


def test_too_little_memory_names_the_two_sizes(tiny, tmp_path, monkeypatch):
    def complete(*args):
        return jax.jit(lambda x: jnp.zeros((1 << 24, 1 << 24)) + x)(jnp.float32(0)).block_until_ready()  # a PiB

    monkeypatch.setattr(train, "complete", complete)
    with pytest.raises(RunError, match=r"lower config.engine.slots = 8 .* or config.es.chunk = 0 .*experiments.fit"):
        train.train(config_of("", *FAST), tmp_path)
