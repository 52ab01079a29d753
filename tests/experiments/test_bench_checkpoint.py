"""`checkpoint`: what the rows hold, with a state of kilobytes and a step of milliseconds."""

import jax
import numpy as np
import pytest

from experiments.bench import checkpoint


def test_rows_compare_every_way_with_a_loop_that_does_not_save(monkeypatch):
    monkeypatch.setattr(checkpoint, "_sizes", lambda: iter([checkpoint.Size(1, 0.02, 2, 1)]))
    rows = list(checkpoint.saving(5))
    assert [row["setting"].get("way") for row in rows] == ["writer", "synchronous", "orbax", None]
    for row in rows[:-1]:
        way = row["setting"]["way"]
        assert (row["measure"], row["repeats"], row["steps"]) == ("saving_over_plain", 1, 2)
        assert row["value"] == pytest.approx(row["seconds"][way] / row["seconds"]["plain"], rel=0.02, abs=2e-3)
        assert row["blocked_seconds"] > 0 and row["durable_seconds"] > 0 and row["copy_seconds"] > 0
    assert rows[-1]["measure"] == "restore_over_orbax"


def test_a_state_has_the_bytes_it_is_named_by_and_is_donated():
    state = checkpoint.state_of(1)
    assert sum(leaf.nbytes for leaf in state.values()) == pytest.approx(1e6, rel=0.02)
    before = {name: np.array(leaf) for name, leaf in state.items()}
    after = checkpoint.calibrated(0.01)(state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert all(not np.array_equal(after[name], before[name]) for name in before)
