"""Harms a training again and again, resumes it by the same command, and compares with the run that nobody harmed.

    python -m experiments.fault_campaign --runs=200 --out=experiments/results/fault_campaign.json
    python -m experiments.fault_campaign --runs=20 --script=experiments.control --config=configs/control_cartpole.py \\
        --config.steps=8 --config.save_every=1 --config.max_steps=20

What is harmed is a script's command line, by default that of `experiments.victim`; nothing in it knows of this campaign. Every
case harms one run once, at a moment that its seed draws, in one of these ways:

    kill_start      SIGKILL before the first checkpoint
    kill_step       SIGKILL at any moment after it
    kill_save       SIGKILL while a checkpoint is being written
    kill_commit     SIGKILL at the moment a checkpoint gets its name
    kill_restore    SIGKILL, and again while the killed run resumes
    sigterm         SIGTERM at any moment
    full_disk       no file of the process can grow beyond a size, from any moment on (RLIMIT_FSIZE: "File too large")
    truncated       SIGKILL, then a file of the newest checkpoint loses its end
    flipped         SIGKILL, then up to eight bits of such a file are flipped
    deleted_file    SIGKILL, then such a file is deleted
    deleted_folder  SIGKILL, then a folder of the newest checkpoint, or all of it, is deleted

A case is well if the run resumes from the newest intact checkpoint and ends with the metrics, log of generations, result and
final state of the unharmed run, bit for bit. Damage is `silent` if it made a difference that no line of output names, and
`harmless` if it changed nothing that is read: the checkpoint's checksums hold. Exit status: 0 if every case is well, else 1,
and the folders of those that are not are kept.

The unharmed run is started as a user starts it. The others are forked from this process, which has imported the script: that
saves most of a start's time. So this process must not use a device itself.
"""

import argparse
import collections
import contextlib
import dataclasses
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

_SCRIPT, _CONFIG = "experiments.victim", "experiments/victim.py"
_POLL = 0.0005  # seconds between two looks at a folder
_LONGEST = 120.0  # seconds that one process may take
_RESUMED = re.compile(r"resumed .* at step (\d+) of")
_PROMISED = re.compile(r"SIGTERM: saved step (\d+)")
_UNUSABLE, _FULL = "unusable", "File too large"


class CampaignError(RuntimeError):
    """The campaign itself cannot go on: the unharmed run fails, or a process hangs."""


