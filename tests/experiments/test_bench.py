"""The bench: what is timed, in which order, and one JSON object per line."""

import json

import pytest

import eggroll
from experiments import bench


def test_things_compared_are_timed_in_turn_and_the_median_counts(monkeypatch):
    clock, calls = iter(range(1000)), []
    durations = {"slow": iter([50, 50, 3, 9, 4]), "fast": iter([90, 90, 1, 1, 2])}
    now = [0.0]

    def work(name):
        calls.append(name)
        now[0] += next(durations[name])
        return next(clock)

    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    seconds = bench.timed_in_turn({name: lambda name=name: work(name) for name in durations}, repeats=3)
    assert calls == ["slow", "fast"] * 5
    assert seconds == {"slow": 4, "fast": 1}  # of (3, 9, 4) and (1, 1, 2): two rounds of warm-up do not count


def small_settings():
    for design in ("crossed", "antithetic"):
        setting = {"width": 16, "members": 16, "rows": 1, "rank": 1, "design": design, "noise": "gaussian"}
        yield setting, bench._functions(16, getattr(eggroll, design)(16))


@pytest.mark.parametrize(
    ("case", "measure", "parts"),
    [
        ("population_forward", "inference_over_forward", ("inference", "forward")),
        ("es_update", "update_over_forward", ("update", "forward")),
    ],
)
def test_one_json_object_per_line(case, measure, parts, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench, "_dense_settings", small_settings)
    bench.main([case, "--repeats=2", f"--out={tmp_path / 'out.jsonl'}"])
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["setting"]["design"] for row in rows] == ["crossed", "antithetic"]
    for row in rows:
        assert (row["case"], row["measure"], row["repeats"]) == (case, measure, 2)
        assert row["value"] == pytest.approx(row["seconds"][parts[0]] / row["seconds"][parts[1]], rel=0.05, abs=0.01)
        assert row["device"].startswith("cpu x") and {"jax", "jaxlib", "flax", "optax"} <= row["versions"].keys()
        assert row["command"] == f"python -m experiments.bench {case} --repeats=2" and len(row["date"]) == 10
    assert (tmp_path / "out.jsonl").read_text() == out
    assert err.count(case) == 2


def test_an_unknown_case_lists_those_that_exist(capsys):
    with pytest.raises(SystemExit) as error:
        bench.main(["decoding"])
    assert error.value.code == 2 and "population_forward" in capsys.readouterr().err
