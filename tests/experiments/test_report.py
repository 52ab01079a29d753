"""The README quotes the committed measurements, and nothing else."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import report

DOCUMENTS = [path.read_text(encoding="utf-8") for path in report.DOCUMENTS]
README = DOCUMENTS[0]


def test_the_tables_are_those_of_the_results():
    assert [report.filled(text) for text in DOCUMENTS] == DOCUMENTS
    assert len(report.methods()) >= 8 and len(report.bench()) >= 10


def test_every_table_is_one_block_of_rows_of_one_width_in_one_document():
    for table, rows in report.tables().items():
        (text,) = (text for text in DOCUMENTS if f"<!-- {table} -->" in text)
        lines = text.partition(f"<!-- {table} -->\n")[2].partition(f"\n<!-- /{table} -->")[0].splitlines()
        assert lines[2:] == rows and set(lines[1]) == {"|", "-"}
        assert len({line.count("|") for line in lines}) == 1


def test_every_link_of_the_documents_leads_somewhere():
    for path, text in zip(report.DOCUMENTS, DOCUMENTS, strict=True):
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#]+)(#[^)]*)?\)", prose):
            file, anchor = path.parent / target[0], target[1].removeprefix("#")
            assert file.is_file(), target
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
            assert not anchor or anchor in {re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.slow
def test_the_readme_example_goes_from_and_to_where_it_says():
    example = re.search(r"```python\n(import eggroll.*?)```", README, re.DOTALL)[1]
    stated = re.search(r"# of state.params: (\S+) at first, (\S+) now", example)
    example += "print(es.evaluate_mean(es.init(params, jax.random.key(0)), score, batch).mean())"
    done = subprocess.run([sys.executable, "-c", example], cwd=report.ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    last, first = map(float, done.stdout.split())
    assert first == pytest.approx(float(stated[1]), abs=0.005) and last == pytest.approx(float(stated[2]), abs=0.03)


@pytest.mark.slow
def test_the_readme_example_of_the_engine_runs():
    pytest.importorskip("tokenizers", reason="needs the extra language")
    stories = Path(os.environ.get("EGGROLL_DATA", report.ROOT.parent / "shared" / "data")) / "stories260K"
    if not stories.is_dir():
        pytest.skip(f"no stories260K in {stories.parent} (set EGGROLL_DATA)")
    example = next(e for e in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "generate(" in e)
    example = (
        example.replace('"stories260K"', repr(str(stories))) + "print(members.member.tolist(), members.length.min())"
    )
    done = subprocess.run([sys.executable, "-c", example], cwd=report.ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert str(list(range(16))) in done.stdout


def test_the_readme_example_of_the_losses_runs():
    example = next(e for e in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "Credit(" in e)
    names = {}
    exec(compile(example, "README.md", "exec"), names)  # noqa: S102 - our own text
    advantage, out = names["advantage"], names["out"]
    assert advantage[:, 0].tolist() == pytest.approx([0.866025, -0.866025, 0.866025, -0.866025], abs=1e-4)
    assert (float(out.numerator), float(out.denominator)) == (pytest.approx(0, abs=1e-5), 20)


def test_the_readme_example_of_the_optimizers_runs(capsys):
    exec(
        compile(
            next(e for e in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "frugal" in e), "README.md", "exec"
        ),
        {},
    )  # noqa: S102
    # 8 bytes per entry of the embedding, and of one kernel in four; three counters of 4 bytes each
    assert capsys.readouterr().out.split(" ", 1) == ["131072", "{'full': 131076, 'split': 32776}\n"]


@pytest.mark.slow
def test_the_readme_example_of_integers_runs():
    example = next(e for e in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "EggConfig" in e)
    names = {}
    exec(compile(example, "README.md", "exec"), names)  # noqa: S102 - our own text
    assert int(names["metrics"]["moved"]) > 0 and names["carry"].shape == (64, 1, 1, 16)


@pytest.mark.parametrize("file", report.FILES)
def test_the_docstring_of_a_recipe_has_the_measured_scores_and_its_command(file):
    for row in json.loads((report.RESULTS / f"{file}.json").read_text()):
        path = row["config"].partition(":")[0]
        docstring = ast.get_docstring(ast.parse((report.ROOT / path).read_text()))
        forms = {f"{row['score']:.{digits}f}" for digits in (0, 1, 2)}
        assert forms & set(re.findall(r"-?\d+(?:\.\d+)?", docstring)), (row["config"], row["seed"], row["score"])
        assert f"--config={path} --workdir=" in docstring and "TBD" not in docstring
