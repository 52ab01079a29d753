"""Difficulty by attention over embeddings: typed-in numbers, NumPy twins, and learning it from logged measurements."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl import slots
from rl.data import selection
from rl.data.selection import Pool
from rl.data.selection import _predictor as predictor
from rl.data.selection._predictor import Logged, attend, calibrate


def known(*flags):
    return np.array(flags, bool)


def test_attention_by_hand():
    """softmax(1, 0, 0) = e / (e + 2), 1 / (e + 2), 1 / (e + 2); labels 1, 0.5, 0."""
    scores = jnp.array([[1.0, 0, 0]])
    weights = attend(jnp.tile(scores, (3, 1)), jnp.array([1.0, 0, 0]), jnp.array([True] * 3))
    np.testing.assert_allclose(weights, 0.576117, atol=1e-6)
    np.testing.assert_allclose(attend(scores, jnp.array([1, 0.5, 0]), known(1, 1, 1)), [0.682088], atol=1e-6)


def test_equal_labels_are_predicted_for_everyone():
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(50, 9)) * 30)
    for c in (0.0, 0.3, 1.0):
        np.testing.assert_allclose(attend(scores, jnp.full(9, c), jnp.ones(9, bool)), c, atol=1e-6)


def test_unknown_references_leave_no_trace():
    scores = jnp.array([[1.0, 900.0, 0, jnp.nan], [0, -900.0, 2, jnp.inf]])
    labels = jnp.array([1, jnp.nan, 0.5, jnp.inf])
    some = attend(scores, labels, known(1, 0, 1, 0))
    np.testing.assert_array_equal(some, attend(scores[:, ::2], labels[::2], known(1, 1)))
    np.testing.assert_array_equal(attend(scores, labels, known(0, 0, 0, 0)), [0.5, 0.5])


def test_scores_of_any_size_stay_finite():
    scores = jnp.array([[1e4, -1e4, 0], [-1e30, -1e30, -1e30]])
    np.testing.assert_allclose(attend(scores, jnp.array([1.0, 0, 0.5]), known(1, 1, 1)), [1, 0.5], atol=1e-6)


def test_calibration_without_parameters_is_the_identity():
    d = np.linspace(1e-4, 1 - 1e-4, 1001)
    np.testing.assert_allclose(calibrate(jnp.asarray(d)), d, atol=2e-7)


@pytest.mark.parametrize("temperature", [1e-2, 1.0, 10.0])
@pytest.mark.parametrize("bias", [-1.0, 0.0, 1.0])
def test_calibrated_difficulty_stays_inside(temperature, bias):
    out = np.asarray(calibrate(jnp.array([0.0, 1e-5, 0.5, 1.0]), temperature, bias))
    assert ((out > 0) & (out < 1)).all() and (np.diff(out) >= 0).all()
    # sigmoid(bias) at one half, by hand
    assert out[2] == pytest.approx(1 / (1 + np.exp(-bias)), rel=1e-5)


def test_calibration_by_hand():
    """logit(0.8) = ln 4; divided by 2 it is ln 2, plus tanh-like bias 0.1: sigmoid(ln 2 + 0.1) = 2 e^0.1 / (1 + 2 e^0.1)."""
    expected = 2 * np.exp(0.1) / (1 + 2 * np.exp(0.1))
    assert float(calibrate(jnp.array(0.8), 2.0, 0.1)) == pytest.approx(expected, rel=1e-6)


# -- without training ------------------------------------------------------------------------------------------------


def test_features_are_centred_and_of_unit_length():
    x = np.array([[3.0, 1], [5, 1], [4, 1], [4, 4], [4, -2]]) + 100
    np.testing.assert_allclose(
        predictor.features(x), [[-1, 0], [1, 0], [0, 0], [0, 1], [0, -1]], atol=1e-6
    )  # the third is the mean itself
    assert not predictor.features(np.full((3, 4), 0.1)).any()


def similarity_twin(pool, rows, labels, flags):
    """Loops over prompts and references, in f64."""

    def average(q, scale, leave_out=None):
        use = [k for k in range(len(rows)) if flags[k] and k != leave_out]
        w = [np.exp(scale * (pool[q] @ pool[rows[k]])) for k in use]
        return sum(a * labels[k] for a, k in zip(w, use, strict=True)) / sum(w)

    def error(scale):
        return sum((average(rows[k], scale, k) - labels[k]) ** 2 for k in range(len(rows)) if flags[k])

    scale = min(predictor.SCALES, key=error)
    return np.array([np.clip(average(q, scale), 1e-4, 1 - 1e-4) for q in range(len(pool))]), scale


@pytest.mark.parametrize("seed", range(4))
def test_similarity_against_loops(seed):
    random = np.random.default_rng(seed)
    pool = predictor.features(random.normal(size=(30, 5))).astype(np.float64)
    rows = random.permutation(30)[:9]
    labels = np.clip(0.5 + (0.2 + 0.1 * seed) * pool @ random.normal(size=5), 0, 1)[rows]
    flags = random.random(9) < 0.8
    found, scale = predictor.similarity(pool.astype(np.float32), rows, labels.astype(np.float32), flags)
    expected, best = similarity_twin(pool, rows, labels, flags)
    assert float(scale) == best
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_predictions_do_not_depend_on_the_order_of_references_or_prompts():
    random = np.random.default_rng(5)
    pool, rows = predictor.features(random.normal(size=(30, 5))), random.permutation(30)[:9]
    labels, flags = random.random(9).astype(np.float32), np.ones(9, bool)
    base, _ = predictor.similarity(pool, rows, labels, flags)
    turn, mix = random.permutation(9), random.permutation(30)
    np.testing.assert_allclose(predictor.similarity(pool, rows[turn], labels[turn], flags)[0], base, atol=1e-6)
    place = np.argsort(mix)  # where each prompt went
    np.testing.assert_allclose(predictor.similarity(pool[mix], place[rows], labels, flags)[0], base[mix], atol=1e-6)


@pytest.mark.parametrize("flags", [known(1), known(0), known(1, 0), known(1, 1)])
def test_one_or_no_reference_is_finite(flags):
    pool = predictor.features(np.eye(4))
    found, scale = predictor.similarity(pool, np.arange(len(flags)), np.full(len(flags), 0.25, np.float32), flags)
    np.testing.assert_allclose(found, 0.25 if flags.any() else 0.5, atol=1e-6)
    assert float(scale) == 0


def test_a_second_measurement_does_not_compile_again():
    pool, flags = predictor.features(np.random.default_rng(0).normal(size=(21, 4))), np.ones(6, bool)
    predictor.similarity(pool, np.arange(6), np.zeros(6, np.float32), flags)
    size = predictor.similarity._cache_size()
    predictor.similarity(pool, np.arange(6) + 3, np.ones(6, np.float32), ~flags)
    assert predictor.similarity._cache_size() == size


# -- trained ---------------------------------------------------------------------------------------------------------


def published(params, queries, references, labels):
    """The published predictor in NumPy, one prompt at a time."""

    def adapter(p, x):
        for i in range(2):
            h = x @ p[f"Dense_{i}"]["kernel"] + p[f"Dense_{i}"]["bias"]
            h = (h - h.mean()) / np.sqrt(h.var() + 1e-6) * p[f"LayerNorm_{i}"]["scale"] + p[f"LayerNorm_{i}"]["bias"]
            x = gelu(h)
        return x @ p["Dense_2"]["kernel"] + p["Dense_2"]["bias"]

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    keys = [adapter(params["reference"], x) for x in references]
    group = np.array([labels.mean(), labels.std(ddof=1)])
    hidden = gelu(group @ params["group"]["kernel"] + params["group"]["bias"])
    s, b = hidden @ params["shift"]["kernel"] + params["shift"]["bias"]
    out = []
    for q in queries:
        z = adapter(params["query"], q)
        w = np.exp([z @ k / np.sqrt(len(z)) for k in keys])
        d = np.clip((w @ labels) / w.sum(), 1e-4, 1 - 1e-4)
        logit = np.log(d / (1 - d)) / np.clip(np.log1p(np.exp(s)), 1e-2, 10) + np.tanh(b)
        out.append(1 / (1 + np.exp(-logit)))
    return np.array(out)


def test_trained_predictor_against_numpy():
    random = np.random.default_rng(2)
    pool, rows = random.normal(size=(12, 5)), np.array([3, 7, 1, 9])
    labels = np.array([0.1, 0.9, 0.4, 0.6])
    model = predictor.Predictor(width=6)
    x = jnp.asarray(pool, jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, x[rows], labels, np.ones(4, bool))["params"]
    params = jax.tree.map(lambda p: np.asarray(1.5 * random.normal(size=p.shape), np.float32), shapes)
    found = predictor.predict(params, 6, x, rows, labels.astype(np.float32), np.ones(4, bool))
    expected = published(jax.tree.map(np.float64, params), pool, pool[rows], labels)
    assert np.ptp(expected) > 0.05
    np.testing.assert_allclose(found, expected, atol=2e-5)


def world(problems=300, checkpoints=8, seed=0):
    """Difficulty bends with the embedding and falls with training: no distance in the embedding itself says so."""
    random = np.random.default_rng(seed)
    embedding = random.normal(size=(problems, 6)).astype(np.float32)
    hardness = np.where(embedding[:, 0] * embedding[:, 1] > 0, 2.0, -2.0)
    skill = np.linspace(-1, 1, checkpoints)
    difficulty = 1 / (1 + np.exp(skill[:, None] - hardness))
    return embedding, difficulty.astype(np.float32)


@pytest.fixture(scope="module")
def trained():
    embedding, difficulty = world()
    seen, problems = 7, 200  # one checkpoint and 100 problems are held out
    logged = Logged(
        np.repeat(np.arange(seen), problems), np.tile(np.arange(problems), seen), difficulty[:seen, :problems].ravel()
    )
    losses = []
    params = predictor.fit(
        embedding, logged, width=32, references=48, batch=64, epochs=25, learning_rate=3e-3, seed=1,
        report=lambda epoch, loss: losses.append(loss),
    )  # fmt: skip
    return embedding, difficulty, params, losses


@pytest.mark.slow
def test_training_learns_what_distances_do_not_say(trained):
    embedding, difficulty, params, losses = trained
    assert losses[-1] < losses[0] - 0.05
    rows = np.random.default_rng(4).permutation(200)[:48]
    label, flags = difficulty[7, rows], np.ones(48, bool)
    new, truth = slice(200, 300), difficulty[7, 200:]
    found = np.asarray(predictor.predict(params, 32, embedding, rows, label, flags))
    plain = np.asarray(predictor.similarity(predictor.features(embedding), rows, label, flags)[0])
    correlation = [np.corrcoef(x[new], truth)[0, 1] for x in (found, plain)]
    assert correlation[0] > 0.7 and correlation[0] > correlation[1] + 0.1, correlation


def test_a_saved_predictor_serves_the_slot(trained, tmp_path):
    embedding, difficulty, params, _ = trained
    path = str(tmp_path / "predictor.safetensors")
    predictor.save(path, params)
    loaded = predictor.load(path)
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    method = slots.bind("rl.data.selection", slots.block("rl.data.selection", "dots", references=48, predictor=path))
    state = method.init(Pool(300, 1, lambda: embedding))
    labels = []

    def measure(rows, samples):
        labels.append((rows, difficulty[7, rows]))
        return np.tile(1 - difficulty[7, rows, None], (1, samples)), np.ones((len(rows), samples), bool)

    state, _, metrics = selection.choose(method, state, 0, 10, measure)
    expected = predictor.predict(params, 32, embedding, *labels[0], np.ones(48, bool))
    np.testing.assert_allclose(state["predicted"], expected, atol=1e-5)
    assert "selection_scale" not in metrics


def test_bad_measurements_and_files_are_refused(tmp_path):
    embedding = np.eye(4, dtype=np.float32)
    with pytest.raises(ValueError, match="at least 2 measurements per checkpoint.*got 1 at least"):
        predictor.fit(embedding, Logged(np.array([0, 0, 1]), np.arange(3), np.ones(3)))
    with pytest.raises(ValueError, match="between 0 and 1; got 2 at least and difficulties 0.0 to 1.5"):
        predictor.fit(embedding, Logged(np.zeros(2), np.arange(2), np.array([0, 1.5])))
    (tmp_path / "x").write_text("not a predictor")
    with pytest.raises(ValueError, match="predictor must be a file written by rl.data.selection"):
        predictor.load(tmp_path / "x")
