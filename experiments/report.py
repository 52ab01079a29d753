"""Writes the tables of the README and of experiments/results from the measurements: `python -m experiments.report`."""

import json
import math
import re
import statistics
from pathlib import Path

from rl.objectives.presets import PRESETS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
DOCUMENTS = (ROOT / "README.md", RESULTS / "README.md")
BUDGETS = ("seconds:66", "tokens:870000")  # of the comparison on countdown
EARLY = "tokens:480000"  # of the comparison of integers
FILES = ("compare", "recipes", "language", "countdown", "frugal", "bandit")  # of the methods
_FILES = {
    "eggroll": "eggroll/strategy.py",
    "openes": "eggroll/strategy.py",
    "ppo": "rl/control/ppo.py",
    "backprop": "experiments/pretrain.py",
}
# What the README quotes of the bench: in words, the row it is (case, measure, part of its setting), the goal.
_GOALS = (
    (
        "inference alone / perturbed forward pass: width 1,024, 256 members",
        ("population_forward", "inference_over_forward"),
        {"width": 1024, "members": 256, "rows": 1, "rank": 1, "design": "crossed", "noise": "gaussian"},
        "> 0.90",
    ),
    (
        "the same: width 256, 4,096 members",
        ("population_forward", "inference_over_forward"),
        {"width": 256, "members": 4096, "rows": 1, "rank": 1, "design": "crossed", "noise": "gaussian"},
        "> 0.75",
    ),
    (
        "update / forward pass of all members: width 1,024, 256 members",
        ("es_update", "update_over_forward"),
        {"width": 1024, "design": "crossed", "noise": "gaussian"},
        "< 0.50",
    ),
    (
        "the same: width 256, 4,096 members",
        ("es_update", "update_over_forward"),
        {"width": 256, "design": "crossed", "noise": "gaussian"},
        "< 0.30",
    ),
    (
        "a generation of full-rank OpenES / of EGGROLL",
        ("openes", "openes_over_eggroll"),
        {"openes_design": "antithetic"},
        "> 100",
    ),
    (
        "environment steps per second / evosax's OpenES: 3 x 256, 256 members",
        ("control", "eggroll_over_evosax"),
        {"hidden": [256, 256, 256], "members": 256},
        "> 10",
    ),
    (
        "tokens per second of the engine / a plain jitted loop: equal lengths",
        ("decode", "engine_over_plain"),
        {"lengths": "equal"},
        "> 0.9",
    ),
    (
        "the same / static batches: long-tailed lengths, 16 slots",
        ("decode", "engine_over_static"),
        {"slots": 16},
        "> 1.3",
    ),
    (
        "a whole step of GRPO / a tuned hand-written one",
        ("grpo_step", "ours_over_tuned"),
        {"part": None},
        "< 1.0",
    ),
    (
        "a step of FRUGAL / of AdamW: width 2,048, blocks",
        ("optimizer", "step_over_adamw"),
        {"width": 2048, "projection": "block"},
        "< 1.15",
    ),
    (
        "a loop that saves 200 MB at every step of 1.2 s / one that does not",
        ("checkpoint", "saving_over_plain"),
        {"state_mb": 200, "way": "writer"},
        "< 1.10",
    ),
    (
        "the same with Orbax's own asynchronous saves",
        ("checkpoint", "saving_over_plain"),
        {"state_mb": 200, "way": "orbax"},
        "",
    ),
)
_HEADERS = {
    "headlines": ("ratio inside one run, plain JAX on two CPU cores", "measured", "goal"),
    "methods": ("method", "file", "config", "result: **median** (seeds 0, 1, 2)", "training time"),
    "countdown": ("method", "before", *(f"within {x.replace(':', ' ')}" for x in BUDGETS), "at the end"),
    "staleness": ("method", "k = 0", "k = 4", "k = 16", "k = 64"),
    "selection": ("prompts", "at the end", "steps to 10 %", "completions", "seconds"),
    "pretrain": ("optimizer", "file", "config", "bytes of state", "held-out bits per byte", "training time"),
    "integers": (
        "model",
        "config",
        "held-out bits per byte after 480,000 tokens",
        "at the end",
        "tokens",
        "training time",
    ),
    "bench": ("case", "setting", "measure", "value"),
}


def _file(row: dict) -> str:
    """Where the method of a result lives; the PPO of control is a trainer of its own, every other preset is a setting."""
    if "task" in row and row["method"] in PRESETS:
        return "rl/objectives/presets.py"
    return _FILES[row["method"]]


def methods() -> list[str]:
    """One row per recipe: the median and every seed's score, and the median time."""
    groups = {}
    for file in FILES:
        groups |= _by_config(file)
    lines = []
    for config, rows in groups.items():
        first, scores = rows[0], [row["score"] for row in rows]
        seconds = statistics.median(row["seconds"] for row in rows)
        task = first.get("env", first.get("task"))
        before = f"{statistics.median(row['before'] for row in rows):.4g} -> " if "before" in first else ""
        lines.append(
            f"| {first['name']} | `{_file(first)}` | `{config}` | {task}: {first['measure']} {before}"
            f"{_median_of(scores)} | {seconds:.0f} s |"
        )
    return lines


