"""Optimizers with little memory, as optax transformations: write `rl.optim.frugal(...)` where `optax.adamw(...)` was.

    tx = rl.optim.frugal(1e-3, density=0.25)
    print(rl.optim.report(tx, params))     # bytes of state, before anything is allocated

One file a method, which has its formula, its bytes and what it means for the noisy estimates of evolution. Every optimizer
splits the parameters into groups by path (`rules`); `scale_by_*` are the bare transformations of all leaves they are given.
State is f32 and its shapes depend on settings alone: nothing is recompiled at a refresh, no full-size buffer is hidden, and
arrays are laid out on the devices as the parameters they belong to, also where `init` is jitted. Lion, Muon, Adafactor and SM3
are optax's.

With `optax.inject_hyperparams`, settings that shapes depend on are static:
`optax.inject_hyperparams(rl.optim.frugal, static_args=("density", "every", "seed"))(learning_rate=1e-3)`.
"""

from rl.optim.adam8bit import adam8bit, scale_by_adam8bit
from rl.optim.adam_mini import adam_mini, scale_by_adam_mini
from rl.optim.apollo import apollo, apollo_mini, scale_by_apollo
from rl.optim.badam import badam, scale_by_badam
from rl.optim.fira import fira, scale_by_fira
from rl.optim.frugal import frugal, scale_by_split
from rl.optim.galore import galore, scale_by_galore
from rl.optim.ldadam import ldadam, scale_by_ldadam
from rl.optim.report import Report, report

__all__ = [
    "Report",
    "adam8bit",
    "adam_mini",
    "apollo",
    "apollo_mini",
    "badam",
    "fira",
    "frugal",
    "galore",
    "ldadam",
    "report",
    "scale_by_adam8bit",
    "scale_by_adam_mini",
    "scale_by_apollo",
    "scale_by_badam",
    "scale_by_fira",
    "scale_by_galore",
    "scale_by_ldadam",
    "scale_by_split",
]
