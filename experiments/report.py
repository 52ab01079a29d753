"""Writes the README's tables from the committed measurements: `python -m experiments.report`."""

import json
import re
import statistics
from pathlib import Path

from rl.objectives.presets import PRESETS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
_FILES = {
    "eggroll": "eggroll/strategy.py",
    "openes": "eggroll/strategy.py",
    "ppo": "rl/control/ppo.py",
    "backprop": "experiments/pretrain.py",
}
_HEADERS = {
    "methods": ("method", "file", "config", "result: **median** (seeds 0, 1, 2)", "training time"),
    "bench": ("case", "setting", "measure", "value"),
}


def _file(row: dict) -> str:
    """Where the method of a result lives; the PPO of control is a trainer of its own, every other preset is a setting."""
    if "task" in row and row["method"] in PRESETS:
        return "rl/objectives/presets.py"
    return _FILES[row["method"]]


def methods() -> list[str]:
    """One row per recipe: the median and every seed's score, and the median time."""
    groups: dict[str, list[dict]] = {}
    for file in ("compare", "recipes", "language", "countdown"):
        for row in json.loads((RESULTS / f"{file}.json").read_text()):
            groups.setdefault(row["config"], []).append(row)
    lines = []
    for config, rows in groups.items():
        first, scores = rows[0], [row["score"] for row in rows]
        each = ", ".join(f"{score:.4g}" for score in scores)
        seconds = statistics.median(row["seconds"] for row in rows)
        task = first.get("env", first.get("task"))
        before = f"{statistics.median(row['before'] for row in rows):.4g} -> " if "before" in first else ""
        lines.append(
            f"| {first['name']} | `{_file(first)}` | `{config}` | {task}: {first['measure']} {before}"
            f"**{statistics.median(scores):.4g}** ({each}) | {seconds:.0f} s |"
        )
    return lines


def bench() -> list[str]:
    """One row per measurement."""
    lines = []
    for line in (RESULTS / "bench.jsonl").read_text().splitlines():
        row = json.loads(line)
        setting = ", ".join(f"{k} {v}" for k, v in row["setting"].items() if k != "steps_per_second")
        lines.append(f"| {row['case']} | {setting} | {row['measure'].replace('_', ' ')} | {row['value']:.3g} |")
    return lines


def filled(readme: str) -> str:
    """The README with both tables as the measurements have them."""
    for table, rows in (("methods", methods()), ("bench", bench())):
        # The header stands inside the markers: a comment after it would end the table.
        header = _HEADERS[table]
        rule = "|---" * len(header) + "|"
        lines = (f"<!-- {table} -->", f"| {' | '.join(header)} |", rule, *rows, f"<!-- /{table} -->")
        text = "\n".join(lines)
        readme = re.sub(rf"<!-- {table} -->.*?<!-- /{table} -->", lambda _, text=text: text, readme, flags=re.DOTALL)
    return readme


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
