"""Step sizes: exact conversions between published scale conventions, anchored weight decay, the cosine law.

The convention of this package is the textbook estimate g = (1 / (N sigma)) sum_n f_n E_n of the gradient of
E f(theta + sigma E); optax receives -g, so ``optax.sgd(eta)`` adds eta * g. Schedules of the learning rate and of
sigma are optax schedules: ``optax.linear_schedule``, or for a multiplicative decay of 0.999 per update
``optax.exponential_decay(init, transition_steps=1, decay_rate=0.999)``.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import optax

if TYPE_CHECKING:
    from eggroll.population import Population

# eta of the textbook update = learning rate of the convention * sigma**first * sqrt(members)**second
_TO_TEXTBOOK = {"textbook": (0, 0), "paper": (1, 0), "hyperscale": (2, 1), "vllm": (1, 0)}


def convert_learning_rate(
    value: float | jax.Array, *, source: str, target: str, sigma: float | jax.Array, members: int
) -> float | jax.Array:
    """The learning rate under ``target`` that takes the same plain-gradient (SGD) step as ``value`` under ``source``.

    | convention   | step of the parameters                                | eta (textbook)          |
    |--------------|-------------------------------------------------------|-------------------------|
    | textbook     | eta / (N sigma) * sum_n f_n E_n                       | eta                     |
    | paper        | alpha / N * sum_n f_n E_n                             | alpha sigma             |
    | hyperscale   | lr sigma / sqrt(N) * sum_n f_n E_n                    | lr sigma^2 sqrt(N)      |
    | vllm         | lr / N * sum over pairs of (f_+ - f_-) E_+            | lr sigma                |

    With Adam-like optimizers the scale of the gradient, and so the convention, does not matter (but for their epsilon).

    Args:
      value: learning rate in the source convention.
      source: "textbook", "paper", "hyperscale" or "vllm".
      target: likewise.
      sigma: standard deviation of the perturbation.
      members: N, the number of evaluated members (both signs counted).

    Raises:
      ValueError: an unknown convention, members below 1, or sigma not positive.

    Source: arXiv 2511.16652 equation 6, and what HyperscaleES and eggroll-vllm compute.
    """
    for convention in (source, target):
        if convention not in _TO_TEXTBOOK:
            raise ValueError(f"unknown learning-rate convention {convention!r}; known: {', '.join(_TO_TEXTBOOK)}")
    if members < 1:
        raise ValueError(f"members must be at least 1, got {members}")
    if not isinstance(sigma, jax.core.Tracer) and sigma <= 0:
        raise ValueError(f"sigma must be positive, got {sigma}")
    sigma_power = _TO_TEXTBOOK[source][0] - _TO_TEXTBOOK[target][0]
    members_power = _TO_TEXTBOOK[source][1] - _TO_TEXTBOOK[target][1]
    return value * sigma**sigma_power * math.sqrt(members) ** members_power


class AnchoredWeightDecayState(NamedTuple):
    """The parameters that the decay pulls toward."""

    anchor: optax.Params


def anchored_weight_decay(rate: float | jax.Array) -> optax.GradientTransformation:
    """Decoupled weight decay toward the initial parameters: update <- update + rate * (theta - theta_0).

    ``optax.add_decayed_weights`` pulls toward zero; this one toward the parameters given to ``init``, which it keeps
    (one more copy of the model) in its state, so a resumed run pulls toward the same point. Chain it behind the
    preconditioner and before the learning rate, e.g.
    ``optax.chain(optax.scale_by_adam(), anchored_weight_decay(0.1), optax.scale_by_learning_rate(1e-3))``.
    Restrict it to some leaves with ``optax.masked``.

    Args:
      rate: strength per unit of learning rate, as in ``optax.add_decayed_weights``.

    Raises:
      ValueError: by ``update``, if it is not given the parameters.
    """

    def init(params: optax.Params) -> AnchoredWeightDecayState:
        # a copy: the caller may donate the parameters
        return AnchoredWeightDecayState(jax.tree.map(lambda p: jnp.array(p, copy=True), params))

    def update(
        updates: optax.Updates, state: AnchoredWeightDecayState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, AnchoredWeightDecayState]:
        if params is None:
            raise ValueError("anchored_weight_decay needs the parameters: call tx.update(updates, state, params)")
        pulled = jax.tree.map(
            lambda u, p, anchor: None if u is None else u + (rate * (p - anchor)).astype(u.dtype),
            updates,
            params,
            state.anchor,
            is_leaf=lambda x: x is None,
        )
        return pulled, state

    return optax.GradientTransformation(init, update)


def predicted_cosine(
    population: "Population", dimensions: int, *, shapes: Sequence[tuple[int, int]] = (), rank: int = 1
) -> float:
    """Expected cosine between the estimate and the true gradient while the objective is locally linear and noise-free.

        cos = (second moment of the estimate / |gradient|^2) ** -1/2

    Without ``shapes`` this is the law cos^2 = 1 / (1 + d / D) with D = G P Q the number of distinct directions: N for
    independent members, N/2 for antithetic ones. With ``shapes`` the low-rank matrices get their exact second moment
    (for Gaussian factors, and gradients of equal root mean square in all leaves); for one block of a crossed
    population at rank 1 that is (1 + (m + 1)/P)(1 + (n + 1)/Q) for the leaf's own gradient and m n / (P Q) for the
    others'. The double centring of crossed blocks costs one row and one column: P - 1 and Q - 1 stand for P and Q.

    Args:
      population: the population (G blocks of P rows x Q columns, with one or two signs).
      dimensions: d, the number of perturbed parameters of all leaves.
      shapes: (m, n) of the low-rank matrices among them; parameters not listed count as full-rank noise.
      rank: r of the low-rank matrices.

    Raises:
      ValueError: the matrices hold more parameters than ``dimensions``, or one is of lower rank than ``rank``.

    Source: arXiv 2511.16652 v2 (independent), and the second moment of crossed products of Gaussian factors.
    """
    listed = sum(m * n for m, n in shapes)
    if dimensions < 1 or listed > dimensions:
        raise ValueError(
            f"dimensions must count all perturbed parameters: got {dimensions}, matrices alone hold {listed}"
        )
    centred = population.rows > 1 and population.columns > 1
    rows, columns = population.rows - centred, population.columns - centred
    excess = (dimensions - listed) * dimensions
    for m, n in shapes:
        if not 1 <= rank <= min(m, n):
            raise ValueError(f"rank must be between 1 and min(m, n): rank {rank}, matrix {(m, n)}")
        own = (columns - 1) * (m + 1) / rank + (rows - 1) * (n + 1) / rank + m * n + 1 + 2 * (m + n + 1) / rank
        excess += m * n * (own + dimensions - m * n)
    return (1 + excess / (dimensions * population.blocks * rows * columns)) ** -0.5