@dataclasses.dataclass
class Job:
    """A script that runs in a forked process; what it prints goes to a file beside its folder."""

    pid: int
    folder: Path
    output: Path
    began: float

    def alive(self) -> bool:
        """Whether it runs; it is not yet waited for."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def wait(self) -> tuple[int, str]:
        """(exit status, negative for a signal; all it printed)."""
        until(lambda: False, self, None)
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status), self.output.read_text(errors="replace")

    def kill(self, number: int = signal.SIGKILL) -> tuple[int, str]:
        """Sends a signal, unless the process ended by itself, and waits."""
        os.kill(self.pid, number)  # its number is kept for it until it is waited for
        return self.wait()


@dataclasses.dataclass(frozen=True)
class Victim:
    """The command that is harmed, and what it does unharmed.

    Attributes:
        main: of the script.
        argv: without --workdir.
        final: see `final_of`.
        first: seconds until the first checkpoint.
        whole: seconds of the run.
        saves: checkpoints it commits.
        saving: seconds that one takes.
    """

    main: Callable[[Sequence[str]], int]
    argv: tuple[str, ...]
    final: dict[str, Any] = dataclasses.field(default_factory=dict)
    first: float = 1.0
    whole: float = 1.0
    saves: int = 1
    saving: float = 0.1

    def start(self, folder: Path) -> Job:
        """Forks a process that runs the command in a folder."""
        output = folder.with_suffix(".txt")
        sys.stdout.flush(), sys.stderr.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # jax warns of forks; it has used no device yet
            pid = os.fork()
        if pid:
            return Job(pid, folder, output, time.perf_counter())
        status = 1
        try:
            file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1), os.dup2(file, 2)
            status = self.main([*self.argv, f"--workdir={folder}"])
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 1
        except BaseException:  # noqa: BLE001 - this process ends here, and what it died of is in its output
            import traceback

            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)


def until(happened: Callable[[], bool], job: Job, seconds: float | None) -> None:
    """Waits until something happened, the process ended, or so many seconds have passed (None: it hangs, which is an error)."""
    deadline = time.perf_counter() + (_LONGEST if seconds is None else seconds)
    while job.alive() and not happened():
        if time.perf_counter() > deadline:
            if seconds is not None:
                return
            os.kill(job.pid, signal.SIGKILL)
            raise CampaignError(f"a process may take {_LONGEST:g} s, and {job.output} tells of one that took longer")
        time.sleep(_POLL)


def committed(folder: Path) -> list[int]:
    """Steps that have a checkpoint."""
    place = folder / "checkpoints"
    return sorted(int(name) for name in os.listdir(place) if name.isdigit()) if place.is_dir() else []


def unfinished(folder: Path) -> bool:
    """Whether a checkpoint is being written."""
    place = folder / "checkpoints"
    return place.is_dir() and any(name.startswith("writing-") for name in os.listdir(place))


def checkpoint_of(folder: Path, step: int) -> Path:
    """The folder of a checkpoint."""
    return folder / "checkpoints" / f"{step:010d}"


def final_of(folder: Path) -> dict[str, Any]:
    """What a harmed run must have in common with the unharmed one, by name."""
    meta = json.loads((checkpoint_of(folder, committed(folder)[-1]) / "meta.json").read_text())
    result = json.loads((folder / "result.json").read_text())
    files = {path.name: path.read_bytes() for path in folder.glob("*.jsonl") if path.name != "timing.jsonl"}
    files |= {path.name: path.read_bytes() for path in folder.glob("*.bin")}
    result = {key: value for key, value in result.items() if key != "seconds"}
    return files | {"state": meta["leaves"], "result": result, "checkpoints": committed(folder)}


# -- faults ----------------------------------------------------------------------------------------------------------
# Each starts a run in a folder and harms it; `rng` draws when and how.


class Harm(NamedTuple):
    """What was done to a run."""

    did: str
    output: str  # what the run had printed until then
    damaged: int | None = None  # step whose checkpoint is damaged, and still there


def _kill_within(longest: Callable[[Victim], float], number: int):
    def fault(victim: Victim, folder: Path, rng: random.Random) -> Harm:
        delay = rng.uniform(0, longest(victim))
        job = victim.start(folder)
        until(lambda: False, job, delay)
        code, output = job.kill(number)
        return Harm(f"after {delay:.3f} s (status {code})", output)

    return fault


def _kill_step(victim: Victim, folder: Path, rng: random.Random) -> Harm:
    delay = rng.uniform(0, victim.whole - victim.first)
    job = victim.start(folder)
    until(lambda: bool(committed(folder)), job, None)
    until(lambda: False, job, delay)
    code, output = job.kill()
    return Harm(f"{delay:.3f} s after the first checkpoint (status {code})", output)


def _kill_save(victim: Victim, folder: Path, rng: random.Random) -> Harm:
    count, delay = rng.randrange(victim.saves), rng.uniform(0, victim.saving)
    job = victim.start(folder)
    until(lambda: len(committed(folder)) and committed(folder)[-1] >= count or not count, job, None)
    until(lambda: unfinished(folder), job, None)
    until(lambda: False, job, delay)
    _, output = job.kill()
    return Harm(f"{1000 * delay:.1f} ms into the save after step {count}", output)


def _kill_commit(victim: Victim, folder: Path, rng: random.Random) -> Harm:
    step, delay = rng.randint(1, victim.saves), rng.choice((0, 0, rng.uniform(0, 0.02)))
    job = victim.start(folder)
    until(lambda: (committed(folder) or [0])[-1] >= step, job, None)
    until(lambda: False, job, delay)
    _, output = job.kill()
    return Harm(f"{1000 * delay:.1f} ms after checkpoint {step} got its name", output)


def _kill_restore(victim: Victim, folder: Path, rng: random.Random) -> Harm:
    harm = _kill_at_checkpoint(victim, folder, rng, least=1)
    before, delay = committed(folder)[-1], rng.uniform(0, victim.first)
    job = victim.start(folder)
    until(lambda: committed(folder)[-1] > before, job, delay)
    _, output = job.kill()
    return Harm(f"{harm.did}, then {delay:.3f} s into resuming", output)


def _kill_at_checkpoint(victim: Victim, folder: Path, rng: random.Random, least: int) -> Harm:
    step, delay = rng.randint(least, max(least, victim.saves - 1)), rng.uniform(0, victim.saving)
    job = victim.start(folder)
    until(lambda: (committed(folder) or [0])[-1] >= step, job, None)
    until(lambda: False, job, delay)
    _, output = job.kill()
    return Harm(f"killed {1000 * delay:.1f} ms after step {step} was saved", output)


def _full_disk(victim: Victim, folder: Path, rng: random.Random) -> Harm:
    delay, size = rng.uniform(0, victim.whole), int(10 ** rng.uniform(0, 3.7))
    job = victim.start(folder)
    until(lambda: False, job, delay)
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(job.pid, resource.RLIMIT_FSIZE, (size, size))
    code, output = job.wait()
    return Harm(f"files of at most {size} bytes from {delay:.3f} s on (status {code})", output)


def _damage(spoil: Callable[[Path, random.Random], str]):
    def fault(victim: Victim, folder: Path, rng: random.Random) -> Harm:
        harm = _kill_at_checkpoint(victim, folder, rng, least=2)
        newest = committed(folder)[-1]
        what = spoil(checkpoint_of(folder, newest), rng)
        return Harm(f"{harm.did}; {what}", harm.output, newest if newest in committed(folder) else None)

    return fault


def _some_file(place: Path, rng: random.Random) -> Path:
    """Any file with content; three times in four not one of Orbax's copies by process, which are merged and not read again."""
    files = sorted(path for path in place.rglob("*") if path.is_file() and path.stat().st_size)
    read = [path for path in files if not any(part.startswith("ocdbt.process") for part in path.parts)]
    return rng.choice(read if rng.random() < 0.75 else files)


