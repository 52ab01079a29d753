"""Rules for operations that move, cut, scale or join weights: each acts on the base and on the factors by themselves."""

import dataclasses
import math

import jax.numpy as jnp
from jax import Array, lax

from eggroll.perturb.interpreter import is_weight
from eggroll.perturb.weight import LowRank


def _transpose(eqn, w):
    permutation = eqn.params["permutation"]
    return w.map(lambda x, extra: lax.transpose(x, (*permutation, *range(w.ndim, w.ndim + extra))))


def _base_only(eqn, w):
    return dataclasses.replace(w, base=eqn.primitive.bind(w.base, **eqn.params))


def _squeeze(eqn, w):
    return w.map(lambda x, _: lax.squeeze(x, eqn.params["dimensions"]))


def _broadcast_in_dim(eqn, w, *dynamic):
    shape, dims = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    if dynamic:
        return NotImplemented
    inner = [1] * len(shape)

    def spread(factor):
        sizes = list(inner)
        for axis, n in zip(dims, factor.shape[:-1], strict=True):
            sizes[axis] = n
        return factor.reshape(*sizes, factor.shape[-1])

    base = lax.broadcast_in_dim(w.base, shape, dims)
    return dataclasses.replace(w, base=base, left=spread(w.left), right=spread(w.right))


def _reshape(eqn, w):
    groups = segments(w.shape, eqn.params["new_sizes"])
    if groups is None or eqn.params["dimensions"] is not None:
        return NotImplemented
    sizes = [_reshaped(factor, groups) for factor in (w.left, w.right)]
    if None in sizes:
        return NotImplemented
    left, right = (f.reshape(*size, w.rank) for f, size in zip((w.left, w.right), sizes, strict=True))
    return dataclasses.replace(w, base=lax.reshape(w.base, eqn.params["new_sizes"]), left=left, right=right)


def segments(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]] | None:
    """Pairs (old axes, new sizes) of equal product, as fine as possible; None for empty arrays."""
    if 0 in old:
        return None
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        axes, sizes = ([i], []) if i < len(old) else ([], [new[j]])
        i, j = i + len(axes), j + len(sizes)
        if axes and j < len(new):
            sizes.append(new[j])
            j += 1
        while math.prod(old[a] for a in axes) != math.prod(sizes):
            if math.prod(old[a] for a in axes) < math.prod(sizes):
                axes.append(i)
                i += 1
            else:
                sizes.append(new[j])
                j += 1
        groups.append((axes, sizes))
    return groups


def _reshaped(factor: Array, groups) -> list[int] | None:
    """The factor's new sizes, or None where a merged axis would be only half present in it."""
    sizes: list[int] = []
    for axes, new in groups:
        present = math.prod(factor.shape[a] for a in axes)
        if present == math.prod(new):
            sizes += new
        elif present == 1:
            sizes += [1] * len(new)
        else:
            return None
    return sizes


def _slice(eqn, w):
    p = eqn.params
    strides = p["strides"] or (1,) * len(w.shape)
    cut = list(zip(p["start_indices"], p["limit_indices"], strides, strict=True))

    def sliced(x, extra):
        here = [c if x.shape[a] == w.shape[a] else (0, 1, 1) for a, c in enumerate(cut)] + [(0, w.rank, 1)] * extra
        return lax.slice(x, *zip(*here, strict=True))

    return w.map(sliced)


def _dynamic_slice(eqn, w, *starts):
    sizes = eqn.params["slice_sizes"]
    if not is_weight(w):
        return NotImplemented

    def sliced(x, extra):
        full = [x.shape[a] == w.shape[a] for a in range(w.ndim)]
        at = [s if f else jnp.zeros_like(s) for s, f in zip(starts, full, strict=True)] + [
            jnp.zeros_like(starts[0])
        ] * extra
        return lax.dynamic_slice(x, at, [n if f else 1 for n, f in zip(sizes, full, strict=True)] + [w.rank] * extra)

    return w.map(sliced)


def _rev(eqn, w):
    return w.map(lambda x, _: lax.rev(x, [a for a in eqn.params["dimensions"] if x.shape[a] > 1]))


def _split(eqn, w):
    axis, sizes = eqn.params["axis"], eqn.params["sizes"]
    cut = lambda x: lax.split(x, sizes, axis) if x.shape[axis] == w.shape[axis] else [x] * len(sizes)
    parts = zip(cut(w.base), cut(w.left), cut(w.right), strict=True)
    return [dataclasses.replace(w, base=b, left=lo, right=r) for b, lo, r in parts]


def _pad(eqn, w, value):
    config = eqn.params["padding_config"]
    if not is_weight(w) or is_weight(value):
        return NotImplemented
    changed = [a for a, c in enumerate(config) if c != (0, 0, 0)]
    if any(w.left.shape[a] != w.shape[a] and w.right.shape[a] != w.shape[a] for a in changed):
        return NotImplemented

    def padded(factor):
        mine = [c if factor.shape[a] == w.shape[a] else (0, 0, 0) for a, c in enumerate(config)]
        return lax.pad(factor, jnp.zeros((), factor.dtype), [*mine, (0, 0, 0)])

    return dataclasses.replace(w, base=lax.pad(w.base, value, config), left=padded(w.left), right=padded(w.right))


