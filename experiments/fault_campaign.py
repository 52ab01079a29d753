"""Harms a training again and again, resumes it by the same command, and compares with the run that nobody harmed.

    python -m experiments.fault_campaign --runs=200 --out=experiments/results/fault_campaign.json
    python -m experiments.fault_campaign --runs=20 --script=experiments.control --config=configs/control_cartpole.py \\
        --config.steps=8 --config.save_every=1 --config.max_steps=20

What is harmed is a script's command line, by default that of `experiments.victim`; nothing in it knows of this campaign. Every
case harms one run once, at a moment that its seed draws, in one of the ways of `experiments.faults`.

A case is well if the run resumes from the newest intact checkpoint and ends with the metrics, log of generations, result and
final state of the unharmed run, bit for bit. Damage is `silent` if it made a difference that no line of output names, and
`harmless` if it changed nothing that is read: the checkpoint's checksums hold. Exit status: 0 if every case is well, else 1,
and the folders of those that are not are kept.

The unharmed run is started as a user starts it, the others are forked from this process, which so must not use a device itself.
"""

import argparse
import collections
import dataclasses
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from experiments.faults import FAULTS, LONGEST, POLL, CampaignError, Victim, checkpoint_of, committed, until

_SCRIPT, _CONFIG = "experiments.victim", "experiments/victim.py"
_RESUMED = re.compile(r"resumed .* at step (\d+) of")
_PROMISED = re.compile(r"SIGTERM: saved step (\d+)")
_UNUSABLE, _FULL = "unusable", "File too large"


def final_of(folder: Path) -> dict[str, Any]:
    """What a harmed run must have in common with the unharmed one, by name.

    Not which older checkpoints are kept: one that a killed process did not come to delete goes with the next save.
    """
    meta = json.loads((checkpoint_of(folder, committed(folder)[-1]) / "meta.json").read_text())
    result = json.loads((folder / "result.json").read_text())
    files = {path.name: path.read_bytes() for path in folder.glob("*.jsonl") if path.name != "timing.jsonl"}
    files |= {path.name: path.read_bytes() for path in folder.glob("*.bin")}
    result = {key: value for key, value in result.items() if key != "seconds"}
    return files | {"state": meta["leaves"], "result": result, "step": committed(folder)[-1]}


def case(victim: Victim, kind: str, folder: Path, seed: int) -> dict[str, Any]:
    """Harms one run and resumes it; what came of it, as JSON values."""
    began = time.perf_counter()
    harm = FAULTS[kind](victim, folder, random.Random(seed))
    intact = [step for step in committed(folder) if step != harm.damaged]
    newest = max([0, *intact, *map(int, _PROMISED.findall(harm.output))])
    ended = [job.wait() for job in victim.start_all(folder, harm.processes)]
    code, output = next((code for code, _ in ended if code), 0), "".join(text for _, text in ended)
    resumed = max([0, *map(int, _RESUMED.findall(output))])
    named = _UNUSABLE in output or _FULL in harm.output
    harmless = harm.damaged is not None and not named and resumed == harm.damaged
    final = final_of(folder) if code == 0 else {}
    different = [name for name in victim.final | final if victim.final.get(name) != final.get(name)]
    return {
        "kind": kind,
        "seed": seed,
        "did": harm.did,
        "status": code,
        "newest": newest,
        "resumed": resumed,
        "in_place": resumed == newest or harmless,
        "bit_equal": not different,
        "different": different,
        "lost": max(0, newest - resumed),
        "named": named,
        "harmless": harmless,
        "silent": bool(different) and code == 0 and not named,
        "seconds": round(time.perf_counter() - began, 2),
        "output": "" if code == 0 and not different else (harm.output + output)[-3000:],
    }


def well(row: dict[str, Any]) -> bool:
    """Whether a case is as it must be."""
    return row["bit_equal"] and row["in_place"] and not row["lost"] and not row["silent"]


