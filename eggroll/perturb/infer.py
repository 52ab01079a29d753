"""Reads off a function how each axis of each parameter is used: input, output or stack."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
from jax import Array

from eggroll.perturb.interpreter import Interpreter, Weight, is_weight
from eggroll.perturb.structural import segments

_Origin = frozenset[tuple[str, int]]  # (parameter path, axis) pairs that an axis of a value came from
_INDEXED = "g"  # picked by an index: a stack if the rest is a matrix, an input axis (an embedding) if not


class _Labels(dict):
    """(path, axis) -> letter; the first use decides, except that any use beats being indexed. Compared by identity."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__

    def note(self, origin: _Origin, letter: str) -> None:
        for place in origin:
            if self.get(place, _INDEXED) == _INDEXED:
                self[place] = letter


@functools.partial(jax.tree_util.register_dataclass, data_fields=("base",), meta_fields=("path", "origins", "labels"))
@dataclasses.dataclass(frozen=True)
class _Probe(Weight):
    """A parameter on its way through the function, remembering where each of its axes came from."""

    base: Array
    path: str
    origins: tuple[_Origin, ...]
    labels: _Labels

    @property
    def ndim(self) -> int:
        return self.base.ndim

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def resolvable(self) -> bool:
        return True

    def resolve(self) -> Array:
        return self.base

    def leading(self):
        self.labels.note(self.origins[0], "s")
        return self.base, lambda row: dataclasses.replace(self, base=row, origins=self.origins[1:])


