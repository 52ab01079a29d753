"""What every case shares: timing in turn, one row per measurement, the command line."""

import argparse
import datetime
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import jax

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "eggroll-jax")

Row = dict[str, Any]
Case = Callable[[int], Iterator[Row]]


def timed_in_turn(fns: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each function, all of them called once a round, after two rounds that do not count."""
    seconds = {name: [] for name in fns}
    for turn in range(repeats + 2):
        for name, fn in fns.items():
            start = time.perf_counter()
            jax.block_until_ready(fn())
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def row(
    setting: dict[str, Any], measure: str, value: float, seconds: dict[str, float], repeats: int, **further: Any
) -> Row:
    """One measurement: what was compared, the ratio, the median seconds of each side, and what else was found out."""
    rounded = {name: round(s, 6) for name, s in seconds.items()}
    measured = {"setting": setting, "measure": measure, "value": round(value, 3), "seconds": rounded}
    return measured | {"repeats": repeats} | further


@functools.cache
def _machine() -> dict[str, Any]:
    device = jax.devices()[0]
    cpu = device.platform == "cpu"
    name = f"cpu x{len(os.sched_getaffinity(0))}" if cpu else f"{device.device_kind} x{jax.device_count()}"
    installed = {d.metadata["Name"].lower(): d.version for d in metadata.distributions() if d.metadata["Name"]}
    return {"device": name, "versions": {p: installed[p] for p in _PACKAGES if p in installed}}


def main(arguments: list[str], cases: dict[str, Case]) -> None:
    """Runs the cases named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bench", description="Speed, as ratios inside one run.")
    parser.add_argument("cases", nargs="+", choices=cases, metavar="CASE", help=", ".join(cases))
    parser.add_argument("--repeats", type=int, default=15, help="rounds that count (fewer in the slow cases)")
    parser.add_argument("--out", help="also append the lines to this file")
    options = parser.parse_args(arguments)
    for case in options.cases:
        for measured in cases[case](options.repeats):
            command = f"python -m experiments.bench {case} --repeats={options.repeats}"
            date = datetime.date.today().isoformat()
            line = json.dumps({"case": case, **measured, **_machine(), "command": command, "date": date})
            print(line, flush=True)
            print(f"{case}: {measured['measure']} = {measured['value']} {measured['setting']}", file=sys.stderr)
            if options.out:
                with open(options.out, "a", encoding="utf-8") as file:
                    file.write(line + "\n")
