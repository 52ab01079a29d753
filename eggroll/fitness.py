"""Fitness shaping: raw scores of a population -> one shaped number per member.

A shaper is a pure function ``shaper(scores, population, **context) -> (shaped, metrics)``:

* ``scores`` [N, E]: row = member (numbered as in `eggroll.population`), column = evaluation (prompt, episode, data
  point); higher is better. [N] is read as [N, 1]. All members see the same evaluation in a column, unless ``groups``
  says otherwise.
* ``shaped`` [N]: what multiplies member n's perturbation in the estimate.
* ``metrics``: scalar arrays. ``fitness_mean``, ``fitness_std``, ``fitness_min`` and ``fitness_max`` are over the finite
  raw scores, ``finite_members`` counts the members all of whose scores are finite, ``dead_groups`` the comparison
  groups (columns, groups or pairs) that carry no information because their scores are all equal.

Rules that every shaper keeps:

* at least float32: bfloat16 and float16 scores raise (256 levels cannot rank a population), integers are cast;
* a score that is NaN, infinite, or of magnitude 1e38 and more is *worst*: z-scores and centring put the worst finite
  score of its group in its place, ranks and pair signs put the whole member below all finite ones;
* no spread, or nothing finite, gives exact zeros and never NaN.

The double centring of crossed populations is the estimate's business, not this module's.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from eggroll.population import Population

Metrics = dict[str, jax.Array]
Shaper = Callable[..., tuple[jax.Array, Metrics]]
Within = Callable[[Callable, jax.Array], jax.Array]  # (jnp.sum | jnp.min | jnp.max, x) -> x's group value at each entry

_VARIANCE_EPSILON = 1e-5
_BASELINE_EPSILON = 1e-8
_LARGEST = 1e38  # the difference of two smaller numbers is still finite in float32


def zscore(scores: jax.Array, population: "Population") -> tuple[jax.Array, Metrics]:
    """Standardised mean score: f_n = (s_n - mean s) / sqrt(var s + 1e-5) with s_n = mean_e scores[n, e] and ddof 0.

    Args:
      scores: [N, E] raw scores; every member has seen the same E evaluations.
      population: the population that was scored.

    Returns:
      shaped [N] and metrics.

    Raises:
      ValueError: scores without one row per member, or of a type below float32.

    Source: HyperscaleES with group_size = 0, and for E > 1 its multi-GPU script (summed over prompts, then z-scored).
    """
    scores = _check("zscore", scores, population)
    columns = _within("zscore", scores.shape, None)
    filled = _fill(scores, columns)
    above = filled - columns(jnp.min, filled)
    member = jnp.sum(above / scores.shape[1], axis=1, keepdims=True)
    shaped = _standardise(member, _within("zscore", member.shape, None))
    return shaped[:, 0], _metrics(scores, _dead(filled, columns))


def per_group(*, std: str | None = "global") -> Shaper:
    """Makes a shaper that compares scores only within their group and averages over a member's evaluations.

        f_n = mean_e (s_ne - mean of the group of (n, e)) / scale

    with scale = sqrt(variance of all scores + 1e-5) for ``std="global"``, sqrt(variance of the group + 1e-5) for
    ``std="group"`` and 1 for ``std=None``, all variances with ddof 0. With a global scale a prompt whose scores vary
    more weighs more; with a group scale all prompts weigh the same (as in GRPO).

    The shaper takes the context ``groups``:

    * None: each column is a group (all members answered the same prompt);
    * an int k that divides N: within each column, every k consecutive members are a group;
    * integers [N]: prompt ids of the members, equal ids within a column are a group;
    * integers [N, E]: prompt ids of all scores, equal ids anywhere are a group.

    Args:
      std: "global", "group" or None.

    Returns:
      The shaper; its ``dead_groups`` counts the groups without spread.

    Raises:
      ValueError: unknown ``std``; by the shaper: group sizes or shapes that do not fit the scores.

    Source: arXiv 2511.16652 v2 section 6.3 and HyperscaleES with group_size > 0 ("global"), GRPO ("group"),
    eggroll-vllm (None).
    """
    if std not in ("global", "group", None):
        raise ValueError(f"per_group: std must be 'global', 'group' or None, got {std!r}")

    def shaper(
        scores: jax.Array, population: "Population", *, groups: int | jax.Array | None = None
    ) -> tuple[jax.Array, Metrics]:
        scores = _check("per_group", scores, population)
        within = _within("per_group", scores.shape, groups)
        filled = _fill(scores, within)
        if std == "group":
            shaped = _standardise(filled, within)
        else:
            centred_unit, scale = _centre(filled, jnp.max(filled - within(jnp.min, filled)), within)
            shaped = centred_unit * scale
            if std == "global":
                usable = within(jnp.max, _finite(scores).astype(scores.dtype)) > 0
                shaped = centred_unit * _scale_over_deviation(filled, scale, usable)
        return jnp.mean(shaped, axis=1), _metrics(scores, _dead(filled, within))

    return shaper


def centred(
    scores: jax.Array, population: "Population", *, groups: int | jax.Array | None = None
) -> tuple[jax.Array, Metrics]:
    """Centred only: f_n = mean_e (s_ne - group mean), i.e. ``per_group(std=None)``; keeps the unit of the scores.

    With it the expected estimate is (1 - 1/N) times the textbook gradient for independent members.

    Source: eggroll-vllm; its ``normalize_with_std`` is ``per_group(std="group")``.
    """
    return per_group(std=None)(scores, population, groups=groups)


def centred_rank(scores: jax.Array, population: "Population") -> tuple[jax.Array, Metrics]:
    """Centred midrank of the mean score: f_n = rank_n / (N - 1) - 1/2, rank 0 = worst, ties get their average rank.

    [3, 1, 2] -> [0.5, -0.5, 0]. Members with a non-finite score rank below all others (and tie among themselves).

    Args and raises: as `zscore`. Source: arXiv 2511.16652 v2 (HFT experiment); midranks as in Salimans et al. for data
    without ties, chosen because discrete returns tie and an argsort would turn ties into noise.
    """
    scores = _check("centred_rank", scores, population)
    member = _member_score(scores)
    ordered = jnp.sort(member)
    below = jnp.searchsorted(ordered, member, side="left")
    not_above = jnp.searchsorted(ordered, member, side="right")
    # twice the midrank minus (N - 1) is an integer: everything is exact up to the one division
    doubled = below + not_above - 1 - (member.size - 1)
    shaped = doubled.astype(scores.dtype) / max(2 * (member.size - 1), 1)
    return shaped, _metrics(scores, _dead_columns(scores))


def pair_sign(scores: jax.Array, population: "Population") -> tuple[jax.Array, Metrics]:
    """Sign of the difference inside each antithetic pair: f_{2p} = sign(s_{2p} - s_{2p+1}) = -f_{2p+1}.

    A pair with one non-finite member is won by the other one. ``dead_groups`` counts tied pairs.

    Args: as `zscore`, for a population with both signs.

    Raises:
      ValueError: the population has no antithetic pairs, or as `zscore`.

    Source: nano-egg (its ternary fitness; the pair's weight there is f_{2p}, here f_{2p} - f_{2p+1} = 2 f_{2p}).
    """
    if population.signs != 2:
        raise ValueError(
            "pair_sign compares the two members of an antithetic pair, but this population has "
            f"signs={population.signs}; use one with signs=2, e.g. eggroll.antithetic(n), or shape with centred_rank"
        )
    scores = _check("pair_sign", scores, population)
    plus, minus = _member_score(scores).reshape(-1, 2).T
    sign = (plus > minus).astype(scores.dtype) - (plus < minus).astype(scores.dtype)
    return jnp.stack([sign, -sign], axis=1).reshape(-1), _metrics(scores, jnp.sum(sign == 0))


def baseline(scores: jax.Array, population: "Population", *, baseline: jax.Array) -> tuple[jax.Array, Metrics]:
    """Advantage over the unperturbed parameters: f_n = mean_e (s_ne - b_e) / (std_e + 1e-8), std over the members.

    Args:
      scores: [N, E] raw scores; every member has seen the same E evaluations.
      population: the population that was scored.
      baseline: [E] scores of the unperturbed parameters on the same evaluations (``es.evaluate_mean``). A non-finite
        entry makes its column dead.

    Returns:
      shaped [N] and metrics; columns without spread count as dead and contribute zero.

    Raises:
      ValueError: a baseline of the wrong shape, or as `zscore`.

    Source: HyperscaleES EggRollBS, whose unperturbed members 0 and 1 are here an evaluation of their own. Combine it
    with ``optax.clip_by_global_norm(1.0)`` as that code does.
    """
    scores = _check("baseline", scores, population)
    baseline = jnp.atleast_1d(jnp.asarray(baseline, scores.dtype))
    if baseline.shape != scores.shape[1:]:
        raise ValueError(
            f"baseline must hold one score of the unperturbed parameters per evaluation: expected shape "
            f"{scores.shape[1:]}, got {baseline.shape}; pass baseline=es.evaluate_mean(state, score, batch)"
        )
    columns = _within("baseline", scores.shape, None)
    filled = _fill(scores, columns)
    spread = columns(jnp.max, filled) - columns(jnp.min, filled)
    alive = (spread > 0) & _finite(baseline)
    unit, _ = _centre(filled, spread, columns)
    deviation = spread * jnp.sqrt(columns(jnp.sum, unit**2) / scores.shape[0])
    advantage = jnp.where(alive, filled - jnp.where(alive, baseline, 0), 0) / (deviation + _BASELINE_EPSILON)
    return jnp.mean(advantage, axis=1), _metrics(scores, jnp.sum(~alive[0]))


def _check(name: str, scores: jax.Array, population: "Population") -> jax.Array:
    scores = jnp.asarray(scores)
    if scores.ndim not in (1, 2) or scores.shape[0] != population.size or scores.size == 0:
        raise ValueError(
            f"{name}: scores must have one row per member, [{population.size}, E] (or [{population.size}]), "
            f"got shape {scores.shape}; pass what es.evaluate returned, unreduced"
        )
    if jnp.issubdtype(scores.dtype, jnp.complexfloating):
        raise ValueError(f"{name}: scores must be real, got {scores.dtype}")
    if jnp.issubdtype(scores.dtype, jnp.floating) and jnp.finfo(scores.dtype).bits < 32:
        raise ValueError(
            f"{name}: scores must be at least float32, got {scores.dtype}, which has too few levels to rank "
            "a population; cast to float32 inside the score function, before its last reduction"
        )
    return scores.reshape(scores.shape[0], -1).astype(jnp.promote_types(scores.dtype, jnp.float32))


def _within(name: str, shape: tuple[int, int], groups: int | jax.Array | None) -> Within:
    """How to reduce within groups: None = columns, k = k consecutive rows of a column, array = equal ids."""
    members, evaluations = shape
    size = members if groups is None else groups
    if isinstance(size, int | np.integer):
        if size < 1 or members % size:
            raise ValueError(
                f"{name}: a group size must divide the number of members: groups={size}, members={members}; "
                "change one of them or pass an array of prompt ids"
            )

        def within_blocks(reduce: Callable, x: jax.Array) -> jax.Array:
            blocks = x.reshape(-1, size, evaluations)
            return jnp.broadcast_to(reduce(blocks, axis=1, keepdims=True), blocks.shape).reshape(shape)

        return within_blocks

    ids = jnp.asarray(groups)
    if ids.shape not in ((members,), shape) or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"{name}: groups must be a group size or integers of shape {(members,)} or {shape}, "
            f"got {ids.dtype} of shape {ids.shape}"
        )
    dense = jnp.unique(ids, return_inverse=True, size=ids.size)[1].reshape(ids.shape)
    if ids.ndim == 1:
        dense = dense[:, None] * evaluations + jnp.arange(evaluations)
    flat = dense.reshape(-1)
    segments = {jnp.sum: jax.ops.segment_sum, jnp.min: jax.ops.segment_min, jnp.max: jax.ops.segment_max}

    def within_ids(reduce: Callable, x: jax.Array) -> jax.Array:
        return segments[reduce](x.reshape(-1), flat, num_segments=flat.size)[flat].reshape(shape)

    return within_ids


def _finite(x: jax.Array) -> jax.Array:
    return jnp.abs(x) < _LARGEST


def _fill(scores: jax.Array, within: Within) -> jax.Array:
    """Puts the worst finite score of its group in place of each non-finite one (0 where a group has none)."""
    finite = _finite(scores)
    worst = within(jnp.min, jnp.where(finite, scores, jnp.inf))
    return jnp.where(finite, scores, jnp.where(jnp.isfinite(worst), worst, 0))


def _member_score(scores: jax.Array) -> jax.Array:
    """Mean score of each member, -inf for members with a non-finite score. [N]"""
    broken = ~jnp.all(_finite(scores), axis=1)
    mean = jnp.sum(jnp.where(_finite(scores), scores, 0) / scores.shape[1], axis=1)
    return jnp.where(broken, -jnp.inf, mean)


def _nonzero(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, x, 1)


def _centre(filled: jax.Array, spread: jax.Array, within: Within) -> tuple[jax.Array, jax.Array]:
    """(centred / scale, scale), scale = spread or 1: exactly 0 without spread, and squares cannot overflow."""
    scale = _nonzero(spread)
    unit = (filled - within(jnp.min, filled)) / scale
    return unit - within(jnp.sum, unit) / within(jnp.sum, jnp.ones_like(unit)), scale


def _standardise(filled: jax.Array, within: Within) -> jax.Array:
    unit, scale = _centre(filled, within(jnp.max, filled) - within(jnp.min, filled), within)
    variance = within(jnp.sum, unit**2) / within(jnp.sum, jnp.ones_like(unit))
    return unit / jnp.sqrt(variance + _VARIANCE_EPSILON / scale**2)


def _scale_over_deviation(filled: jax.Array, scale: jax.Array, usable: jax.Array) -> jax.Array:
    """scale / sqrt(variance of all usable entries + epsilon), large numbers unsquared; finite if nothing is usable."""
    lowest = jnp.min(filled, where=usable, initial=_LARGEST)
    everything = _nonzero(jnp.max(filled, where=usable, initial=-_LARGEST) - lowest)
    count = jnp.maximum(jnp.sum(usable), 1)
    unit = (filled - lowest) / everything
    centred_unit = jnp.where(usable, unit - jnp.sum(unit, where=usable) / count, 0)
    variance = jnp.sum(centred_unit**2) / count
    return (scale / everything) / jnp.sqrt(variance + _VARIANCE_EPSILON / everything**2)


def _dead(filled: jax.Array, within: Within) -> jax.Array:
    same = within(jnp.max, filled) == within(jnp.min, filled)
    return jnp.round(jnp.sum(same / within(jnp.sum, jnp.ones_like(filled)))).astype(jnp.int32)


def _dead_columns(scores: jax.Array) -> jax.Array:
    columns = _within("columns", scores.shape, None)
    return _dead(_fill(scores, columns), columns)


def _metrics(scores: jax.Array, dead_groups: jax.Array) -> Metrics:
    finite = _finite(scores)
    lowest = jnp.min(scores, where=finite, initial=jnp.inf)
    highest = jnp.max(scores, where=finite, initial=-jnp.inf)
    scale = _nonzero(highest - lowest)
    unit = (scores - lowest) / scale
    nothing = ~jnp.any(finite)
    statistics = {
        "fitness_mean": lowest + scale * jnp.mean(unit, where=finite),
        "fitness_std": scale * jnp.std(unit, where=finite),
        "fitness_min": lowest,
        "fitness_max": highest,
    }
    return {name: jnp.where(nothing, jnp.nan, value) for name, value in statistics.items()} | {
        "finite_members": jnp.sum(jnp.all(finite, axis=1), dtype=jnp.int32),
        "dead_groups": dead_groups.astype(jnp.int32),
    }
