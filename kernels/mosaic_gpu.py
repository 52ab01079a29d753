"""Mosaic GPU kernels of this package: started here, on a Hopper GPU or in the interpreter."""

from collections.abc import Callable
from typing import Any

from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import dispatch

SWIZZLE = 128  # bytes


def kernel(body: Callable, **settings: Any) -> Callable:
    """`plgpu.kernel`, interpreted where `dispatch.mode` says so. Accumulators need a `pl.run_scoped` of their own inside."""
    if dispatch.interpreted():
        # private: the interpreter has no public name yet, and it accepts some things that lowering rejects
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

        settings["interpret"] = InterpretGPUParams()
    return plgpu.kernel(body, **settings)


def tiled(dtype) -> tuple:
    """Transforms of a matrix in shared memory as the tensor cores read it: columns a multiple of 128 bytes."""
    return (plgpu.TilingTransform((8, SWIZZLE // dtype.itemsize)), plgpu.SwizzleTransform(SWIZZLE))


def load(ref, layout) -> Array:
    """All of a reference, into registers of this layout, which the interpreter does not know of."""
    return ref[...] if dispatch.interpreted() else plgpu.load(ref, (), layout=layout)


def iota(dtype, shape: tuple[int, ...], dimension: int, layout) -> Array:
    """`lax.broadcasted_iota` in registers of this layout."""
    if dispatch.interpreted():
        return lax.broadcasted_iota(dtype, shape, dimension)
    return plgpu.broadcasted_iota(dtype, shape, dimension, layout=layout)
