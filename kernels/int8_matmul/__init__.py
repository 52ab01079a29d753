"""The product of int8 activations with an int8 weight perturbed by a rank-1 term of each member of a population."""

from kernels.int8_matmul.api import matmul

__all__ = ["matmul"]
