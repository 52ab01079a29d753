"""What fits: the search, and the needs of tiny runs."""

import jax
import jax.numpy as jnp
import pytest

from experiments import fit, train
from rl import config as config_lib
from rl.models import presets
from rl.run import RunError
from tests.experiments.tiny_train import FAST, ROOT, SHAPE, config_of


@pytest.mark.parametrize(
    ("fixed", "per", "limit", "start", "most", "expected"),
    [
        (100, 10, 1000, 8, 512, 64),  # 740 fits, 1380 does not
        (100, 10, 1000, 48, 512, 48),  # 580 fits, 1060 does not
        (100, 10, 10**9, 8, 100, 128),  # the first that holds a whole step
        (100, 10, 150, 64, 512, 4),
        (100, 10, 99, 64, 512, 0),
        (100, 10, 110, 1, 1, 1),
    ],
)
def test_largest(fixed, per, limit, start, most, expected):
    seen = []
    found = fit.largest(lambda n: seen.append(n) or fixed + per * n, limit, start, most)
    assert found == expected and len(seen) == len(set(seen)) <= 5  # of a straight line, few are measured


def test_a_bent_line_is_measured_and_not_guessed():
    assert fit.largest(lambda n: n * n, 10_000, 8, 10**6) == 64  # 64 fits, 128 does not; a straight line says 512


def test_what_a_program_takes():
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    fresh = jax.jit(lambda x: x + 1).lower(x).compile()
    over = jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile()
    assert fit.taken(fresh) == 4 * 256**2 and fit.taken(over) == 0


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "tiny-transformer", SHAPE)


def test_evolution(tiny):
    config = config_of("", *FAST)
    found = fit.fit(config, 2**24)
    assert found["held"]["noise"] > 0 and found["sampling"] > found["held"]["parameters"]
    assert found["slots"] == 32 and found["tokens"] is None  # 8 members x 4 prompts


@pytest.mark.slow
def test_backprop(tiny):
    config = config_lib.load(
        f"{ROOT}/configs/countdown_grpo.py",
        ["warm_start.steps=0", "gradient.tokens=256", "prompts=2", "engine.slots=8"],
    )
    found = fit.fit(config, 2**21)
    assert found["learning"] > 3 * found["held"]["parameters"]  # with the gradient and two moments
    assert 8 <= found["slots"] <= 2 * config.samples and found["tokens"] in (64, 128, 256, 512, 1024)


def test_too_little_memory_names_the_two_sizes(tiny, tmp_path, monkeypatch):
    def complete(*args):
        return jax.jit(lambda x: jnp.zeros((1 << 24, 1 << 24)) + x)(jnp.float32(0)).block_until_ready()  # a PiB

    monkeypatch.setattr(train, "complete", complete)
    with pytest.raises(RunError, match=r"lower config.engine.slots = 8 .* or config.es.chunk = 0 .*experiments.fit"):
        train.train(config_of("", *FAST), tmp_path)
