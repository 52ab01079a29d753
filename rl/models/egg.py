"""EGG: a recurrent language model over bytes, made for integers; its only nonlinearities are saturation and a gate.

The model is written once. `arithmetic` is what its operations are: `eggroll.integer.arithmetic`, in int8, or
`rl.models.egg_float`, the same in floating point, for which everything below holds with exact division. Source: Sarkar et al.,
"Evolution Strategies at the Hyperscale", arXiv 2511.16652, section 6.1 and appendices G to I.

    x = embed[token]
    per layer: x = x + recurrent(norm(x)), x = x + down(up(norm(x)))
    logits = head(norm(x))
"""

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from eggroll.integer import arithmetic as integers

VOCAB = 256
_MATRIX_SPREAD = 16  # of initial matrices: 1.0
_LARGEST_PRODUCT = 1040  # inputs whose sums are sure to fit int32, with any shift


@dataclasses.dataclass(frozen=True)
class EggConfig:
    """Sizes.

    Attributes:
        layers: L.
        width: D; powers of 4 make every division a shift.
        expansion: the hidden layer of a block is this times D wide.
        faithful: divide by the root rounded down, as the released code does where D is no power of 4.

    Raises:
        ValueError: sizes below 1, or so wide that a sum could overflow int32.
    """

    layers: int = 6
    width: int = 256
    expansion: int = 4
    faithful: bool = False

    def __post_init__(self):
        for name in ("layers", "width", "expansion"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number of at least 1; got {getattr(self, name)!r}")
        if self.width * self.expansion > _LARGEST_PRODUCT:
            raise ValueError(
                f"int32 sums hold products over at most {_LARGEST_PRODUCT} inputs of int8; width {self.width} times expansion "
                f"{self.expansion} is {self.width * self.expansion}: use a smaller width or expansion"
            )


def init(config: EggConfig, key: Array) -> dict[str, Any]:
    """int8 parameters: matrices round(16 normal), norms 16, biases 0.

    Their number is 513 D + L (4 D + (4 + 2 expansion) D^2).
    """
    d, hidden = config.width, config.expansion * config.width
    shapes = {"embed": (VOCAB, d), "head": (VOCAB, d), "norm": (d,)}
    recurrent = dict.fromkeys(("Wf", "Uf", "Wh", "Uh"), (d, d)) | {"bf": (d,), "bh": (d,)}
    block = {"norm_1": (d,), "recurrent": recurrent, "norm_2": (d,), "up": (hidden, d), "down": (d, hidden)}
    shapes |= {f"block_{i}": block for i in range(config.layers)}
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes, is_leaf=lambda x: isinstance(x, tuple))

    def leaf(number, path, shape):
        if len(shape) == 1:
            return jnp.full(shape, integers.ONE * ("norm" in path[-1].key), jnp.int8)
        normal = jax.random.normal(jax.random.fold_in(key, number), shape)
        return integers.clip(jnp.round(_MATRIX_SPREAD * normal))

    return jax.tree.unflatten(tree, [leaf(i, *x) for i, x in enumerate(leaves)])


def state(config: EggConfig, rows: int, dtype=jnp.int8) -> Array:
    """What rows remember before their first byte: zeros [rows, L, D]."""
    return jnp.zeros((rows, config.layers, config.width), dtype)


def stack(weights: Any) -> Any:
    """Weights whose blocks are one, "blocks", with a leading axis L, for a loop over layers.

    Written out, the layers of integers are one chain of cheap operations, which XLA for CPUs computes anew in every place that
    reads from it: time then grows with the square of L. (Those of floats are not, and are quicker written out.)
    """
    blocks = [weights[f"block_{i}"] for i in range(sum(name.startswith("block_") for name in weights))]
    rest = {name: weights[name] for name in ("embed", "head", "norm")}
    return rest | {"blocks": jax.tree.map(lambda *xs: jnp.stack(xs), *blocks)}


