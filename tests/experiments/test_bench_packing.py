"""The simulation of sequence-parallel groups: what it draws, the links it extrapolates, and the rows it makes."""

import json

import numpy as np
import pytest

from experiments import bench
from experiments.bench import harness, packing


def test_links_beyond_two_nodes():
    links = packing.profile(64).bandwidth
    assert sorted(links) == [2, 4, 8, 16, 32, 64] and links[8] == 121e9 and links[16] == 8.7e9
    # half, three quarters and seven eighths of an exchange leave the node
    assert links[32] == pytest.approx(8.7e9 * 0.5 / 0.75) and links[64] == pytest.approx(8.7e9 * 0.5 / 0.875)
    assert sorted(packing.profile(16).bandwidth) == [2, 4, 8, 16]


def test_lengths_stay_below_the_limit_and_have_their_median():
    for lengths, (median, _) in packing._LENGTHS.items():
        for limit in (16_384, 196_608):
            drawn = packing.draw(np.random.default_rng(0), lengths, limit, 512)
            assert len(drawn) == 512 and drawn.min() >= 16 and drawn.max() <= limit
            assert np.median(drawn) == pytest.approx(median, rel=0.15)


def test_rows_compare_with_the_best_static_and_the_best_homogeneous_degree(monkeypatch, capsys):
    monkeypatch.setattr(packing, "_settings", lambda: iter([{"devices": 16, "lengths": "plain", "limit": 65_536}]))
    harness.main(["packing", "--repeats=2"], bench.CASES)
    static, homogeneous = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert [static["measure"], homogeneous["measure"]] == ["static_over_ours", "homogeneous_over_ours"]
    for row, other in ((static, "static"), (homogeneous, "homogeneous")):
        seconds = row["seconds"]
        assert row["value"] == pytest.approx(seconds[other] / seconds["ours"], abs=1e-3)
        assert seconds["ours"] <= seconds["homogeneous"] <= seconds["static"]
        # 65,536 tokens at 5,165 a device: two nodes, whose link makes one degree for all slow
        assert row["static_degree"] == 16 and row["setting"]["capacity"] == 5165
        assert 0.9 < row["bound_over_ours"] <= 1 and 0 < row["solver_seconds"]["median"] < 5
    assert 1.2 < static["value"] < 2 and 1 <= homogeneous["value"] < 1.2
