"""Low-rank adapters (Hu et al., arXiv 2106.09685): W + (alpha / r) A B on chosen matrices, where only A and B are learned.

An adapter is a nested dict like the parameters, with {"a", "b"} in place of each chosen matrix. Gradients and optimizer state
are then of the adapter's size, r (in + out) numbers instead of in * out; matrices without an adapter get no gradient at all.

    adapter = lora.init(params, rank=8, pattern="attention/.*kernel", key=key)
    made, sample = estimate(model, adapter, batch, objective, merge=lambda a: lora.merge(params, a, alpha=16))
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from rl.models.language import Params

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
    out = dict(params)
    for name, part in adapter.items():
        if name not in params:
            raise ValueError(f"every adapter needs its matrix; there is no {name!r} among {sorted(params)}")
        weight = params[name]
        if isinstance(weight, dict):
            out[name] = merge(weight, part, alpha)
            continue
        product = (part["a"] @ part["b"]) * (alpha / part["a"].shape[-1])
        weight = jax.lax.stop_gradient(weight)
        out[name] = (weight.astype(product.dtype) + product).astype(weight.dtype)
    return out
