"""Sequence-parallel groups of different sizes, simulated by their cost model: see the package."""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from experiments.bench.harness import Row, row
from rl.data import sequence_parallel as sp

_MEMORY = 30 * 2**30  # bytes of a device that a step may use
_PER_DEVICE = 8  # sequences of a batch
_BATCHES = 8
_NODE, _LINK = (
    8,
    8.7e9 / 2,
)  # a node's devices; bytes/s of a device out of its node, from the table's degree 16: half goes out

# (median, sigma) of log-normal lengths. The first is the usual stand-in for a training corpus; the others are made to look like
# published histograms of web pages, of code, whose tail is heaviest, and of an encyclopedia. None is data.
_LENGTHS = {"plain": (1500, 1.3), "web": (700, 1.2), "code": (900, 1.6), "encyclopedia": (450, 1.2)}


def packing(repeats: int) -> Iterator[Row]:
    """Seconds of a step, simulated, of the best static degree and of the best degree of each micro-batch, over ours."""
    batches = min(repeats, _BATCHES)
    for setting in _settings():
        yield from _rows(setting, batches)


def _settings() -> Iterator[dict[str, Any]]:
    for devices, limit in itertools.product((16, 64), (16, 32, 64)):
        yield {"devices": devices, "lengths": "plain", "limit": limit * 1024}
    for lengths, limit in itertools.product(("web", "code", "encyclopedia"), (64, 192)):
        yield {"devices": 64, "lengths": lengths, "limit": limit * 1024}


def profile(devices: int) -> sp.Profile:
    """GPT-7B on nodes of 8; beyond the 16 devices that were measured, a share 1 - 8 / d of an exchange leaves the node."""
    links = dict(sp.GPT_7B.bandwidth)
    degree = 2 * max(links)
    while degree <= devices:
        links[degree] = _LINK / (1 - _NODE / degree)
        degree *= 2
    return dataclasses.replace(sp.GPT_7B, bandwidth=links)


def draw(rng: np.random.Generator, lengths: str, limit: int, n: int) -> np.ndarray:
    """n lengths of at least 16 tokens; longer ones than the limit are left out."""
    median, sigma = _LENGTHS[lengths]
    many = rng.lognormal(np.log(median), sigma, 4 * n).astype(np.int64)
    return many[(many >= 16) & (many <= limit)][:n]


def _rows(setting: dict[str, Any], batches: int) -> Iterator[Row]:
    devices, limit = setting["devices"], setting["limit"]
    costs = profile(devices)
    capacity = sp.capacity(costs, _MEMORY, devices)
    allowed = {"adaptive": sp.adaptive(costs, devices), "homogeneous": sp.homogeneous(costs, devices)}
    allowed |= {d: sp.static(costs, devices, d) for d in costs.degrees if d <= devices and d * capacity >= limit}
    simulated, solver, bound = {name: [] for name in allowed}, [], []
    rng = np.random.default_rng(0)
    for _ in range(batches):
        lengths = draw(rng, setting["lengths"], limit, _PER_DEVICE * devices)
        for name, layouts in allowed.items():
            start = time.process_time()
            step = sp.plan(lengths, costs, capacity, layouts)
            if name == "adaptive":
                solver.append(time.process_time() - start)
                bound.append(sum(groups.bound for groups in step))
            simulated[name].append(sum(groups.seconds for groups in step))
    mean = {name: statistics.fmean(values) for name, values in simulated.items()}
    static = min((name for name in mean if isinstance(name, int)), key=mean.get)
    seconds = {"ours": mean["adaptive"], "homogeneous": mean["homogeneous"], "static": mean[static]}
    setting = setting | {"sequences": _PER_DEVICE * devices, "capacity": capacity}
    further = {
        "static_degree": static,
        "solver_seconds": {"median": round(statistics.median(solver), 3), "largest": round(max(solver), 3)},
        "bound_over_ours": round(statistics.fmean(bound) / mean["adaptive"], 3),
    }
    for other in ("static", "homogeneous"):
        yield row(setting, f"{other}_over_ours", seconds[other] / seconds["ours"], seconds, batches, **further)


CASES = {"packing": packing}
