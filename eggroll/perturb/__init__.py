"""Runs any JAX function with low-rank perturbed weights, without forming a perturbation and without changing the function."""

from eggroll.perturb.infer import infer_rules
from eggroll.perturb.interpreter import Interpreter, PerturbationError
from eggroll.perturb.products import RULES as _PRODUCTS
from eggroll.perturb.structural import RULES as _STRUCTURAL
from eggroll.perturb.weight import LowRank

__all__ = ["RULES", "Interpreter", "LowRank", "PerturbationError", "call", "infer_rules"]

RULES = _STRUCTURAL | _PRODUCTS


def call(fn, *args, materialise: bool = False):
    """fn(*args) where leaves of args may be `LowRank` weights; every other use of them runs as written.

    Args:
        fn: any JAX function of pytrees.
        materialise: form the perturbation of a weight that reaches an operation without a rule, instead of an error.

    Raises:
        PerturbationError: naming leaf and operation.
    """
    return Interpreter(RULES, materialise).call(fn, *args)