def _truncate(place: Path, rng: random.Random) -> str:
    path = _some_file(place, rng)
    size, kept = path.stat().st_size, rng.randrange(path.stat().st_size)
    os.truncate(path, kept)
    return f"{path.relative_to(place.parent)} cut from {size} to {kept} bytes"


def _flip(place: Path, rng: random.Random) -> str:
    path = _some_file(place, rng)
    content = bytearray(path.read_bytes())
    bits = rng.sample(range(8 * len(content)), min(rng.randint(1, 8), 8 * len(content)))
    for bit in bits:
        content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    return f"{path.relative_to(place.parent)}: flipped bits {sorted(bits)}"


def _delete_file(place: Path, rng: random.Random) -> str:
    path = _some_file(place, rng)
    path.unlink()
    return f"{path.relative_to(place.parent)} deleted"


def _delete_folder(place: Path, rng: random.Random) -> str:
    path = rng.choice([place, *sorted(path for path in place.rglob("*") if path.is_dir())])
    shutil.rmtree(path)
    return f"folder {path.relative_to(place.parent)} deleted"


FAULTS = {
    "kill_start": _kill_within(lambda v: v.first, signal.SIGKILL),
    "kill_step": _kill_step,
    "kill_save": _kill_save,
    "kill_commit": _kill_commit,
    "kill_restore": _kill_restore,
    "sigterm": _kill_within(lambda v: v.whole, signal.SIGTERM),
    "full_disk": _full_disk,
    "truncated": _damage(_truncate),
    "flipped": _damage(_flip),
    "deleted_file": _damage(_delete_file),
    "deleted_folder": _damage(_delete_folder),
}


# -- cases -----------------------------------------------------------------------------------------------------------


def case(victim: Victim, kind: str, folder: Path, seed: int) -> dict[str, Any]:
    """Harms one run and resumes it; what came of it, as JSON values."""
    began = time.perf_counter()
    harm = FAULTS[kind](victim, folder, random.Random(seed))
    intact = [step for step in committed(folder) if step != harm.damaged]
    newest = max([0, *intact, *map(int, _PROMISED.findall(harm.output))])
    code, output = victim.start(folder).wait()
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
    ended = subprocess.run(command, capture_output=True, text=True, timeout=10 * _LONGEST)
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
            time.sleep(_POLL)
        if job.wait()[0] or final_of(folder / name) != final:
            raise CampaignError(
                f"the run must do the same every time, but {folder / name} differs from {folder / 'whole'}"
            )
    count = final["checkpoints"][-1] if final["checkpoints"] else 0
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
            place.with_suffix(".txt").unlink()
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
