"""Every notebook runs from top to bottom on a CPU, in its own kernel, and ends where it says."""

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"


def run(name, monkeypatch):
    """What a notebook prints; its own assertions are errors here."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs before committing"
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs), outputs


def numbers(pattern, printed):
    return [float(x) for x in re.search(pattern, printed).groups()]


def drawn(outputs):
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_every_notebook_has_a_test():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == {"quickstart_es", "quickstart_grpo", "use_ops"}


@pytest.mark.slow
def test_quickstart_es(monkeypatch):
    printed, outputs = run("quickstart_es", monkeypatch)
    evolution, backprop = numbers(r"evolution ([\d.]+), backprop ([\d.]+)", printed)
    assert evolution > 0.97 and abs(evolution - backprop) < 0.03
    assert "reaches 'tanh', which has no low-rank rule" in printed and drawn(outputs) == 1


@pytest.mark.slow
def test_quickstart_grpo(monkeypatch):
    printed, outputs = run("quickstart_grpo", monkeypatch)
    before, after = numbers(r"held-out accuracy ([\d.]+) -> ([\d.]+)", printed)
    assert before < 0.05 and after > 0.75
    assert "[1.0, 0.1, 0.0, 0.0]" in printed and "dr_grpo, dapo, gspo" in printed and drawn(outputs) == 1


@pytest.mark.slow
def test_use_ops(monkeypatch):
    printed, _ = run("use_ops", monkeypatch)
    difference, ours, theirs = numbers(r"token_logprob: largest difference (\S+); ([\d.]+) MiB .* of ([\d.]+)", printed)
    assert difference < 1e-4 and theirs >= 16 > 4 > ours  # [1024, 4096] in f32 are 16 MiB
    # (R - mean) / std of 0 0 1 0 is (R - 1/4) / (1/2); RLOO is R minus the mean of the other three.
    assert "GRPO advantages [-0.5, -0.5, 1.5, -0.5] RLOO [-0.333, -0.333, 1.0, -0.333]" in printed
    assert "unjudged sample [0.0, -0.5, 1.0, -0.5]" in printed
    assert numbers(r"DAPO gradient: largest difference (\S+), clipped 0%", printed)[0] < 1e-4
    assert "advantage +1: loss -1.28" in printed and "advantage -1: loss 1.50" in printed
    for kind, value in (("token_mean", "1.40"), ("sequence_mean", "2.00"), ("sequence_sum", "3.50")):
        assert f"{kind} {value}, by micro-batches {value}" in printed
    assert "packing: 4 rows instead of 8, 99% instead of 49%" in printed  # 190 tokens in 4 x 48 and in 8 x 48 places
    difference, spread = numbers(r"perturbed_call: largest difference (\S+) to .* formed, ([\d.]+) to", printed)
    assert difference < 1e-5 and spread > 0.05
