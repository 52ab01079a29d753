"""What `experiments.fault_campaign` does to a run, and how it starts the runs.

    kill_start      SIGKILL before the first checkpoint
    kill_step       SIGKILL at any moment after it
    kill_save       SIGKILL while a checkpoint is being written
    kill_commit     SIGKILL at the moment a checkpoint gets its name
    kill_restore    SIGKILL, and again while the killed run resumes
    kill_peer       SIGKILL to one of two processes at any moment; the other one ends, and both are started again
    sigterm         SIGTERM at any moment
    full_disk       no file of the process can grow beyond a size, from any moment on (RLIMIT_FSIZE: "File too large")
    truncated       SIGKILL, then a file of the newest checkpoint loses its end
    flipped         SIGKILL, then up to eight bits of such a file are flipped
    deleted_file    SIGKILL, then such a file is deleted
    deleted_folder  SIGKILL, then a folder of the newest checkpoint, or all of it, is deleted

A run is forked from a process that has imported its script and used no device: that saves most of a start's time.
"""

import contextlib
import dataclasses
import fcntl
import importlib
import os
import random
import resource
import shutil
import signal
import socket
import sys
import time
import traceback
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

POLL = 0.0005  # seconds between two looks at a folder
_PIPE = 1 << 20  # bytes that a process may print
LONGEST = 120.0  # seconds that one process may take
_GRACE = 3.0  # seconds until one that waits for a lost one is ended, as whoever starts both again does


class CampaignError(RuntimeError):
    """A campaign cannot go on: the unharmed run fails, or a process hangs."""


@dataclasses.dataclass
class Job:
    """A script that runs in a forked process; what it prints stays in a pipe, which no full disk can cut short."""

    pid: int
    folder: Path
    output: int
    began: float

    def alive(self) -> bool:
        """Whether it runs; it is not yet waited for."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def wait(self) -> tuple[int, str]:
        """(exit status, negative for a signal; all it printed)."""
        until(lambda: False, self, None)
        _, status = os.waitpid(self.pid, 0)
        with open(self.output, errors="replace") as output:
            return os.waitstatus_to_exitcode(status), output.read()

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
        final: what its folder holds in the end, by name.
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

    def start_all(self, folder: Path, count: int) -> list[Job]:
        """Starts the command in so many processes that run it together."""
        if count == 1:
            return [self.start(folder)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
        return [self.start(folder, shared | {"JAX_PROCESS_ID": str(i)}) for i in range(count)]

    def start(self, folder: Path, environment: Mapping[str, str] = types.MappingProxyType({})) -> Job:
        """Forks a process that runs the command in a folder."""
        output, theirs = os.pipe()
        fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, _PIPE)
        sys.stdout.flush(), sys.stderr.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # jax warns of forks; it has used no device yet
            pid = os.fork()
        if pid:
            os.close(theirs)
            return Job(pid, folder, output, time.perf_counter())
        status = 1
        try:
            os.dup2(theirs, 1), os.dup2(theirs, 2)
            os.environ |= environment
            status = self.main([*self.argv, f"--workdir={folder}"])
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 1
        except BaseException:  # noqa: BLE001 - this process ends here, and what it died of is in its output
            traceback.print_exc()
        finally:
            if environment and not status:
                # as at an ordinary end: each waits for the others
                importlib.import_module("jax").distributed.shutdown()
            with contextlib.suppress(OSError):
                sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)


def until(happened: Callable[[], bool], job: Job, seconds: float | None) -> None:
    """Waits until something happened, the process ended, or so many seconds have passed (None: it hangs, which is an error)."""
    deadline = time.perf_counter() + (LONGEST if seconds is None else seconds)
    while job.alive() and not happened():
        if time.perf_counter() > deadline:
            if seconds is not None:
                return
            os.kill(job.pid, signal.SIGKILL)
            raise CampaignError(f"a process may take {LONGEST:g} s, but one in {job.folder} took longer")
        time.sleep(POLL)


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


# Each starts a run in a folder and harms it; `rng` draws when and how.


class Harm(NamedTuple):
    """What was done to a run."""

    did: str
    output: str  # what the run had printed until then
    damaged: int | None = None  # step whose checkpoint is damaged, and still there
    processes: int = 1  # that ran together, and are to be started again


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
    output = _killed_after(victim, folder, step, delay)
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
    output = _killed_after(victim, folder, step, delay)
    return Harm(f"killed {1000 * delay:.1f} ms after step {step} was saved", output)


def _killed_after(victim: Victim, folder: Path, step: int, delay: float) -> str:
    """What a training printed that was killed so many seconds after the checkpoint of a step got its name."""
    job = victim.start(folder)
    until(lambda: (committed(folder) or [0])[-1] >= step, job, None)
    until(lambda: False, job, delay)
    _, output = job.kill()
    return output


def _kill_peer(victim: Victim, folder: Path, rng: random.Random) -> Harm:
    killed, count = rng.randrange(2), rng.randrange(victim.saves)
    delay = rng.uniform(0, victim.saving if count else 2 * victim.first)  # two start more slowly than one
    jobs = victim.start_all(folder, 2)
    until(lambda: (committed(folder) or [0])[-1] >= count, jobs[0], None)
    until(lambda: False, jobs[killed], delay)
    status, output = jobs[killed].kill()
    until(lambda: False, jobs[1 - killed], _GRACE)
    other, more = jobs[1 - killed].kill()
    return Harm(
        f"process {killed} {delay:.3f} s after step {count} (status {status}, of the other {other})",
        output + more,
        processes=2,
    )


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
    """Any file with content."""
    return rng.choice(sorted(path for path in place.rglob("*") if path.is_file() and path.stat().st_size))


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
    "kill_peer": _kill_peer,
}
