"""From one number per token to one number per batch, kept as numerator and denominator.

Both are sums over sequences, so a batch cut into micro-batches or over devices is exact: sum the numerators, sum the
denominators, divide once. Averaging the quotients of micro-batches is another number as soon as their token counts differ.
"""

import jax.numpy as jnp
from jax import Array

KINDS = ("token_mean", "sequence_mean", "sequence_sum", "constant")


def aggregate(
    kind: str, terms: Array, mask: Array, longest: int | None = None, counted: Array | None = None
) -> tuple[Array, Array]:
    """Numerator and denominator of the mean of the terms under one of four rules.

    With m the mask, L_i = sum_t m_it and N the counted rows:

    token_mean:    sum_it m l / sum_it m                 DAPO, CISPO; long sequences weigh more
    sequence_mean: (1/N) sum_i (1/L_i) sum_t m l         GRPO, GSPO; a token of a long sequence weighs less
    sequence_sum:  (1/N) sum_i sum_t m l                 the log-probability of a sequence: REINFORCE, RLOO, MiniRL
    constant:      (1/(N longest)) sum_it m l            Dr. GRPO (TRL's; verl's "seq-mean-token-sum-norm" lacks the 1/N)

    Args:
        kind: one of `KINDS`.
        terms: [N, L]; may hold anything, NaN included, where the mask is False.
        mask: bool [N, L], tokens that count.
        longest: tokens, the configured longest completion, never the padded width; for "constant" only.
        counted: bool [N], rows that exist (padding rows do not). None: all. A counted row without a token adds nothing to
            the numerator and one to N.

    Returns:
        (numerator, denominator), scalars of the terms' type, at least f32.

    Raises:
        ValueError: an unknown kind, shapes that do not fit, `longest` missing.
    """
    check(kind, longest)
    if jnp.shape(terms) != jnp.shape(mask) or jnp.ndim(terms) != 2:
        raise ValueError(f"terms and mask must both be [rows, tokens]; got {jnp.shape(terms)} and {jnp.shape(mask)}")
    dtype = jnp.promote_types(jnp.result_type(terms), jnp.float32)
    if counted is not None:
        mask = mask & counted[:, None]
    terms = jnp.where(mask, terms, 0).astype(dtype)
    tokens = mask.sum(axis=1).astype(dtype)
    rows = (jnp.ones(len(mask), bool) if counted is None else counted).sum().astype(dtype)
    if kind == "token_mean":
        return terms.sum(), tokens.sum()
    if kind == "sequence_mean":
        return (terms.sum(axis=1) / jnp.maximum(tokens, 1)).sum(), rows
    return terms.sum(), rows * (longest if kind == "constant" else 1)


def check(kind: str, longest: int | None) -> None:
    """Raises ValueError unless the kind exists and has what it needs."""
    if kind not in KINDS:
        raise ValueError(f"aggregation must be one of {', '.join(KINDS)}; got {kind!r}")
    if (kind == "constant") != (longest is not None):
        raise ValueError(f"longest belongs to the aggregation 'constant' and only there; got {kind!r} and {longest}")
    if longest is not None and longest < 1:
        raise ValueError(f"longest must be at least 1 token; got {longest}")


def quotient(numerator: Array, denominator: Array) -> Array:
    """The mean; 0 where nothing counted, so that a batch with every token masked moves nothing."""
    return jnp.where(denominator > 0, numerator / jnp.where(denominator > 0, denominator, 1), 0)
