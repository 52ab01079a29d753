"""The progress line: one line rewritten in place on a terminal, one line every few seconds in a log."""

import collections
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

_LOG_SECONDS = 5.0  # between lines where the output is not a terminal
_TERMINAL_SECONDS = 0.1
_WINDOW = 20  # updates the rate is averaged over


class Progress:
    """Shows `step done/total`, time left, rates and chosen metrics on standard error."""

    def __init__(self, total: int, unit: str, show: Sequence[str], stream: TextIO | None = None) -> None:
        """Prints nothing yet.

        Args:
          total: the last step.
          unit: name of the cumulative work column in the rows, whose rate is shown too.
          show: names of the metrics to show; the last value seen of each.
          stream: standard error if None.
        """
        self._total, self._unit, self._show = total, unit, tuple(show)
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._seen: dict[str, Any] = {}
        self._times: collections.deque[tuple[float, int, int | None]] = collections.deque(maxlen=_WINDOW)
        self._printed, self._width = float("-inf"), 0

    def start(self, step: int, work: int) -> None:
        """Starts the clock at `step` completed steps and `work` units."""
        self._times.clear()
        self._times.append((time.perf_counter(), step, work))

    def update(self, row: Mapping[str, Any]) -> None:
        """Takes one row of metrics with its `step`, and prints if it is time."""
        now = time.perf_counter()
        self._times.append((now, row["step"], row.get(self._unit)))
        self._seen.update({name: row[name] for name in self._show if name in row})
        pause = _TERMINAL_SECONDS if self._live else _LOG_SECONDS
        if row["step"] >= self._total or now - self._printed >= pause:
            self._printed = now
            self._write(self._text())

    def say(self, line: str) -> None:
        """Prints a line of its own."""
        self.close()
        print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """Ends a line that is being rewritten."""
        if self._width:
            print(file=self._stream, flush=True)
            self._width = 0

    def _write(self, text: str) -> None:
        if self._live:
            print("\r" + text.ljust(self._width), end="", file=self._stream, flush=True)
            self._width = len(text)
        else:
            print(text, file=self._stream, flush=True)

    def _text(self) -> str:
        (t0, step0, work0), (t1, step1, work1) = self._times[0], self._times[-1]
        elapsed = max(t1 - t0, 1e-9)
        rate = (step1 - step0) / elapsed
        parts = [
            f"step {step1}/{self._total}",
            f"eta {_clock((self._total - step1) / rate)}",
            f"{_short(rate)} steps/s",
        ]
        if work1 is not None:
            parts.append(f"{_short((work1 - work0) / elapsed)} {self._unit}/s")
        return "  ".join(parts + [f"{name} {_short(value)}" for name, value in self._seen.items()])


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _short(value: float) -> str:
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / {'G': 1e9, 'M': 1e6, 'k': 1e3}[suffix]:.3g}{suffix}"
    return f"{value:.4g}"