def countdown() -> list[str]:
    """Held-out problems solved in %, before, within equal budgets and at the end."""
    lines = []
    for rows in _by_config("countdown").values():
        budgets = [[100 * row["within"][budget] for row in rows] for budget in rows[0]["within"]]
        cells = [[row["before"] for row in rows], *budgets, [row["score"] for row in rows]]
        lines.append(f"| {rows[0]['name']} | {' | '.join(map(_median_of, cells))} |")
    return lines


def staleness() -> list[str]:
    """Held-out words solved in % at the end, per method and age of the answers."""
    table: dict[str, dict[str, str]] = {}
    for config, rows in _by_config("staleness").items():
        method, _, lag = config.partition(":")[2].rpartition("_")
        table.setdefault(method, {})[f"k = {lag}"] = _median_of([row["score"] for row in rows])
    return [
        f"| {method.replace('_', ' ')} | {' | '.join(cells[k] for k in _HEADERS['staleness'][1:])} |"
        for method, cells in table.items()
    ]


def selection() -> list[str]:
    """Held-out words solved in % at the end, and what it took until a share was first reached."""
    lines = []
    for config, rows in _by_config("dots").items():
        taken = [[(row["reached"] or {}).get(x, math.inf) for row in rows] for x in ("step", "completions", "seconds")]
        cells = [[row["score"] for row in rows], *taken]
        lines.append(f"| {config.partition(':')[2].replace('_', ' ')} | {' | '.join(map(_median_of, cells))} |")
    return lines


def pretrain() -> list[str]:
    """Held-out bits per byte and state of every optimizer, fewest bits first."""
    groups = sorted(_by_config("pretrain").values(), key=lambda rows: statistics.median(row["score"] for row in rows))
    lines = []
    for rows in groups:
        name = rows[0]["name"].partition(" ")[0]
        file = f"rl/optim/{name}.py" if (ROOT / "rl" / "optim" / f"{name}.py").is_file() else "optax"
        lines.append(
            f"| {rows[0]['name']} | `{file}` | `{rows[0]['config']}` | {rows[0]['optimizer_bytes']:,} | "
            f"{_median_of([row['score'] for row in rows])} | {statistics.median(row['seconds'] for row in rows):.0f} s |"
        )
    return lines


def integers() -> list[str]:
    """Held-out bits per byte of the integer model and of its twin by backprop."""
    lines = []
    for config, rows in (_by_config("integers_long") | _by_config("integers")).items():
        cells = [[row["within"][EARLY] for row in rows], [row["score"] for row in rows]]
        seconds = statistics.median(row["seconds"] for row in rows)
        lines.append(
            f"| {rows[0]['name']} | `{config.partition('@')[0]}` | {' | '.join(map(_median_of, cells))} | "
            f"{rows[0]['tokens']:,} | {seconds:.0f} s |"
        )
    return lines


def _by_config(file: str) -> dict[str, list[dict]]:
    """The rows of a comparison, seed by seed."""
    groups: dict[str, list[dict]] = {}
    for row in json.loads((RESULTS / f"{file}.json").read_text()):
        groups.setdefault(row["config"], []).append(row)
    return groups


def _median_of(values: list[float]) -> str:
    median, *each = ("never" if math.isinf(x) else f"{x:.4g}" for x in (statistics.median(values), *values))
    return f"**{median}** ({', '.join(each)})"


def headlines() -> list[str]:
    """The measurements that the project has goals for."""
    rows = _measured()
    lines = []
    for words, case, setting, goal in _GOALS:
        (value,) = (
            row["value"]
            for row in rows
            if (row["case"], row["measure"]) == case and all(row["setting"].get(k) == v for k, v in setting.items())
        )
        lines.append(f"| {words} | **{value:.3g}** | {goal} |")
    return lines


def bench() -> list[str]:
    """One row per measurement."""
    lines = []
    for row in _measured():
        setting = ", ".join(f"{k} {v}" for k, v in row["setting"].items() if k != "steps_per_second")
        lines.append(f"| {row['case']} | {setting} | {row['measure'].replace('_', ' ')} | {row['value']:.3g} |")
    return lines


def _measured() -> list[dict]:
    return [json.loads(line) for line in (RESULTS / "bench.jsonl").read_text().splitlines()]


def tables() -> dict[str, list[str]]:
    """Name -> rows of every table."""
    made = (headlines, methods, countdown, staleness, selection, pretrain, integers, bench)
    return {make.__name__: make() for make in made}


def filled(document: str) -> str:
    """The document with each of its tables as the measurements have it."""
    for table, rows in tables().items():
        # The header stands inside the markers: a comment after it would end the table.
        header = _HEADERS[table]
        rule = "|---" * len(header) + "|"
        lines = (f"<!-- {table} -->", f"| {' | '.join(header)} |", rule, *rows, f"<!-- /{table} -->")
        text = "\n".join(lines)
        document = re.sub(
            rf"<!-- {table} -->.*?<!-- /{table} -->", lambda _, text=text: text, document, flags=re.DOTALL
        )
    return document


if __name__ == "__main__":
    for path in DOCUMENTS:
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
