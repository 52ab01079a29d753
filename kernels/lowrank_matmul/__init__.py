"""The product of a population's activations with a weight that every member perturbs by factors of its own."""

from kernels.lowrank_matmul.api import contract, matmul, passed, serves

__all__ = ["contract", "matmul", "passed", "serves"]
