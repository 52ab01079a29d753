"""The low-rank correction of a product: x contracted with one factor, then spread by the other."""

from kernels.lowrank_matmul.api import contract

__all__ = ["contract"]
