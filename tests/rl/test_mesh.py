"""Meshes from sizes; steps of policy gradients on eight devices, however they are divided."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from eggroll import sharding
from rl import estimate as estimates
from rl import lora
from rl import mesh as meshes
from rl.learners import gradient
from rl.learners.settings import Lora, Settings
from rl.models.presets import make
from rl.objectives.presets import PRESETS
from tests.rl import batches
from tests.rl.learners.toy import PROMPTS, SEED, SHAPE, STOP, G, answers, optimizer, start
from tests.rl.models.tiny import ALL, SHAPES, close, random_params, trees_close

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


@functools.cache
def stacked(name, remat):
    """(model, parameters) with layers to scan over, where they are alike."""
    model = make(dataclasses.replace(ALL[name], scan_layers=name != "mixed", remat=remat))
    return model, random_params(model)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "remat"), [("rwkv7", True), ("mixed", False)])
def test_what_fsdp_puts_together_layer_by_layer_is_what_was_divided(name, remat):
    model, params = stacked(name, remat)
    mesh, batch = meshes.make({"tensor": 2, "fsdp": 4}), batches.made()
    placed = meshes.place(mesh, params)

    def results(params, mesh=None):
        made, sample = estimates.estimate(model, params, batch, PRESETS["grpo"].objective, mesh=mesh)
        scores = estimates.completion_scores(model, params, batch, mesh=mesh)
        norms = () if remat else estimates.norms(model, params, batch, mesh=mesh)
        return made.gradient, sample.log_weight, scores, norms

    got, want = jax.jit(functools.partial(results, mesh=mesh))(placed), jax.jit(results)(params)
    trees_close(got, want, 1e-5)
    lies = jax.tree.map(lambda x: x.sharding, placed)
    assert jax.tree.all(jax.tree.map(lambda x, like: x.sharding.is_equivalent_to(like, x.ndim), got[0], lies))
    assert 5 < len(meshes.parts(mesh, params)) < len(jax.tree.leaves(params))


@pytest.mark.parametrize("of_all", [False, True])
def test_what_merging_computes_with_is_whole(of_all):
    """Adapters of embedding and head, which are merged, beside attached ones; and all matrices divided by their norms first."""
    model, params = start()
    mesh, batch = meshes.make({"fsdp": 8}), batches.made()
    factors = lora.init(params, 2, "embed|head|attention/.*kernel", jax.random.key(3))
    factors = jax.tree.map(lambda x: x + 0.1, factors)
    unit = lambda x: x / jnp.linalg.norm(x) if x.ndim == 2 else x

    def gradient(factors, base, mesh=None):
        merge = lambda base, factors: lora.attach(jax.tree.map(unit, base) if of_all else base, factors, 4.0)
        made, _ = estimates.estimate(
            model, factors, batch, PRESETS["dr_grpo"].objective, base=base, merge=merge, mesh=mesh
        )
        return made.gradient

    got = jax.jit(functools.partial(gradient, mesh=mesh))(factors, meshes.place(mesh, params))
    trees_close(got, jax.jit(gradient)(factors, params), 1e-5)


@pytest.mark.slow
def test_adapters_under_fsdp():
    settings = dataclasses.replace(GRPO, lora=Lora(rank=4, alpha=8.0, pattern="(attention|mlp)/.*kernel"))
    _, got, _ = steps({"data": 2, "fsdp": 2, "tensor": 2}, settings)
    _, want, _ = steps(None, settings)
    trees_close(got.params, want.params, 1e-5)
    assert not got.base["layer_0"]["mlp"]["up"]["kernel"].sharding.is_fully_replicated


def test_gradients_of_parts_are_summed_in_f32():
    mesh = meshes.make({"fsdp": 8})
    factors = 1 + np.arange(8, dtype=np.float32) / 128  # bf16 numbers, whose sums bf16 would round on the way: to 8
    together = lambda x: meshes.gatherer({"head/kernel": -1})("head", {"kernel": x})["kernel"]

    def own(device, x):
        return jax.grad(lambda x: jnp.sum(together(x) * jnp.asarray(factors)[device]))(x), together(x)

    x, cut = jnp.arange(16, dtype=jnp.bfloat16).reshape(1, 16), PartitionSpec(None, "fsdp")
    gradient, whole = sharding.per_device(own, mesh, ("fsdp",), (cut,), (cut, PartitionSpec()))(x)
    np.testing.assert_array_equal(whole, x)
    np.testing.assert_array_equal(gradient, np.full((1, 16), jnp.bfloat16(factors.sum())))
    assert meshes.gatherer({}) is None


@pytest.mark.slow
@pytest.mark.parametrize(("name", "remat"), [("llama", False), ("rwkv7", True)])
def test_fsdp_divides_what_a_gradient_takes(name, remat):
    config = dataclasses.replace(SHAPES[name], layers=12, width=128, scan_layers=True, remat=remat)
    model = make(config if name == "rwkv7" else dataclasses.replace(config, hidden=256, head_dim=32))
    shapes, batch, objective = jax.eval_shape(model.init, jax.random.key(0)), batches.made(), PRESETS["grpo"].objective
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))

    def temporary(**sizes):
        mesh = meshes.make(sizes)
        lies = sharding.shardings(mesh, meshes.LAYOUT, shapes)
        params = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, lies)
        gradient = lambda params: estimates.estimate(model, params, batch, objective, mesh=mesh)[0].gradient
        attach = functools.partial(lora.attach, alpha=8.0)
        of_adapter = lambda factors, base: (
            estimates.estimate(model, factors, batch, objective, base=base, merge=attach, mesh=mesh)[0].gradient
        )
        factors = jax.eval_shape(lambda x: lora.init(x, 4, "layers/.*kernel", jax.random.key(1)), params)
        programs = [jax.jit(gradient).lower(params), jax.jit(of_adapter).lower(factors, params)]
        return [program.compile().memory_analysis().temp_size_in_bytes / size for program in programs]

    own, whole = temporary(fsdp=8), temporary(data=8)
    assert whole[0] > 1  # one micro-batch's gradient at least
    assert own[0] < (0.4 if remat else 0.7) * whole[0]  # without remat a device keeps its activations as before
    assert own[1] < whole[1] + 0.3  # no copy of the weights, though no device holds them


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
