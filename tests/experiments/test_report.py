"""The README quotes the committed measurements, and nothing else."""

from experiments import report


def test_the_readme_tables_are_those_of_the_results():
    text = (report.ROOT / "README.md").read_text(encoding="utf-8")
    assert report.filled(text) == text
    assert len(report.methods()) >= 8 and len(report.bench()) >= 10
