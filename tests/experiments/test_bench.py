"""The bench: what is timed, in which order, and one JSON object per line."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eggroll
from experiments import bench
from experiments.bench import evolution, harness, integer, language
from rl.models.presets import make, preset
from rl.rollout.score import score as blocked_score


def test_things_compared_are_timed_in_turn_and_the_median_counts(monkeypatch):
    clock, calls = iter(range(1000)), []
    durations = {"slow": iter([50, 50, 3, 9, 4]), "fast": iter([90, 90, 1, 1, 2])}
    now = [0.0]

    def work(name):
        calls.append(name)
        now[0] += next(durations[name])
        return next(clock)

    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])
    seconds = harness.timed_in_turn({name: lambda name=name: work(name) for name in durations}, repeats=3)
    assert calls == ["slow", "fast"] * 5
    assert seconds == {"slow": 4, "fast": 1}  # of (3, 9, 4) and (1, 1, 2): two rounds of warm-up do not count


def small_settings():
    for design in ("crossed", "antithetic"):
        setting = {"width": 16, "members": 16, "rows": 1, "rank": 1, "design": design, "noise": "gaussian"}
        yield setting, evolution._functions(16, getattr(eggroll, design)(16))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "measure", "parts"),
    [
        ("population_forward", "inference_over_forward", ("inference", "forward")),
        ("es_update", "update_over_forward", ("update", "forward")),
    ],
)
def test_one_json_object_per_line(case, measure, parts, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(evolution, "_dense_settings", small_settings)
    monkeypatch.setattr(evolution, "_more_settings", lambda: iter(()))
    harness.main([case, "--repeats=2", f"--out={tmp_path / 'out.jsonl'}"], bench.CASES)
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
        harness.main(["decoding"], bench.CASES)
    assert error.value.code == 2 and "population_forward" in capsys.readouterr().err


@pytest.mark.slow
def test_score_compares_equal_results_and_says_what_memory_they_take(monkeypatch):
    model = make(preset("tiny-transformer", vocab=8192, layers=1))
    monkeypatch.setattr(language, "_score_settings", lambda: iter([({"vocab": 8192}, model, 8, 160)]))
    rows = list(language.score(1))
    assert [row["setting"]["gradient"] for row in rows] == [False, True]
    for row in rows:
        assert row["measure"] == "naive_over_blocked"
        assert row["value"] == pytest.approx(row["seconds"]["naive"] / row["seconds"]["blocked"], rel=0.01, abs=0.01)
        for name, seconds in row["seconds"].items():
            assert row["tokens_per_second"][name] == pytest.approx(1280 / seconds, rel=0.01)
        # naive has all logits at once, 8 * 159 * 8192 floats; the scorer's two blocks half of them
        saved = row["temporary_bytes"]["naive"] - row["temporary_bytes"]["blocked"]
        assert saved > 0.4 * 8 * 159 * 8192 * 4
    operands = (
        model.init(jax.random.key(0)),
        jax.random.randint(jax.random.key(1), (2, 40), 0, 8192),
        jnp.array([40, 9]),
    )
    ours, naive = blocked_score(model, *operands), jax.jit(language.naive_score, static_argnums=0)(model, *operands)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, naive)


@pytest.mark.slow
def test_a_generation_of_the_integer_model_is_timed_in_int8_and_f32(monkeypatch):
    monkeypatch.setattr(integer, "populations", lambda: [(integer.Size(1, 16, 3), 32)])
    rows = list(integer.case(1))
    assert [row["measure"] for row in rows] == [
        "float32_over_int8", "pairs_over_crossed", "update_share", "bytes_per_member_over_float32",
    ]  # fmt: skip
    seconds = rows[0]["seconds"]
    whole = {side: seconds[f"{side}_evaluate"] + seconds[f"{side}_update"] for side in ("int8", "crossed", "float32")}
    assert rows[0]["value"] == pytest.approx(whole["float32"] / whole["int8"], abs=0.02)
    assert rows[0]["tokens_per_second"]["int8"] == pytest.approx(32 * 3 / whole["int8"], rel=0.02)
    assert rows[1]["value"] == pytest.approx(whole["int8"] / whole["crossed"], abs=0.02)
    assert 0 < rows[2]["value"] < 1
    memory = rows[3]["bytes_per_member"]
    assert memory["int8"] >= 16 and memory["float32"] >= 64  # what is carried, at least


def test_the_f32_twin_of_the_bench_is_the_integer_model():
    """Mean scores of members, in 1/16 bits, of the same parameters and text."""
    size, population = integer.Size(2, 64, 12), eggroll.antithetic(32)
    ours, theirs = integer.int8(size, population), integer.float32(size, population)
    scores = [np.asarray(side.evaluate()[0], float).mean() for side in (ours, theirs)]
    assert scores[0] == pytest.approx(scores[1], rel=0.03)