def step(config: EggConfig, weights: Any, state: Array, token: Array, arithmetic: ModuleType = integers):
    """One byte of every row.

    Args:
        weights: as from `init`, or from `stack`; of a member, matrices may be `eggroll.integer.Perturbed`.
        state: [L, M, D], or a list of L arrays where the weights are not stacked.
        token: integers [M]; before a 0, the separator of documents, the state is cleared.

    Returns:
        (logits [M, 256], state): int8, logits are log2-probabilities in 1/16, up to a constant.
    """
    ops, product = arithmetic, functools.partial(arithmetic.product, faithful=config.faithful)
    known = (token != 0)[:, None]

    def layer(x, one):
        block, old = one
        past = jnp.where(known, old, jnp.zeros_like(old))
        new = recurrent(ops, product, block["recurrent"], ops.norm(x, block["norm_1"]), past)
        x = ops.add(x, new)
        return ops.add(x, product(block["down"], product(block["up"], ops.norm(x, block["norm_2"])))), new

    x = ops.row(weights["embed"], token)
    if "blocks" in weights:
        x, after = lax.scan(layer, x, (weights["blocks"], state))
    else:
        after = [None] * config.layers
        for i, old in enumerate(state):
            x, after[i] = layer(x, (weights[f"block_{i}"], old))
    return product(weights["head"], ops.norm(x, weights["norm"])), after


def recurrent(ops: ModuleType, product, weights: Any, x: Array, h: Array) -> Array:
    """The next state, which is the output too: a gated unit with the identity, saturated, for sigmoid and tanh.

    f = Wf x + Uf h + bf, in [-127, 127] for a gate of 0 to 1; candidate c = Wh x + Uh (f h) + bh; h + f (c - h).
    """
    f = ops.add(product(weights["Wf"], x), product(weights["Uf"], h), weights["bf"])
    past = ops.gated(f, h)
    c = ops.add(product(weights["Wh"], x), product(weights["Uh"], past), weights["bh"])
    return ops.blend(f, h, c)


def log_likelihood(
    config: EggConfig,
    weights: Any,
    state: Array,
    inputs: Array,
    targets: Array,
    arithmetic: ModuleType = integers,
    likelihood: Callable[[Array, Array], Array] | None = None,
) -> tuple[Array, Array]:
    """log2 p(targets | inputs and state) in 1/16 bits, summed over rows and bytes.

    The integer likelihood is a signal to train on, no code length: its tables round down, and 256 equal logits are 8 bits at
    some levels and 7.875 at others. What is compared with other models needs `rl.models.egg_float.of_integers`.

    Args:
        state: [M, L, D].
        inputs, targets: [M, T].
        likelihood: (logits, target) -> 1/16 bits; None: the arithmetic's.

    Returns:
        (scalar, state after the last byte): int32 and int8.
    """
    likelihood = arithmetic.log_likelihood if likelihood is None else likelihood
    layers = state.swapaxes(0, 1)
    weights, layers = (stack(weights), layers) if arithmetic is integers else (weights, list(layers))

    def one(carry, tokens):
        state, total = carry
        token, target = tokens
        logits, state = step(config, weights, state, token, arithmetic)
        return (state, total + jnp.sum(likelihood(logits, target))), None

    score = jax.eval_shape(
        likelihood, jax.ShapeDtypeStruct((1, VOCAB), state.dtype), jax.ShapeDtypeStruct((1,), jnp.int32)
    )
    nothing = jnp.zeros((), score.dtype)
    (layers, total), _ = lax.scan(one, (layers, nothing), (inputs.T, targets.T))
    return total, jnp.stack([*layers], 1)


def sample(config: EggConfig, params: Any, key: Array, rows: int, length: int, prompt: Array | None = None) -> Array:
    """Bytes drawn from the integer model, u8 [rows, length]; each row begins a document, or goes on after the prompt.

    A byte j is drawn with probability exp2(y_j) / sum exp2(y), in integers.

    Args:
        prompt: integers [bytes], without the separator that comes first; None: none.
    """
    prompt = jnp.zeros(0, jnp.int32) if prompt is None else jnp.asarray(prompt, jnp.int32)
    weights = stack(params)

    def one(carry, inputs):
        layers, token = carry
        number, forced = inputs
        logits, layers = step(config, weights, layers, token)
        total = jnp.cumsum(integers.exp2(logits.astype(jnp.int32) + 128), -1)
        place = jax.random.randint(jax.random.fold_in(key, number), (rows, 1), 0, total[:, -1:])
        token = jnp.where(forced < 0, jnp.sum(total <= place, -1), forced)
        return (layers, token), token.astype(jnp.uint8)

    forced = jnp.concatenate([prompt, jnp.full(length, -1)])
    start = jnp.zeros((config.layers, rows, config.width), jnp.int8), jnp.zeros(rows, jnp.int32)
    _, drawn = lax.scan(one, start, (jnp.arange(len(forced)), forced))
    return drawn.T[:, len(prompt) :]
