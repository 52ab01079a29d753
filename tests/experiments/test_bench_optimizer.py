"""`optimizer`: bytes by formula, ratios of what the rows hold, and steps with and without a refresh."""

import jax
import numpy as np
import optax
import pytest

from experiments.bench import optimizers
from rl import optim

WIDTH, INNER = 32, 88
SIZE = optimizers.Size(WIDTH, 1, 1, slow=True)
FULL = 256 * WIDTH + 3 * WIDTH  # embedding and norms
LINEAR = 4 * WIDTH * WIDTH + 3 * WIDTH * INNER
NAMES = ["frugal"] * 5 + ["galore", "badam", "fira", "ldadam", "apollo", "apollo_mini", "adam_mini", "adam8bit"]


@pytest.fixture(scope="module")
def rows():
    """Of one optimizer of every kind: a refresh timed in turn, on a layer, none."""
    chosen = [m for m in optimizers.methods(SIZE) if m.name in ("galore", "lion") or "columns" in m.settings.values()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizers, "_sizes", lambda: iter([SIZE]))
        patch.setattr(optimizers, "methods", lambda size: iter(chosen))
        return {row["setting"]["optimizer"]: row for row in optimizers.optimizer(2)}


@pytest.mark.slow
def test_rows_hold_the_ratios_to_adamw(rows):
    sizes = {"width": WIDTH, "layers": 1}
    assert [row["setting"] for row in rows.values()] == [
        sizes | {"optimizer": "frugal", "projection": "columns", "density": 0.25},
        sizes | {"optimizer": "galore", "rank": 8},
        sizes | {"optimizer": "lion"},
    ]
    for name, row in rows.items():
        ratio = lambda pair, name=name: pytest.approx(pair[name] / pair["adamw"], rel=0.02, abs=2e-3)
        memory = {key: row["state_bytes"][key] + row["temporary_bytes"][key] for key in ("adamw", name)}
        assert (row["measure"], row["repeats"]) == ("step_over_adamw", 1)
        assert 0 < row["value"] == ratio(row["seconds"])
        assert 0 < row["state_over_adamw"] == ratio(row["state_bytes"])
        assert 0 < row["memory_over_adamw"] == ratio(memory)
    for name in ("frugal", "galore"):
        pair = rows[name]["refresh_seconds"]
        assert 0 < rows[name]["refresh_over_adamw"] == pytest.approx(pair[name] / pair["adamw"], rel=0.02)
        assert rows[name]["refresh_layers"] == 1
    assert rows["frugal"]["refresh_seconds"]["adamw"] == rows["frugal"]["seconds"]["adamw"]  # timed in turn
    assert not any(key.startswith("refresh") for key in rows["lion"])


def test_bytes_of_state_are_those_of_the_formulas(rows):
    """And 4 for each counter."""
    columns = 4 * WIDTH * (WIDTH // 4) + 2 * WIDTH * (INNER // 4) + INNER * (WIDTH // 4)
    bases = 8 * 7 * WIDTH
    expected = {
        "frugal": 8 * (FULL + columns) + 12,
        "galore": 8 * FULL + 4 * bases + 2 * 4 * 8 * (4 * WIDTH + 3 * INNER) + 12,
        "lion": 4 * (FULL + LINEAR) + 4,
    }
    for name, row in rows.items():
        assert row["state_bytes"] == {"adamw": 8 * (FULL + LINEAR) + 4, name: expected[name]}


def test_every_optimizer_is_there_with_settings_that_follow_the_size():
    shapes = jax.eval_shape(lambda: optimizers.random_tree(WIDTH, 4))
    full, linear = FULL + 6 * WIDTH, 4 * LINEAR
    small, large = (list(optimizers.methods(SIZE._replace(layers=4, slow=slow))) for slow in (True, False))
    assert [method.name for method in small] == [*NAMES, "lion", "adafactor", "muon"]
    assert [method.name for method in large] == [*NAMES, "lion", "adafactor"]
    size = {m.settings.get("projection", m.name): optim.report(m.tx, shapes).total for m in small}
    quarter = 8 * full + 2 * linear
    assert size["columns"] == size["rows"] == size["block"] == quarter + 12
    assert size["randk"] == quarter + linear + 12
    assert size["frugal"] == 8 * full + 12  # of density 0
    assert size["muon"] == pytest.approx(8 * full + 4 * linear, abs=64)
    density = lambda layers: next(optimizers.methods(SIZE._replace(layers=layers))).settings["density"]
    assert (density(2), density(4), density(8)) == (0.5, 0.25, 0.25)
    turns = dict.fromkeys(("block", "columns", "rows", "badam", "apollo", "apollo_mini"), "turn")
    refreshed = lambda made: {m.settings.get("projection", m.name): m.refresh for m in made if m.refresh}
    assert refreshed(large) == turns
    assert refreshed(small) == turns | dict.fromkeys(("randk", "galore", "fira"), "layer")


@pytest.mark.parametrize("projection", ["randk", "svd"])
def test_a_refresh_renews_what_is_stored_and_a_step_does_not(projection):
    """Coordinates, i32 [64] for a 16 x 16 matrix, and bases, f32 [16, 4]."""
    gradients = {"layer": {"kernel": jax.random.normal(jax.random.key(0), (16, 16))}}
    side = optimizers.side(optim.frugal(1e-3, 0.25, projection=projection), gradients)
    shape = {"randk": (64,), "svd": (16, 4)}[projection]

    def stored(held):
        kind = np.int32 if projection == "randk" else np.float32
        return next(np.array(x) for x in held[1] if x.shape == shape and x.dtype == kind)

    first, second, third, fourth = (stored(call()) for call in (side.step, side.step, side.refresh, side.step))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(second, third)
    np.testing.assert_array_equal(third, fourth)
    if projection == "randk":
        assert (np.diff(first) > 0).all() and first[0] >= 0 and first[-1] < 256
    else:
        top = np.linalg.svd(np.array(gradients["layer"]["kernel"]))[2][:4]
        np.testing.assert_allclose(abs(top @ third), np.eye(4), atol=1e-5)


def test_a_step_is_the_update_of_optax():
    gradients = {"w": jax.random.normal(jax.random.key(0), (3, 5))}
    side, params = optimizers.side(optimizers.adamw(), gradients), jax.tree.map(lambda x: 0.02 * x, gradients)
    tx = optimizers.adamw()
    state = optax.tree.set(tx.init(params), count=1)
    for _ in range(2):
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        made, _ = side.step()
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), made, params)
    assert side.state_bytes == 8 * 15 + 4


def test_a_report_of_other_bytes_than_are_allocated_is_an_error(monkeypatch):
    monkeypatch.setattr(optimizers.optim, "report", lambda tx, params: optim.Report(7, {}, {}, 7))
    with pytest.raises(RuntimeError, match="says 7 bytes of state, but 68 are allocated"):
        optimizers.side(optax.adam(1.0), {"w": np.zeros(8, np.float32)})
