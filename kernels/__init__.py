"""Operations with a reference in plain JAX and, where it pays, a kernel; one folder per operation.

`kernels/<op>/api.py` is what callers import, `kernels/<op>/reference.py` is the plain-JAX twin: the default wherever no
faster path exists, and the oracle of every test.
"""

from kernels.dispatch import KernelError, use

__all__ = ["KernelError", "use"]
