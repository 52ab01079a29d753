"""The tuner: where it climbs to, and what it writes."""

import json

import jax
import jax.numpy as jnp
import pytest

from experiments import tune
from experiments.bench import kernels as bench
from kernels import tuning


def test_it_climbs_to_the_fastest_sizes_and_tries_none_twice():
    tried = []

    def measure(sizes):
        tried.append(tuple(sizes.values()))
        return abs(sizes["m"] - 512) + abs(sizes["n"] - 32) + 1

    best, seconds, count = tune.climb(measure, {"m": 128, "n": 128})
    assert (best, seconds) == ({"m": 512, "n": 32}, 1)
    assert count == len(tried) == len(set(tried))


def test_sizes_that_do_not_compile_are_passed_over():
    best, _, _ = tune.climb(lambda sizes: float("inf") if sizes["m"] > 256 else 1 / sizes["m"], {"m": 64})
    assert best == {"m": 256}


def test_an_entry_replaces_one_of_its_device_and_shape(tmp_path, monkeypatch):
    path = tmp_path / "op" / "tuned.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"gpu": [], "tpu": []}))
    default = {"m": 64, "n": 32}
    entry = {
        "device": jax.devices()[0].device_kind,
        "kind": "f32",
        "shape": {"k": 8},
        "blocks": {"m": 1},
        "seconds": 1.0,
    }
    tune.record(path, "gpu", entry)
    tune.record(path, "gpu", entry | {"shape": {"k": 64}, "blocks": {"m": 3}})
    tune.record(path, "gpu", entry | {"blocks": {"m": 2}})
    assert [e["blocks"]["m"] for e in json.loads(path.read_text())["gpu"]] == [3, 2]
    monkeypatch.setattr(tuning, "_FOLDER", tmp_path)
    tuning._entries.cache_clear()
    assert tuning.blocks("op", "gpu", default, "f32", k=16) == {"m": 2, "n": 32}  # one octave from 8, two from 64
    assert tuning.blocks("op", "gpu", default, "f32", k=32) == {"m": 3, "n": 32}
    for kind, shape in (
        ("f32", {"rows": 32}),
        ("bf16", {"k": 16}),
        ("f32", {"k": 1}),
    ):  # another class, another kind, far
        assert tuning.blocks("op", "gpu", default, kind, **shape) == default
    with tuning.trying({"m": 7}) as asked:
        assert tuning.blocks("op", "gpu", default, "f32", k=16) == {"m": 7, "n": 32}
    assert asked == [("op", "gpu", default, "f32", {"k": 16})]
    tuning._entries.cache_clear()


def test_a_tile_gone_astray_is_no_result():
    right = jnp.ones((256, 64))
    assert tune.same((right, right * 1.001), (right, right))
    assert not tune.same((right, right.at[128:].set(0)), (right, right))


@pytest.mark.parametrize(
    ("argv", "message"),
    [([], "no kernels to tune for this device .cpu."), (["conv"], "unknown operation conv; there are")],
)
def test_bad_input(argv, message, capsys):
    with pytest.raises(SystemExit):
        tune.main(argv)
    assert message.replace(".cpu.", "(cpu)") in capsys.readouterr().err


def test_the_bench_says_what_an_operation_must_do_and_what_it_took(monkeypatch):
    """On a CPU: the reference against its roofline and a plain product."""

    def works():
        yield next(iter(bench.products(32, 16, jnp.float32)))
        yield from bench.integers(16, 16)

    monkeypatch.setattr(bench, "works", works)
    monkeypatch.setattr(bench, "_device", lambda dtype: (1e9, 1e9))
    rows = list(bench.kernels(1))
    assert [row["measure"] for row in rows] == [
        "roofline_over_reference",
        "plain_over_reference",
        "roofline_over_reference",
    ]
    first = rows[0]
    assert first["setting"]["op"] == "lowrank_matmul" and first["setting"]["design"] == "crossed"
    assert first["flops"] == 2 * 16 * 32 * 34  # 16 rows, and two numbers more in each sum
    assert first["bytes"] == 4 * (2 * 16 * 32 + 32 * 32 + 2 * 4 * 32 + 1)
    assert first["roofline_seconds"] == round(max(first["flops"], first["bytes"]) / 1e9, 6)
    assert first["value"] == pytest.approx(
        first["roofline_seconds"] / first["seconds"]["reference"], rel=0.3, abs=0.002
    )
