"""Low-rank adapters (Hu et al., arXiv 2106.09685): W + (alpha / r) A B on chosen matrices, where only A and B are learned.

An adapter is a nested dict like the parameters, with {"a", "b"} in place of each chosen matrix. Gradients and optimizer state
are then of the adapter's size, r (in + out) numbers instead of in * out; matrices without an adapter get no gradient at all.

    adapter = lora.init(params, rank=8, pattern="attention/.*kernel", key=key)
    attach = functools.partial(lora.attach, alpha=16)
    made, sample = estimate(model, adapter, batch, objective, base=params, merge=attach)

Attached to a layer's kernel, an adapter is a product of its own, x W + (alpha / r) (x A) B. The gradient of A and B then needs
neither one of W, a third of the products with weights, nor a second copy of the weights. To sample, and to save, adapters are
merged into the weights instead.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from rl.models.dense import FACTORS, KERNEL
from rl.models.language import Params, is_layer

Adapter = dict[str, Any]


def init(params: Params, rank: int, pattern: str, key: Array) -> Adapter:
    """A ~ N(0, 1 / in) and B = 0, so that the merged model is the given one, exactly.

    Args:
        params: nested dict; matrices are [..., in, out], leading axes (stacked layers, experts) have an adapter each.
        rank: r.
        pattern: regular expression, looked for in paths such as "layer_0/attention/query/kernel"; every matrix in whose path
            it is found gets an adapter.
        key: of A.

    Returns:
        f32 (f64 for f64 matrices) whatever the parameters are: bf16 would lose small steps.

    Raises:
        ValueError: the pattern finds nothing or finds something that is no matrix, or the rank is below 1 or above a side.
    """
    found: list[tuple[list[str], Array]] = []
    names: list[str] = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        keys = [key.key for key in path]
        names.append("/".join(keys))
        if re.search(pattern, names[-1]):
            found.append((keys, leaf))
    if not found:
        raise ValueError(f"the pattern must find a parameter; {pattern!r} finds none of {names}")
    adapter: Adapter = {}
    for i, (keys, leaf) in enumerate(found):
        if leaf.ndim - (keys[0] == "layers") < 2:
            raise ValueError(
                f"only matrices have adapters; {'/'.join(keys)} is of shape {leaf.shape}: narrow {pattern!r}"
            )
        *lead, rows, columns = leaf.shape
        if not 1 <= rank <= min(rows, columns):
            raise ValueError(
                f"rank must be 1 to {min(rows, columns)} for {'/'.join(keys)} of shape {leaf.shape}; got {rank}"
            )
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        a = jax.random.normal(jax.random.fold_in(key, i), (*lead, rows, rank), dtype) * rows**-0.5
        place = adapter
        for name in keys[:-1]:
            place = place.setdefault(name, {})
        place[keys[-1]] = {"a": a, "b": jnp.zeros((*lead, rank, columns), dtype)}
    return adapter


def merge(params: Params, adapter: Adapter, alpha: float) -> Params:
    """The model's parameters, W + (alpha / r) A B where there is an adapter; the sum is formed in f32 at least.

    No gradient goes to `params`.

    Args:
        params: as given to `init`.
        adapter: from it.
        alpha: scale; alpha = r adds A B itself.

    Raises:
        ValueError: an adapter of something the parameters do not have.
    """
    return _with(params, adapter, alpha, lambda path: False)


def attach(params: Params, adapter: Adapter, alpha: float) -> Params:
    """The model's parameters with the factors beside the kernels of layers, where `rl.models.dense.Dense` finds them.

    Other matrices (embedding, head, experts, RWKV-7's own low-rank maps) are merged. The model's functions take either form.
    A gradient goes to `params`, too: differentiate with respect to the adapter.

    Args, raises: as `merge`.
    """
    return _with(params, adapter, alpha, lambda path: is_layer(path[0]) and path[-1] == KERNEL)


def _with(params: Params, adapter: Adapter, alpha: float, beside: Callable[[tuple[str, ...]], bool], path=()) -> Params:
    out = dict(params)
    for name, part in adapter.items():
        if name not in params:
            raise ValueError(f"every adapter needs its matrix; there is no {name!r} among {sorted(params)}")
        weight, here = params[name], (*path, name)
        if isinstance(weight, dict):
            out[name] = _with(weight, part, alpha, beside, here)
            continue
        scale = alpha / part["a"].shape[-1]
        if beside(here):
            out |= {FACTORS[0]: part["a"], FACTORS[1]: part["b"] * scale}
            continue
        product = (part["a"] @ part["b"]) * scale
        weight = jax.lax.stop_gradient(weight)
        out[name] = (weight.astype(product.dtype) + product).astype(weight.dtype)
    return out
