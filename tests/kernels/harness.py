"""What the tests of all kernels share: run one where this machine can, lower it for where it cannot."""

import jax
import pytest

from kernels import dispatch

KERNELS = ("pallas_tpu", "pallas_gpu")
_PLATFORM = {"pallas_tpu": "tpu", "pallas_gpu": "cuda"}
_CALL = {"pallas_tpu": "tpu_custom_call", "pallas_gpu": "mosaic_gpu"}


def run(kernel: str, fn, *args):
    """fn(*args) with this kernel: on the device it is written for, else interpreted on a CPU."""
    backend = jax.default_backend()
    if backend == "cpu":
        with dispatch.mode("interpret"):
            return jax.block_until_ready(fn(*args))
    if backend != _PLATFORM[kernel].replace("cuda", "gpu"):
        pytest.skip(f"{kernel} on {backend}: neither its device nor a CPU")
    return jax.block_until_ready(fn(*args))


def lowered(kernel: str, fn, *shapes) -> str:
    """The program of jit(fn) for this kernel's platform, which contains the kernel."""
    with dispatch.mode("lower"):
        module = jax.export.export(jax.jit(fn), platforms=[_PLATFORM[kernel]])(*shapes).mlir_module()
    assert _CALL[kernel] in module
    return module
