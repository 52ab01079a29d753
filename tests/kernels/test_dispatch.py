"""The switch between implementations."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import kernels
from kernels import dispatch, lowrank_matmul

ALL = {"pallas_tpu": lambda: "", "pallas_gpu": lambda: "rows must be even"}


@pytest.fixture(autouse=True)
def restored():
    yield
    kernels.use("auto")


def test_auto_on_a_cpu_is_the_reference_and_is_logged_once(caplog):
    with caplog.at_level(logging.INFO, "kernels"):
        for _ in range(2):
            assert dispatch.choose("op", "of this test", ALL) == "reference"
    assert [r.getMessage() for r in caplog.records] == ["op of of this test runs as reference: no kernels for cpu"]


def test_a_named_kernel_or_a_reason():
    with pytest.raises(ValueError, match="op of a shape cannot run as 'pallas_tpu': the device is cpu"):
        dispatch.choose("op", "a shape", ALL, "pallas_tpu")
    with dispatch.mode("interpret"):
        assert dispatch.choose("op", "a shape", ALL, "pallas_tpu") == "pallas_tpu"
        with pytest.raises(ValueError, match="'pallas_gpu': rows must be even; use implementation='auto'"):
            dispatch.choose("op", "a shape", ALL, "pallas_gpu")
        with pytest.raises(ValueError, match="it has no such kernel .it has pallas_tpu"):
            dispatch.choose("op", "a shape", {"pallas_tpu": lambda: ""}, "pallas_gpu")
    with dispatch.mode("lower"):
        assert dispatch.choose("op", "a shape", ALL, "pallas_tpu") == "pallas_tpu"
    assert not dispatch.interpreted()


def test_what_is_set_is_part_of_what_a_trace_is_remembered_by():
    args = jnp.ones((2, 1, 8)), jnp.ones((8, 8)), jnp.ones((2, 1, 8)), jnp.ones((2, 1, 8)), jnp.ones(2)
    fn = jax.jit(lambda *args: lowrank_matmul.matmul(*args, implementation="pallas_tpu"))
    with dispatch.mode("interpret"):
        fn(*args)
        with dispatch.refused("a mesh"), pytest.raises(kernels.KernelError, match="a mesh"):
            fn(*args)
        fn(*args)
    with pytest.raises(kernels.KernelError, match="the device is cpu"):
        fn(*args)


def test_several_devices_are_left_to_the_compiler(monkeypatch):
    monkeypatch.setattr(dispatch, "_platform", lambda: "tpu")
    monkeypatch.setattr(dispatch, "_device", lambda name, backend: "")
    mesh = Mesh(np.array(jax.devices()), ("d",))
    found = []

    def inside(x):
        found.append(dispatch.choose("op", "inside", ALL))
        return x

    jax.eval_shape(
        jax.shard_map(inside, mesh=mesh, in_specs=PartitionSpec("d"), out_specs=PartitionSpec("d")), jnp.ones(8)
    )
    assert found == ["pallas_tpu"]
    assert dispatch.choose("op", "outside", ALL) == "reference"


@pytest.mark.parametrize("call", [kernels.use, lambda name: dispatch.choose("op", "a shape", ALL, name)])
def test_unknown_names(call):
    with pytest.raises(
        ValueError, match="implementation is one of auto, reference, pallas_tpu, pallas_gpu; got 'triton'"
    ):
        call("triton")
    with pytest.raises(ValueError, match="mode is one of"), dispatch.mode("fast"):
        pass


def test_the_process_wide_switch_reaches_compiled_functions():
    args = jnp.ones((2, 1, 8)), jnp.ones((8, 8)), jnp.ones((2, 1, 8)), jnp.ones((2, 1, 8)), jnp.ones(2)
    fn = jax.jit(lowrank_matmul.matmul)
    np.testing.assert_array_equal(fn(*args), 16)
    kernels.use("pallas_tpu")
    with pytest.raises(ValueError, match="the device is cpu"):
        fn(*args)
    with dispatch.mode("interpret"):
        np.testing.assert_array_equal(fn(*args), 16)
    kernels.use("reference")
    assert "custom_call" not in fn.lower(*args).as_text()