def table(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per kind of fault: how many of its runs."""
    lines = []
    for kind in FAULTS:
        of = [row for row in rows if row["kind"] == kind]
        count = lambda name, of=of: sum(bool(row[name]) for row in of)
        if of:
            lines.append(
                {
                    "fault": kind, "runs": len(of), "resumed_from_newest_intact": count("in_place"),
                    "bit_equal": count("bit_equal"), "lost_steps": sum(row["lost"] for row in of),
                    "fault_named": count("named"), "damage_harmless": count("harmless"), "silent": count("silent"),
                }
            )  # fmt: skip
    return lines


def show(lines: Sequence[dict[str, Any]]) -> str:
    """The table as Markdown."""
    head = [name.replace("_", " ") for name in lines[0]]
    rows = [head, ["---"] * len(head), *([str(value) for value in line.values()] for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def unharmed(script: str, argv: Sequence[str], folder: Path) -> Victim:
    """Runs the command as a user does, then forked, to fill the compilation cache and learn how long what takes.

    Raises:
        CampaignError: it fails, or does not do the same twice.
    """
    command = [sys.executable, "-m", script, *argv, f"--workdir={folder / 'whole'}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=10 * LONGEST)
    if ended.returncode:
        raise CampaignError(
            f"the unharmed run must succeed, but {' '.join(command)} ended with:\n{ended.stderr[-3000:]}"
        )
    victim = Victim(importlib.import_module(script).main, (script, *argv))
    importlib.import_module("orbax.checkpoint")
    final = final_of(folder / "whole")
    job = victim.start(folder / "stopped")  # what resuming compiles is not in the cache yet
    until(lambda: len(committed(folder / "stopped")) > 1, job, None)
    job.kill(signal.SIGTERM)
    for name in ("stopped", "again"):
        job = victim.start(folder / name)
        steps, times = [], []
        while job.alive():
            if committed(folder / name) != steps:
                steps = committed(folder / name)
                times.append(time.perf_counter() - job.began)
            time.sleep(POLL)
        if job.wait()[0] or final_of(folder / name) != final:
            raise CampaignError(
                f"the run must do the same every time, but {folder / name} differs from {folder / 'whole'}"
            )
    count = final["step"]
    first, last = times[0], times[-1]
    return dataclasses.replace(
        victim, final=final, first=first, whole=last, saves=count, saving=(last - first) / max(1, count - 1)
    )


def campaign(
    victim: Victim, runs: int, seed: int, folder: Path, faults: Sequence[str] = tuple(FAULTS)
) -> Iterator[dict[str, Any]]:
    """The cases, one at a time, every kind of fault in turn."""
    for number in range(runs):
        kind = faults[number % len(faults)]
        place = folder / f"case{number:04d}"
        row = case(victim, kind, place, 1_000_003 * seed + number)
        if well(row):
            shutil.rmtree(place)
        yield row


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.fault_campaign", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--faults", default=",".join(FAULTS), help="kinds, with commas between them; by default all")
    parser.add_argument("--script", default=_SCRIPT, help="a module with main(argv); its own options follow")
    parser.add_argument("--out", type=Path, help="the table and the cases that are not well, as JSON")
    arguments, rest = parser.parse_known_args(argv)
    if arguments.runs < 1:
        parser.error(f"--runs must be at least 1; got {arguments.runs}")
    faults = arguments.faults.split(",")
    if unknown := set(faults) - FAULTS.keys():
        parser.error(f"--faults knows {', '.join(FAULTS)}; got {', '.join(sorted(unknown))}")
    rest = rest if any(option.startswith("--config=") for option in rest) else [f"--config={_CONFIG}", *rest]
    folder, began = Path(tempfile.mkdtemp(prefix="fault_campaign-")), time.perf_counter()
    # A cache of its own, which the unharmed run fills; the environment is read when jax is imported.
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    try:
        victim = unharmed(arguments.script, rest, folder)
        print(
            f"unharmed: first checkpoint after {victim.first:.2f} s, {victim.saves} steps in {victim.whole:.2f} s",
            flush=True,
        )
        rows = []
        for row in campaign(victim, arguments.runs, arguments.seed, folder, faults):
            rows.append(row)
            verdict = "well" if well(row) else f"NOT WELL, kept: {folder}"
            print(
                f"{len(rows)}/{arguments.runs} {row['kind']}: {row['did']}; resumed at step {row['resumed']} of "
                f"{row['newest']} intact, {row['seconds']:.1f} s: {verdict}", flush=True,
            )  # fmt: skip
    except CampaignError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    bad = [row for row in rows if not well(row)]
    lines = table(rows)
    print(show(lines))
    if arguments.out:
        report = {
            "command": f"python -m experiments.fault_campaign --runs={arguments.runs} --seed={arguments.seed}",
            "harmed": f"python -m {arguments.script} {' '.join(rest)}", "runs": len(rows), "table": lines, "not_well": bad,
            "seconds": round(time.perf_counter() - began, 1),
            "versions": {name: version(name) for name in ("jax", "jaxlib", "orbax-checkpoint")},
        }  # fmt: skip
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    statuses = collections.Counter(map(well, rows))
    print(f"{statuses[True]} of {len(rows)} cases well, {time.perf_counter() - began:.0f} s")
    if not bad:
        shutil.rmtree(folder)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