def infer_rules(fn, params, *args) -> tuple[tuple[str, str], ...]:
    """Rules that give every matrix-like parameter of fn(params, *args) its axis letters; nothing is computed.

    An axis is an input (i) where a product contracts it, an output (o) where it survives, a stack (s) where it is scanned
    over, batched or picked by an index; the indexed axis of an embedding counts as an input. A parameter without both an i
    and an o (a bias, a norm scale, stacked or not) gets "full". Where a parameter is used twice, as a tied head is, the
    first use decides.

    Args:
        fn: a JAX function, for example the score.
        params: pytree of arrays (or shapes).
        args: further arguments of fn, arrays or shapes.

    Returns:
        (pattern, form) pairs for `eggroll.strategy(rules=...)`, one per floating-point parameter. Put rules of your own before
        them.
    """
    from eggroll.noise import path_name

    labels = _Labels()
    shapes: dict[str, tuple[int, ...]] = {}

    def probe(path, x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        name = path_name(path)
        shapes[name] = x.shape
        return _Probe(x, name, tuple(frozenset({(name, a)}) for a in range(x.ndim)), labels)

    def traced(params, *args):
        return Interpreter(_RULES).call(fn, jax.tree_util.tree_map_with_path(probe, params), *args)

    jax.eval_shape(traced, params, *args)
    return tuple((f"^{re.escape(name)}$", _form(name, shape, labels)) for name, shape in shapes.items())


def _form(name: str, shape: tuple[int, ...], labels: _Labels) -> str:
    letters = [labels.get((name, a), "") for a in range(len(shape))]
    if len(shape) > 1 and "i" in letters and "o" in letters:
        return "".join(letter if letter in ("i", "o") else "s" for letter in letters)
    if len(shape) > 1 and _INDEXED in letters and "" in letters and "s" not in letters:
        return "".join("i" if letter == _INDEXED else "o" for letter in letters)
    return "full"


def _moved(fn):
    """A rule that runs the primitive on the base and computes the new origins."""

    def rule(eqn, *inputs):
        bases = [x.base if is_weight(x) else x for x in inputs]
        base = eqn.primitive.bind(*bases, **eqn.params)
        w = next(x for x in inputs if is_weight(x))
        origins = fn(eqn, w)
        if origins is NotImplemented:
            return NotImplemented
        if eqn.primitive.multiple_results:
            return [dataclasses.replace(w, base=b, origins=origins) for b in base]
        return dataclasses.replace(w, base=base, origins=origins)

    return rule


def _kept(eqn, w):
    return w.origins if w.shape == eqn.outvars[0].aval.shape else NotImplemented


def _cut(eqn, w):
    return w.origins


def _transposed(eqn, w):
    return tuple(w.origins[a] for a in eqn.params["permutation"])


def _squeezed(eqn, w):
    return tuple(o for a, o in enumerate(w.origins) if a not in eqn.params["dimensions"])


def _summed(eqn, w):
    return tuple(o for a, o in enumerate(w.origins) if a not in eqn.params["axes"])


def _broadcast(eqn, w):
    origins = [frozenset()] * len(eqn.params["shape"])
    for axis, origin in zip(eqn.params["broadcast_dimensions"], w.origins, strict=True):
        origins[axis] = origin
    return tuple(origins)


def _reshaped(eqn, w):
    origins: list[_Origin] = []
    for axes, sizes in segments(w.shape, eqn.params["new_sizes"]) or ():
        whole = [a for a in axes if w.shape[a] > 1 or math.prod(sizes) == 1]
        whole_origin = frozenset().union(*(w.origins[a] for a in whole))
        origins += [whole_origin if n > 1 or math.prod(sizes) == 1 else frozenset() for n in sizes]
    return tuple(origins)


def _joined(eqn, *parts):
    """Several weights, or a weight and arrays, as one: each axis comes from wherever the parts' axes came from.

    A weight with an axis of its own making (a bias shaped for a batch) joins an array as an addend or factor of activations.
    """
    base = eqn.primitive.bind(*(p.base if is_weight(p) else p for p in parts), **eqn.params)
    weights = [p for p in parts if is_weight(p)]
    if any(w.ndim != base.ndim for w in weights):
        return NotImplemented
    if len(weights) < len(parts) and not all(origin for w in weights for origin in w.origins):
        return base
    origins = tuple(frozenset().union(*together) for together in zip(*(w.origins for w in weights), strict=True))
    return dataclasses.replace(weights[0], base=base, origins=origins)


def _dot_general(eqn, *operands):
    contract, batch = eqn.params["dimension_numbers"]
    for x, contracted, batched in zip(operands, contract, batch, strict=True):
        for a in range(x.ndim) if is_weight(x) else ():
            x.labels.note(x.origins[a], "i" if a in contracted else "s" if a in batched else "o")
    return eqn.primitive.bind(*(x.base if is_weight(x) else x for x in operands), **eqn.params)


def _conv(eqn, lhs, rhs):
    if is_weight(lhs):
        return NotImplemented
    for a, origin in enumerate(rhs.origins):
        rhs.labels.note(origin, "o" if a == eqn.params["dimension_numbers"].rhs_spec[0] else "i")
    return eqn.primitive.bind(lhs, rhs.base, **eqn.params)


def _gather(eqn, operand, indices):
    if not is_weight(operand):
        return NotImplemented
    dims = eqn.params["dimension_numbers"]
    for a in dims.start_index_map:
        if eqn.params["slice_sizes"][a] == 1:
            operand.labels.note(operand.origins[a], _INDEXED)
    base = eqn.primitive.bind(operand.base, indices, **eqn.params)
    if (
        sum(n > 1 for n in eqn.params["slice_sizes"]) < 2
    ):  # vectors: an embedding's rows, on their way to be activations
        return base
    gone = (*dims.collapsed_slice_dims, *dims.operand_batching_dims)
    window = [o for a, o in enumerate(operand.origins) if a not in gone]
    origins = [frozenset()] * base.ndim
    for axis, origin in zip(dims.offset_dims, window, strict=True):
        origins[axis] = origin
    return dataclasses.replace(operand, base=base, origins=tuple(origins))


def _dynamic_slice(eqn, w, *starts):
    if not is_weight(w):
        return NotImplemented
    for a, n in enumerate(eqn.params["slice_sizes"]):
        if n == 1 < w.shape[a]:
            w.labels.note(w.origins[a], _INDEXED)
    return dataclasses.replace(w, base=eqn.primitive.bind(w.base, *starts, **eqn.params))


_RULES = {
    **dict.fromkeys(
        (
            "convert_element_type",
            "copy",
            "copy_p",
            "name",
            "neg",
            "reduce_precision",
            "sharding_constraint",
            "stop_gradient",
        ),
        _moved(_kept),
    ),
    **dict.fromkeys(("rev", "slice", "split", "pad"), _moved(_cut)),
    **dict.fromkeys(("add", "sub", "mul", "div", "concatenate"), _joined),
    "broadcast_in_dim": _moved(_broadcast),
    "conv_general_dilated": _conv,
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "reduce_sum": _moved(_summed),
    "reshape": _moved(_reshaped),
    "squeeze": _moved(_squeezed),
    "transpose": _moved(_transposed),
}