def _scaled(w: LowRank, x: Array, bind) -> LowRank:
    """w * x or w / x for an x that varies only along axes of one factor."""
    thin = x.shape if x.ndim else (1,) * w.ndim
    if len(thin) != w.ndim or any(n not in (1, m) for n, m in zip(thin, w.shape, strict=True)):
        return NotImplemented
    base = bind(w.base, x)
    varies = [a for a, n in enumerate(thin) if n > 1]
    for name in ("left", "right"):
        factor = getattr(w, name)
        if all(factor.shape[a] == w.shape[a] for a in varies):
            return dataclasses.replace(w, base=base, **{name: bind(factor, x.reshape(*thin, 1).astype(factor.dtype))})
    return NotImplemented


def _mul(eqn, a, b):
    if is_weight(a) and is_weight(b):
        return NotImplemented
    return _scaled(a, b, lambda y, x: y * x) if is_weight(a) else _scaled(b, a, lambda y, x: x * y)


def _div(eqn, a, b):
    return NotImplemented if is_weight(b) else _scaled(a, b, lambda y, x: y / x)


def _neg(eqn, w):
    return dataclasses.replace(w, base=-w.base, scale=-w.scale)


def _add(eqn, a, b):
    return _sum(eqn, a, b, 1)


def _sub(eqn, a, b):
    return _sum(eqn, a, b, -1)


def _sum(eqn, a, b, sign: int):
    base = eqn.primitive.bind(*(x.base if is_weight(x) else x for x in (a, b)), **eqn.params)
    terms = [w for w in (a, b) if is_weight(w)]
    if any(w.shape != base.shape for w in terms):
        return NotImplemented
    if is_weight(b):
        terms[-1] = dataclasses.replace(b, scale=sign * b.scale)
    if len(terms) == 1:
        plain = a if is_weight(b) else b
        return dataclasses.replace(terms[0], base=base, activation=terms[0].activation or plain.ndim > 0)
    if terms[0].left.shape[:-1] != terms[1].left.shape[:-1] or terms[0].right.shape[:-1] != terms[1].right.shape[:-1]:
        return NotImplemented
    return _joined_ranks(terms, base, [w.left for w in terms], [w.right for w in terms])


def _joined_ranks(terms: list[LowRank], base: Array, lefts: list[Array], rights: list[Array]) -> LowRank:
    """The sum of several perturbations of one shape as one of the summed rank; each scale goes into its left factor."""
    left = jnp.concatenate([w.scale * f for w, f in zip(terms, lefts, strict=True)], axis=-1)
    right = jnp.concatenate(rights, axis=-1)
    path = " + ".join(dict.fromkeys(w.path for w in terms))
    activation = any(w.activation for w in terms)
    return LowRank(base, left, right, jnp.ones((), left.dtype), path=path, activation=activation)


def _concatenate(eqn, *parts):
    axis = eqn.params["dimension"]
    base = lax.concatenate([p.base if is_weight(p) else p for p in parts], axis)
    terms = [p for p in parts if is_weight(p)]
    full = {side: [getattr(w, side).shape[axis] == w.shape[axis] for w in terms] for side in ("left", "right")}
    side = next((s for s in ("left", "right") if all(full[s])), None)
    other = "right" if side == "left" else "left"
    if side is None or (any(full[other]) and not all(full[other])):
        return NotImplemented
    offsets, start = [], 0
    for p in parts:
        n = p.shape[axis]
        if is_weight(p):
            offsets.append((start, base.shape[axis] - start - n, 0))
        start += n

    def placed(factor, offset):
        config = [(0, 0, 0)] * factor.ndim
        config[axis] = offset
        return lax.pad(factor, jnp.zeros((), factor.dtype), config)

    factors = {side: [placed(getattr(w, side), o) for w, o in zip(terms, offsets, strict=True)]}
    keep = [getattr(w, other) for w in terms]
    factors[other] = [placed(f, o) for f, o in zip(keep, offsets, strict=True)] if all(full[other]) else keep
    if len({f.shape[:-1] for f in factors["left"]}) > 1 or len({f.shape[:-1] for f in factors["right"]}) > 1:
        return NotImplemented
    return _joined_ranks(terms, base, factors["left"], factors["right"])


def _reduce_sum(eqn, w):
    axes = eqn.params["axes"]
    shared = [a for a in axes if w.left.shape[a] > 1 and w.right.shape[a] > 1]
    if shared:
        return NotImplemented
    times = math.prod(w.shape[a] for a in axes if w.left.shape[a] == 1 and w.right.shape[a] == 1)
    reduced = w.map(lambda x, _: jnp.sum(x, axis=axes))
    return dataclasses.replace(reduced, scale=w.scale * times)


RULES = {
    "add": _add,
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": _concatenate,
    "convert_element_type": _base_only,
    "copy": _base_only,
    "copy_p": _base_only,
    "div": _div,
    "dynamic_slice": _dynamic_slice,
    "mul": _mul,
    "name": _base_only,
    "neg": _neg,
    "pad": _pad,
    "reduce_precision": _base_only,
    "reduce_sum": _reduce_sum,
    "reshape": _reshape,
    "rev": _rev,
    "sharding_constraint": _base_only,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "stop_gradient": _base_only,
    "sub": _sub,
    "transpose": _transpose,
}
