"""The campaign of faults: seeded cases of every kind are well, and one that is not would be seen."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import fault_campaign, faults

ROOT = Path(__file__).parents[2]
CASES = 20


def campaign(tmp_path, *arguments):
    """In a process that has used no device, as it forks; what it keeps goes to `tmp_path`."""
    return subprocess.run(
        [sys.executable, "-m", "experiments.fault_campaign", *arguments],
        cwd=ROOT, env=os.environ | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.slow
def test_seeded_cases_of_every_kind_are_well(tmp_path):
    out = tmp_path / "table.json"
    ended = campaign(tmp_path, f"--runs={CASES}", "--seed=11", f"--out={out}")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = json.loads(out.read_text())
    assert report["runs"] == CASES and report["not_well"] == [] and f"{CASES} of {CASES} cases well" in ended.stdout
    assert [row["fault"] for row in report["table"]] == list(faults.FAULTS)
    for row in report["table"]:
        assert row["resumed_from_newest_intact"] == row["bit_equal"] == row["runs"] >= 1
        assert row["lost_steps"] == row["silent"] == 0
    assert ended.stdout.count(": well\n") == CASES
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.slow
def test_a_run_that_resumes_wrongly_is_seen_and_kept(tmp_path):
    out = tmp_path / "table.json"
    victim = ("--script=tests.experiments.forgetful_victim", f"--config={ROOT}/experiments/victim.py")
    ended = campaign(tmp_path, "--runs=2", "--faults=kill_restore,kill_start", f"--out={out}", *victim)
    assert ended.returncode == 1 and "1 of 2 cases well" in ended.stdout, ended.stdout + ended.stderr
    report = json.loads(out.read_text())
    (row,) = report["not_well"]
    assert row["kind"] == "kill_restore" and row["silent"] and row["lost"] == 0 and row["status"] == 0
    assert {"metrics.jsonl", "state", "result"} <= set(row["different"]) and "resumed" in row["output"]
    assert [line["bit_equal"] for line in report["table"]] == [1, 0]
    (kept,) = tmp_path.glob("fault_campaign-*/case*/checkpoints")
    assert f"NOT WELL, kept: {kept.parents[1]}" in ended.stdout


@pytest.mark.parametrize("spoil", [faults._truncate, faults._flip, faults._delete_file])
def test_damage_is_to_one_file_and_seeded(tmp_path, spoil):
    did = []
    for name in ("a", "b"):
        place = tmp_path / name / "0000000003"
        (place / "arrays").mkdir(parents=True)
        for file in ("meta.json", "arrays/one", "arrays/two", "arrays/three"):
            (place / file).write_bytes(b"x" * 50)
        did.append(spoil(place, random.Random(4)))
        files = [path.read_bytes() for path in place.rglob("*") if path.is_file()]
        assert files.count(b"x" * 50) == 3
        if spoil is faults._flip:
            (hurt,) = [file for file in files if file != b"x" * 50]
            assert 1 <= sum((a ^ 120).bit_count() for a in hurt) <= 8
    assert did[0] == did[1] and "0000000003/" in did[0]


def test_what_is_not_well():
    row = {
        "kind": "kill_save",
        "in_place": True,
        "bit_equal": True,
        "lost": 0,
        "named": False,
        "harmless": False,
        "silent": False,
    }
    assert fault_campaign.well(row)
    for change in ({"in_place": False}, {"bit_equal": False}, {"lost": 1}, {"silent": True}):
        assert not fault_campaign.well(row | change)
    (line,) = fault_campaign.table([row, row | {"lost": 3, "bit_equal": False, "silent": True}])
    assert (line["runs"], line["bit_equal"], line["lost_steps"], line["silent"]) == (2, 1, 3, 1)
    assert fault_campaign.show([line]).splitlines()[2] == "| kill_save | 2 | 2 | 1 | 3 | 0 | 0 | 1 |"


def test_a_command_that_fails_unharmed_is_one_error(tmp_path):
    ended = campaign(tmp_path, "--runs=1", "--config.steps=0")
    assert ended.returncode == 2 and "the unharmed run must succeed" in ended.stderr
    assert "total_steps must be at least 1" in ended.stderr
    assert "--runs must be at least 1; got 0" in campaign(tmp_path, "--runs=0").stderr
    assert "--faults knows kill_start, " in campaign(tmp_path, "--faults=flood").stderr
