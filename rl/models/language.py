"""What a language model is to the rest of the code: a configuration and pure functions of one sequence."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels import token_logprob
from rl.types import Gather

Params = dict[str, Any]
Cache = Any
_STACK = "layers"


class LanguageModel(NamedTuple):
    """Pure functions of ONE sequence; batches come from `jax.vmap`, which leaves the weights unbatched.

    `make` returns the same object for equal configurations, so a model can be a static argument of `jax.jit`.

    Attributes:
        config: `TransformerConfig` or `RWKV7Config`, frozen, with `vocab`, `layers`, `width`, `dtype`, `scan_layers`.
        init: key -> params, a nested dict; kernels are [in, out], stacked [layers, ...] where `scan_layers`.
        empty: length -> cache of one sequence of at most so many tokens (the length means nothing to RWKV).
        forward: (params, ids [L] i32, cache=None, start=0, count=None, experts=None, segments=None, gather=None) -> (hidden
            [L, width], cache).
            ids are the tokens at positions start .. start + count - 1; entries from `count` (default L) on are padding, which
            leaves no trace in the cache and whose hidden rows mean nothing. Without a cache: a whole sequence from position
            0, the form for training and scoring, and the cache returned is None. With one: as many further tokens as given.
            A token beyond the cache's length is not stored; check lengths before.
            experts: integers [layers, L, k] force the experts of every token (mixture-of-experts models only); -1 leaves a
            token to the router, and rows of layers without experts are ignored. Ids beyond the experts: a ValueError, or NaN
            where they are not concrete.
            segments: [L] i32 packs several sequences into one row, without a cache: neighbours of equal number are one
            sequence from its position 0 on, which sees nothing of the others; numbers must not return. -1 is padding.
            gather: (name of an entry of the parameters, what it holds) -> that, put together, where devices hold parts of
            layers' parameters, entries "layers" or "layer_0", "layer_1", ...: done where a layer uses them, and again for
            its gradient. Other entries have to be whole.
        routed: as forward, -> (hidden, cache, experts [layers, L, k] i32): also which experts were used, -1 in layers without.
            None for models without experts.
        head: (params, hidden [..., width]) -> logits [..., vocab], f32 (f64 for an f64 model).
        matrix: params -> [width, vocab], the head as a matrix: logits are hidden @ matrix.
        rules: (pattern, form) for `eggroll.strategy(rules=...)`: axis letters of the stacked weights, "full" for vectors.
    """

    config: Any
    init: Callable[[jax.Array], Params]
    empty: Callable[[int], Cache]
    forward: Callable[..., tuple[jax.Array, Cache | None]]
    routed: Callable[..., tuple[jax.Array, Cache | None, jax.Array]] | None
    head: Callable[[Params, jax.Array], jax.Array]
    matrix: Callable[[Params], jax.Array]
    rules: tuple[tuple[str, str], ...]


def head_of(model: LanguageModel, params: Params) -> jax.Array | Callable[[jax.Array], jax.Array]:
    """What `token_logprob.log_prob` is given as head: the matrix where a kernel serves it, else the function."""
    config = model.config
    if token_logprob.serves(config.width, config.vocab, jnp.dtype(config.dtype)):
        return model.matrix(params)
    return functools.partial(model.head, params)


def segment_starts(segments: jax.Array) -> jax.Array:
    """bool [L], whether a token is the first of its segment."""
    return jnp.concatenate([jnp.ones(1, bool), segments[1:] != segments[:-1]])


def segment_positions(segments: jax.Array) -> jax.Array:
    """i32 [L], the place of each token inside its segment."""
    place = jnp.arange(len(segments), dtype=jnp.int32)
    return place - jax.lax.cummax(jnp.where(segment_starts(segments), place, 0))


def check_segments(ids: jax.Array, segments: jax.Array, cache: Cache | None) -> None:
    """Raises ValueError where segments are not one number per token, or come with a cache."""
    if jnp.shape(segments) != jnp.shape(ids):
        raise ValueError(f"segments must have one number per token, {jnp.shape(ids)}; got shape {jnp.shape(segments)}")
    if cache is not None:
        raise ValueError("packed rows have no cache: leave out either the cache or the segments")


def is_layer(name: str) -> bool:
    """Whether this entry of the parameters is of layers."""
    return name == _STACK or name.startswith("layer_")


def layer_class(layer: type[nn.Module], config: Any, gather: Gather | None, name: str = _STACK) -> type[nn.Module]:
    """A layer's module, whose gradient makes again what the configuration says, and the parameters that `gather` puts together.

    Args:
        config: with `remat` and `scan_layers`.
        gather: see `LanguageModel.forward`.
        name: of the layer's entry in the parameters.
    """
    if gather is not None:
        together = lambda variables: variables | {"params": gather(name, variables["params"])}
        layer = nn.map_variables(layer, "params", trans_in_fn=together)
    elif not config.remat:
        return layer
    return nn.remat(layer, prevent_cse=not config.scan_layers, policy=None if config.remat else _but_for_gathered)


def _but_for_gathered(primitive, *args, **params) -> bool:
    # where what is gathered does not learn, the gathering is still the call of a function with a derivative of its own
    return primitive.name not in ("all_gather", "custom_vjp_call")


def stack_layers(params: Params) -> Params:
    """Parameters with "layer_0", "layer_1", ... -> one "layers" whose arrays have a leading axis over layers.

    Raises:
        ValueError: layers that differ in structure, or none.
    """
    names = layer_names(params)
    if not names:
        raise ValueError(f"parameters to stack must have layers; there is no 'layer_0' among {sorted(params)}")
    trees = [jax.tree.structure(params[name]) for name in names]
    if any(tree != trees[0] for tree in trees):
        odd = next(name for name, tree in zip(names, trees, strict=True) if tree != trees[0])
        raise ValueError(f"layers must have the same parameters to be stacked; {odd} differs from {names[0]}")
    rest = {name: value for name, value in params.items() if name not in names}
    return rest | {_STACK: jax.tree.map(lambda *xs: jnp.stack(xs), *(params[name] for name in names))}


def unstack_layers(params: Params) -> Params:
    """The inverse of `stack_layers`; parameters without a "layers" entry are returned as they are."""
    if _STACK not in params:
        return params
    count = jax.tree.leaves(params[_STACK])[0].shape[0]
    rest = {name: value for name, value in params.items() if name != _STACK}
    return rest | {f"layer_{i}": jax.tree.map(lambda x, i=i: x[i], params[_STACK]) for i in range(count)}


def layer_names(params: Params) -> list[str]:
    """The names of unstacked layers, in order."""
    return sorted((name for name in params if name.startswith("layer_")), key=lambda name: int(name.split("_")[1]))


def stacked_rules(params: Params, forms: dict[str, str]) -> tuple[tuple[str, str], ...]:
    """An eggroll rule for every leaf that is not a plain matrix.

    Args:
        params: of the model, arrays or shapes.
        forms: last key of a path -> axis letters of one layer's weight; other leaves are "io" where they are matrices of one
            layer, else "full".
    """
    rules: dict[str, str] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        keys = [key.key for key in path]
        lead = int(keys[0] == _STACK)
        form = forms.get(keys[-1], "io" if len(leaf.shape) - lead == 2 else "full")
        form = form if form == "full" else "s" * lead + form
        if (len(leaf.shape), form) in ((2, "io"), (1, "full")):
            continue  # what eggroll does without a rule
        rules["(^|/)" + "/".join(keys) + "$"] = form
    return tuple(rules.items())
