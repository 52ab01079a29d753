"""One update of a policy-gradient step: packed batch -> estimate -> optimizer, and the measures of several."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import eggroll.estimate
from rl import estimate as estimates
from rl.learners import credit as credits
from rl.learners.settings import Settings
from rl.mesh import lay_out
from rl.objectives import vcpo
from rl.types import TrainBatch


def update(model, optimizer, settings: Settings, whole, mesh, learning, base, batch: TrainBatch):
    """One update; one whose gradient or step is not finite changes nothing but the count of skipped ones.

    Args:
        whole: (base, what learns) -> the model's parameters.
        learning: (params, master, opt_state, skipped) of `rl.learners.gradient.State`.
        base: the parameters that an adapter belongs to, else None.
        batch: with `TrainBatch.credit`.

    Returns:
        (learning, sums and denominators of metrics, largest values), see `means_and_maxima`.
    """
    params, master, opt_state, skipped = learning
    made, sample = estimates.estimate(
        model, params, batch, settings.objective, temperature=settings.temperature, mesh=mesh,
        base=base, merge=None if base is None else whole,
        credit=credits.interpolated if settings.proximal == "interpolated" else None,
    )  # fmt: skip
    counted = (batch.counted & batch.mask.any(axis=-1)).reshape(-1)
    log_weight = sample.log_weight.reshape(-1)
    share = vcpo.ess(log_weight, counted) / jnp.maximum(counted.sum(), 1)
    if settings.step_scale:
        made = dataclasses.replace(made, step_scale=vcpo.step_scale(log_weight, settings.step_scale, counted=counted))
    norm = optax.tree.norm(made.gradient)
    *after, updates = eggroll.estimate.step(optimizer, params, master, opt_state, made)
    finite = jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(updates))
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), tuple(after), (params, master, opt_state))
    kept = lay_out(mesh, *kept)
    skipped = jnp.where(finite, 0, skipped + 1)
    one = jnp.float32(1)
    # as drawn, not as the objective caps it: the effective sample size does not see a common factor
    drawn = jnp.where(counted, jnp.exp(jnp.clip(log_weight, -20, 20)), 0)
    metrics = made.metrics | {
        "sequence_weight": (drawn.sum(), counted.sum().astype(jnp.float32)),
        "gradient_norm": (norm, one), "ess": (share, one), "step_scale": (made.step_scale, one),
        "skipped": (1 - finite.astype(jnp.float32), one),
    }  # fmt: skip
    maxima = {f"{name}_max": x for name, x in sample.maxima.items()} | {"sequence_weight_max": drawn.max()}
    return (*kept, skipped), metrics, maxima | {"skipped_in_a_row": skipped}


def means_and_maxima(
    measured: Sequence[tuple[dict[str, tuple[Array, Array]], dict[str, Array]]],
) -> dict[str, np.floating]:
    """Means and maxima over a step's updates."""
    sums, maxima = (jax.tree.map(lambda *xs: np.stack(xs), *x) for x in zip(*jax.device_get(measured), strict=True))
    means = {name: total.sum() / max(count.sum(), 1e-30) for name, (total, count) in sums.items()}
    return means | {name: x.max() for name, x in maxima.items()}
