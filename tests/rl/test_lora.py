"""Adapters by hand, against the full gradient, and in training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl import lora
from rl.data.packing import Shape, micro_batches
from rl.estimate import estimate
from rl.models.dense import Dense
from rl.models.presets import make
from rl.objectives.policy_gradient import Objective
from tests.rl.batches import made
from tests.rl.models.tiny import ALL, close, prepared

KEY = jax.random.key(4)


def test_the_product_is_added_by_hand():
    params = {"m": {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "bias": jnp.ones(2)}}
    adapter = {"m": {"kernel": {"a": jnp.array([[1.0], [2.0]]), "b": jnp.array([[10.0, 20.0]])}}}
    merged = lora.merge(params, adapter, alpha=0.5)
    np.testing.assert_array_equal(merged["m"]["kernel"], [[6, 12], [13, 24]])
    assert merged["m"]["bias"] is params["m"]["bias"] and params["m"]["kernel"][0, 0] == 1
    np.testing.assert_array_equal(
        jax.grad(lambda p: lora.merge(p, adapter, 1.0)["m"]["kernel"].sum())(params)["m"]["kernel"], 0
    )


@pytest.mark.parametrize("scan_layers", [False, True])
def test_starts_as_the_given_model_with_adapters_where_asked(scan_layers):
    _, params, _ = prepared("moe", scan_layers)
    adapter = lora.init(params, 2, r"attention/(query|value)/kernel|experts_up", KEY)
    jax.tree.map(np.testing.assert_array_equal, lora.merge(params, adapter, 3.0), params)
    shapes = {"/".join(k.key for k in path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(adapter)}
    if scan_layers:
        assert shapes["layers/attention/query/kernel/a"] == (2, 24, 2)
        assert shapes["layers/moe/experts_up/b"] == (2, 5, 2, 12) and len(shapes) == 6
    else:
        assert shapes["layer_1/attention/value/kernel/b"] == (2, 12) and len(shapes) == 12
    spread = np.concatenate([np.ravel(x * x.shape[-2] ** 0.5) for x in jax.tree.leaves(adapter) if np.any(x)])
    assert 0.85 < spread.std() < 1.15 and np.unique(spread).size == spread.size


@pytest.mark.slow
def test_its_gradient_is_the_chain_rule_through_the_full_one():
    """dA = s dW B^T and dB = s A^T dW."""
    with jax.enable_x64(True):
        model, params, _ = prepared("qwen3", dtype="float64")
        adapter = lora.init(params, 3, "attention/.*kernel", KEY)
        adapter = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(KEY, x.shape, x.dtype), adapter)
        batch, objective = made(), Objective(low=0.2, high=0.2)
        attach = functools.partial(lora.attach, alpha=6.0)
        got = jax.jit(lambda a: estimate(model, a, batch, objective, base=params, merge=attach)[0].gradient)(adapter)
        full = jax.jit(lambda p: estimate(model, p, batch, objective)[0].gradient)(lora.merge(params, adapter, 6.0))
        for layer, name in (("layer_0", "query"), ("layer_1", "out")):
            parts, weight = adapter[layer]["attention"][name]["kernel"], full[layer]["attention"][name]["kernel"]
            assert np.abs(weight).max() > 1e-4
            close(got[layer]["attention"][name]["kernel"]["a"], 2 * weight @ parts["b"].T, 1e-12)
            close(got[layer]["attention"][name]["kernel"]["b"], 2 * parts["a"].T @ weight, 1e-12)


EVERY_MATRIX = r"kernel$|embedding$|experts_|time/[wagv][12]$"


@pytest.mark.parametrize(
    ("name", "scan_layers"),
    [("all-heads", False), ("one-kv-head", True), ("moe", True), ("rwkv7", False)],
)
def test_attached_is_merged(name, scan_layers):
    with jax.enable_x64(True):
        model, params, ids = prepared(name, scan_layers, "float64")
        adapter = lora.init(params, 2, EVERY_MATRIX, KEY)
        adapter = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(KEY, x.shape, x.dtype), adapter)
        attached, merged = lora.attach(params, adapter, 3.0), lora.merge(params, adapter, 3.0)
        forward = jax.jit(lambda params: model.head(params, model.forward(params, ids)[0]))
        assert np.abs(forward(merged) - forward(params)).max() > 1e-3
        close(forward(attached), forward(merged), 1e-12)
        names = {"/".join(k.key for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(attached)}
        beside = {name for name in names if name.endswith(("kernel.a", "kernel.b"))}
        kernels = {name for name in names if name.startswith("layer") and name.endswith("/kernel")}
        assert beside == {f"{name}.{factor}" for name in kernels for factor in "ab"} and len(kernels) >= 5


@pytest.mark.optimised
def test_attached_takes_no_product_and_no_memory_of_the_weights():
    config = dataclasses.replace(ALL["llama"], width=256, hidden=1024, head_dim=64, layers=8, scan_layers=True)
    model = make(config)
    shape = Shape(128, 4, 4, 64)
    ids = np.ones((8, 64), np.int32)
    batch = micro_batches(ids, np.full(8, 64), ids, np.full(8, 64), shape)
    batch = batch.credit(mask=ids > 0, advantage=np.ones(8), behaviour=-np.ones((8, 64), np.float32))
    params = jax.eval_shape(model.init, KEY)
    adapter = jax.eval_shape(lambda params: lora.init(params, 4, "layers/.*kernel", KEY), params)

    def compiled(form):
        merge = functools.partial(form, alpha=8.0)
        gradient = lambda a, p: estimate(model, a, batch, Objective(), base=p, merge=merge)[0].gradient
        return jax.jit(gradient).lower(adapter, params).compile()

    attached, merged = compiled(lora.attach), compiled(lora.merge)
    assert attached.cost_analysis()["flops"] < 0.75 * merged.cost_analysis()["flops"]
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params["layers"]))
    temporary = lambda program: program.memory_analysis().temp_size_in_bytes
    assert temporary(merged) - temporary(attached) > weights


def test_bf16_weights_have_f32_adapters():
    _, params, _ = prepared("qwen3", dtype="bfloat16")
    adapter = lora.init(params, 2, "mlp/up", KEY)
    assert {x.dtype for x in jax.tree.leaves(adapter)} == {jnp.dtype("float32")}
    adapter = jax.tree.map(lambda x: x + 0.5, adapter)
    merged, weight = lora.merge(params, adapter, 2.0), params["layer_0"]["mlp"]["up"]["kernel"]
    parts = adapter["layer_0"]["mlp"]["up"]["kernel"]
    assert merged["layer_0"]["mlp"]["up"]["kernel"].dtype == jnp.bfloat16
    expected = (weight.astype(jnp.float32) + parts["a"] @ parts["b"]).astype(jnp.bfloat16)
    np.testing.assert_array_equal(merged["layer_0"]["mlp"]["up"]["kernel"], expected)
    up = lora.attach(params, adapter, 2.0)["layer_0"]["mlp"]["up"]
    assert up["kernel"] is weight and up["kernel.a"] is parts["a"]
    dense, x = Dense(weight.shape[1], False, "bfloat16", "bfloat16"), jnp.ones((3, len(weight)), jnp.bfloat16)
    y = dense.apply({"params": up}, x)
    assert y.dtype == jnp.bfloat16
    close(y, x.astype(jnp.float32) @ expected.astype(jnp.float32), 0.02)
    (gradient,) = jax.grad(lambda a: dense.apply({"params": up | {"kernel.a": a}}, x).sum().astype(jnp.float32), (0,))(
        parts["a"]
    )
    assert gradient.dtype == jnp.float32 and np.abs(gradient).min() > 0


@pytest.mark.parametrize(
    ("rank", "pattern", "message"),
    [
        (2, "nothing/here", "finds none of"),
        (2, "norm1", r"only matrices have adapters; layer.*norm1/scale is of shape"),
        (0, "query/kernel", r"rank must be 1 to 24 for .*query/kernel of shape .*got 0"),
        (25, "query/kernel", "got 25"),
    ],
)
@pytest.mark.parametrize("scan_layers", [False, True])
def test_bad_input(rank, pattern, message, scan_layers):
    _, params, _ = prepared("llama", scan_layers)
    with pytest.raises(ValueError, match=message):
        lora.init(params, rank, pattern, KEY)


def test_an_adapter_of_another_model_is_refused():
    _, params, _ = prepared("llama")
    adapter = lora.init(params, 1, "layer_1/mlp", KEY)
    params = jax.tree.map(lambda x: x, params)  # what is prepared is shared by other tests
    del params["layer_1"]["mlp"]["up"]
    for form in (lora.merge, lora.attach):
        with pytest.raises(ValueError, match="there is no 'up' among"):
            form(params, adapter, 1.0)
