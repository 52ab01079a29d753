"""One harness for every experiment script: working directory, resume, metrics, progress, checkpoints.

    with Run(workdir, config, total_steps=100, save_every=20, unit="env_steps") as run:
        state = run.restore(state)
        while run.step < run.total_steps:
            state, metrics = step(state)
            run.record(state, metrics, work=4096)

The folder holds `config.json` (the resolved config), `metrics.jsonl` (deterministic values keyed by step),
`timing.jsonl` (wall clock), `checkpoints/`, `lock`, and `result.json` once the run is finished. The same command
resumes. Of several processes (`rl.mesh.connect`), which all run the same script, the first writes the files, all write
checkpoints, and all stop in the same step. On one machine, with the same versions and a deterministic `step`, a run killed at
any instant and resumed ends with the state and the `metrics.jsonl` of the run that was never killed, byte for byte; the clock
is outside that guarantee.
"""

import collections
import math
import os
import signal
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import jax
import ml_collections
import numpy as np

from rl import checkpoint, progress
from rl import config as config_lib
from rl import mesh as meshes
from rl import workdir as files
from rl.workdir import RunError as RunError

_AHEAD = 2  # steps dispatched but not yet read back: enough to keep the device busy, few enough to bound memory


class Run:
    """A working directory that is being trained in; use as a context manager.

    Attributes:
      step: number of completed steps, over all resumed sessions.
      total_steps: the number of steps the run ends at.
      work: units of work done so far, over all resumed sessions (the sum of `record`'s `work`).
      workdir: the folder.
      fallbacks: unusable checkpoints that this session had to pass over.
    """

    def __init__(
        self,
        workdir: str | Path,
        config: ml_collections.ConfigDict | Mapping[str, Any],
        *,
        total_steps: int,
        save_every: int,
        unit: str = "env_steps",
        show: Sequence[str] = ("fitness_mean",),
        keep: checkpoint.Keep = checkpoint.KEEP,
        logs: Sequence[str] = (),
        data: Mapping[str, Any] | None = None,
        tensorboard: bool = False,
    ) -> None:
        """Describes the run; nothing is touched before `with`.

        Args:
          workdir: folder of this run; created if needed.
          config: the resolved config, compared with the one the folder was started with.
          total_steps: number of steps, at least 1.
          save_every: steps between checkpoints, at least 1; the last step is always saved.
          unit: what `record`'s `work` counts; becomes a cumulative column of `metrics.jsonl`.
          show: names of metrics on the progress line, in order.
          keep: which checkpoints outlive newer ones; `best` compares a metric of the step that is saved.
          logs: names of further files, written by `log` and `append`; kept in step with the checkpoints as `metrics.jsonl` is.
          data: what identifies the data beside the config, JSON values; must be the same where the run is resumed.
          tensorboard: also write event files to `workdir/tensorboard` (extra `tensorboard`).

        Raises:
          RunError: a number below 1.
        """
        for name, value in (("total_steps", total_steps), ("save_every", save_every)):
            if value < 1:
                raise RunError(f"{name} must be at least 1, not {value}")
        self.workdir = Path(workdir)
        self.total_steps, self.step, self.work, self.fallbacks = total_steps, 0, 0, 0
        self._config = config_lib.resolved(config)
        self._log_names, self._logs = tuple(logs), {}
        self._data = dict(data or {})
        self._save_every, self._unit = save_every, unit
        self._writer = checkpoint.Writer(self.workdir / "checkpoints", keep)
        self._values: dict[str, Any] = {}  # the metrics of the newest row
        self._tensorboard, self._events = tensorboard, None
        self._progress = progress.Progress(total_steps, unit, show)
        self._pending: collections.deque[tuple[int, int | None, Mapping[str, Any]]] = collections.deque()
        self._restored = self._signalled = self._terminated = False
        self._seconds_before = self._seconds = 0.0  # training time of earlier sessions, and up to the last save

    def __enter__(self) -> Self:
        try:
            self.workdir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"a working directory must be a folder, but {self.workdir} cannot be made one ({error.strerror}): "
                "use another --workdir"
            ) from error
        try:
            meshes.check_agreement(self._config)
        except ValueError as error:
            raise RunError(str(error)) from error
        self._main, self._lock = meshes.is_main(), None
        try:
            if self._main:
                self._lock = files.lock(self.workdir)
                files.settle_config(self.workdir, self._config)
                files.settle_data(self.workdir, self._data)
            # Appending files are only cut back in `restore`, once it is known to which step.
            place = lambda name: self.workdir / name if self._main else os.devnull
            self._metrics = open(place("metrics.jsonl"), "ab", buffering=0)
            self._timing = open(place("timing.jsonl"), "ab", buffering=0)
            self._logs = {name: open(place(name), "ab", buffering=0) for name in self._log_names}
        except BaseException:
            if self._lock is not None:
                self._lock.close()
            meshes.agreed(0)
            raise
        if not all(meshes.agreed(1)):
            raise RunError(f"process 0 could not begin in {self.workdir}; what it says is the reason")
        if not self._main:
            self._progress = progress.Progress(self.total_steps, self._unit, (), open(os.devnull, "w"))
        self._started = self._last = time.perf_counter()
        self._handler = None
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGTERM, self._on_sigterm)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._drain(0)
        finally:
            self._close(error)
        if kind is None and self._signalled:
            raise SystemExit(128 + signal.SIGTERM)

    def _close(self, error: BaseException | None) -> None:
        """Waits for what is being saved, whatever else happened, and lets go of everything."""
        try:
            if not (isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1):
                self._writer.close()  # a process that was lost would never come to the end of its part
        except Exception as failure:
            if error is None:
                raise
            self._progress.say(f"warning: the last checkpoint was not written ({type(failure).__name__}: {failure})")
        finally:
            self._release()

    def _release(self) -> None:
        self._progress.close()
        for file in (self._metrics, self._timing, *self._logs.values(), self._events, self._lock):
            if file is not None:
                file.close()
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)

    def restore(self, state: Any) -> Any:
        """Continues from the newest usable checkpoint, or starts at step 0 with `state`.

        Cuts `metrics.jsonl`, `timing.jsonl` and the logs back to that step. Call once, before the first `record`.

        Args:
          state: the initial state; its structure, shapes and dtypes are what a checkpoint must have.

        Returns:
          The state to train on; sets `step` and `work`.

        Raises:
          rl.checkpoint.CheckpointError: the checkpoint belongs to another kind of state.
          RunError: `metrics.jsonl` or a log is shorter than the checkpoint says.
        """
        found = checkpoint.restore(self.workdir / "checkpoints", state)
        for line in found.skipped:
            self._progress.say(f"warning: {line}")
        self.fallbacks = len(found.skipped)
        self.step, self.work = found.step, found.extra.get("work", 0)
        self._seconds = self._seconds_before = found.extra.get("seconds", 0.0)
        if self._main:
            files.cut(self._metrics, found.extra.get("metrics_bytes", 0), self.step)
            files.cut(self._timing, min(found.extra.get("timing_bytes", 0), self._timing.tell()), self.step)
            for name, file in self._logs.items():
                files.cut(file, found.extra.get("log_bytes", {}).get(name, 0), self.step)
        if self._tensorboard and self._main:
            self._events = files.event_writer(self.workdir / "tensorboard", self.step)
        if self.step:
            self._progress.say(f"resumed {self.workdir} at step {self.step} of {self.total_steps}")
        self._progress.start(self.step, self.work)
        self._started = self._last = time.perf_counter()
        self._restored = True
        return found.state

    def say(self, line: str) -> None:
        """Prints a line of its own, beside the progress line."""
        self._progress.say(line)

    def log(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends rows, deterministic JSON values, to one of `logs`; call before the `record` of the step they belong to."""
        self.append(name, b"".join(map(files.json_line, rows)))

    def append(self, name: str, content: bytes) -> None:
        """Appends bytes to one of `logs`, as `log` appends rows."""
        files.append(self._logs[name], content)

    def record(self, state: Any, metrics: Mapping[str, Any], work: int | None = None) -> None:
        """Counts one step: appends its metrics, shows progress, saves when due.

        Metrics are read back up to two steps later, so the device is not kept waiting; a checkpoint reads all of them.

        Args:
          state: the state after the step; if a checkpoint is due, a snapshot of it is taken, and written while training
            goes on: the next step may donate it.
          metrics: deterministic scalars (jax, NumPy or Python numbers) by name. `finite_members == 0` ends the run.
          work: units done in this step (such as environment steps), a Python int.

        Raises:
          RunError: no member of the population had a finite fitness; the checkpoints on disk stay as they are.
          ValueError: a metric is not a scalar, or is called `step` or like the unit.
          SystemExit: status 143, after saving, if SIGTERM came.
          Exception: why an earlier checkpoint could not be written, such as a full disk.
        """
        if not self._restored:
            raise RunError("call run.restore(state) before the first run.record(...)")
        taken = {"step", self._unit} & metrics.keys()
        if taken:
            raise ValueError(f"metric names step and {self._unit} are taken; rename {sorted(taken)}")
        self.step += 1
        if work is not None:
            self.work += int(work)
        self._pending.append((self.step, None if work is None else self.work, dict(metrics)))
        self._terminated = any(meshes.agreed(self._signalled))  # a signal that comes from now on is of the next step
        saved = self._terminated or self.step % self._save_every == 0 or self.step >= self.total_steps
        if saved:
            self._save(state)
        else:
            self._drain(_AHEAD)
        if self._terminated or self.step >= self.total_steps:
            self._writer.wait()
        if saved and self._terminated:
            self._progress.say(f"SIGTERM: saved step {self.step}; the same command resumes")
            raise SystemExit(128 + signal.SIGTERM)

    def finish(self, measure: str, score: float, **details: Any) -> dict[str, Any]:
        """Writes `result.json`: the run's one figure of merit and what explains it.

        Args:
          measure: what the score is, in words.
          score: higher is better, unless it measures an error.
          **details: further JSON values.

        Returns:
          What was written: `measure`, `score`, `seed`, `details`, the work done under its unit's name, and `seconds`
          of training over all sessions, compilation included.
        """
        self._drain(0)
        result = {"measure": measure, "score": score, "seed": self._config.get("seed"), **details}
        result |= {self._unit: self.work, "seconds": self._seconds}
        if self._main:
            files.write_json(self.workdir / "result.json", result)
        return result

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
        if not self._restored:  # nothing to save yet, and the way to the first step may be long
            raise SystemExit(128 + signal.SIGTERM)

    def _save(self, state: Any) -> None:
        """Hands a snapshot to the writer, together with how far the files go that belong to it."""
        self._drain(0)
        self._seconds = self._seconds_before + time.perf_counter() - self._started
        extra = {
            "work": self.work,
            "metrics_bytes": self._metrics.tell(),
            "timing_bytes": self._timing.tell(),
            "log_bytes": {name: file.tell() for name, file in self._logs.items()},
            "seconds": self._seconds,
            "metrics": {name: value for name, value in self._values.items() if math.isfinite(value)},
        }
        counted = (self._metrics, self._timing, *self._logs.values()) if self._main else ()
        self._writer.submit(self.step, state, extra, counted)

    def _drain(self, leave: int) -> None:
        """Reads back and writes the oldest pending rows until `leave` are left."""
        while len(self._pending) > leave:
            step, work, metrics = self._pending.popleft()
            values = {name: _scalar(name, value) for name, value in jax.device_get(metrics).items()}
            now = time.perf_counter()
            row = {"step": step} | ({} if work is None else {self._unit: work}) | values
            files.append(self._metrics, files.json_line(row))
            self._values = values
            seconds = self._seconds_before + now - self._started
            timing = {"step": step, "seconds": seconds, "steps_per_second": 1.0 / max(now - self._last, 1e-9)}
            if self._writer.blocked:
                timing["save_blocked_seconds"] = self._writer.blocked
            if self.fallbacks:
                timing["checkpoint_fallbacks"] = self.fallbacks
            files.append(self._timing, files.json_line(timing))
            self._last = now
            if self._events is not None:
                for name, value in values.items():
                    self._events.add_scalar(name, value, step)
            self._progress.update(row)
            if values.get("finite_members", 1) == 0:
                raise RunError(
                    f"step {step}: none of the members has a finite fitness, so there is nothing to learn from "
                    f"(finite_members = 0, at least 1 needed). Checkpoints up to the last save are untouched in "
                    f"{self.workdir}; check the reward for NaN or overflow, or lower sigma or the learning rate"
                )


def _scalar(name: str, value: Any) -> bool | int | float:
    """A Python number with exactly the value of the array: f32 widens to f64 without rounding."""
    array = np.asarray(value)
    if array.ndim or array.dtype == object:
        raise ValueError(f"metrics are scalars, but {name} has shape {array.shape}, dtype {array.dtype}: reduce it")
    if array.dtype == bool or np.issubdtype(array.dtype, np.integer):
        return array.item()
    return float(array)
