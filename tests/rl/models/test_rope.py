"""Rotary embeddings against values derived by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from rl.models.rope import Rope, rotate, rotation


def frequencies(rope, head_dim=8, max_length=64, length=1):
    """Angles of position 1, and the factor on cos and sin."""
    cos, sin = rotation(rope, head_dim, max_length, jnp.array([1]), length)
    return np.arctan2(sin[0], cos[0]), float(np.hypot(cos[0], sin[0])[0])


# theta = 10000 and d = 8: 10000^(-2i/8) = 1, 0.1, 0.01, 0.001.
PLAIN = [1.0, 0.1, 0.01, 0.001]


@pytest.mark.parametrize(
    ("rope", "length", "expected", "scale"),
    [
        (Rope(), 1, PLAIN, 1.0),
        (Rope(theta=16.0), 1, [1.0, 0.5, 0.25, 0.125], 1.0),
        (Rope("linear", factor=4.0), 1, [0.25, 0.025, 0.0025, 0.00025], 1.0),
        # below max_length nothing changes; at 128 = 2 max: theta (2*2 - 1)^(8/6), so frequency i is divided by 3^(i/3)
        (Rope("dynamic", factor=2.0), 64, PLAIN, 1.0),
        (Rope("dynamic", factor=2.0), 128, [1.0, 0.1 / 3 ** (1 / 3), 0.01 / 3 ** (2 / 3), 0.001 / 3], 1.0),
        # turns per original context 20 pi: 10, 1, 0.1, 0.01; a band from 0.5 to 4.5 keeps 1, then (1 - .5)/4 = 1/8, 0, 0
        (
            Rope("llama3", factor=8.0, original_length=62.831853, low_frequency_factor=0.5, high_frequency_factor=4.5),
            1, [1.0, 0.1 * (1 / 8 + 7 / 8 / 8), 0.01 / 8, 0.001 / 8], 1.0,
        ),
        # the same context: 10, 1, 0.1 turns at dimensions 0, 1, 2. From 10 (low 0) to 0.1 (high 2) the ramp is 0, 1/2, 1, 1
        (
            Rope("yarn", factor=4.0, original_length=62.831853, beta_fast=10.0, beta_slow=0.1, truncate=False),
            1, [1.0, 0.1 * (1 / 2 + 1 / 8), 0.01 / 4, 0.001 / 4], 0.1 * np.log(4) + 1,
        ),
        # rounded outwards: dimensions 0.05 and 1.9 become 0 and 2
        (
            Rope("yarn", factor=4.0, original_length=62.831853, beta_fast=8.9, beta_slow=0.12, attention_factor=0.7),
            1, [1.0, 0.1 * (1 / 2 + 1 / 8), 0.01 / 4, 0.001 / 4], 0.7,
        ),
        (
            Rope(
                "yarn", factor=4.0, original_length=62.831853, beta_fast=10.0, beta_slow=0.1, truncate=False,
                mscale=1.0, mscale_all_dim=0.5,
            ),
            1, [1.0, 0.1 * (1 / 2 + 1 / 8), 0.01 / 4, 0.001 / 4], (0.1 * np.log(4) + 1) / (0.05 * np.log(4) + 1),
        ),
    ],
    ids=["default", "theta", "linear", "dynamic-short", "dynamic", "llama3", "yarn", "yarn-rounded", "yarn-mscale"],
)  # fmt: skip
def test_frequencies(rope, length, expected, scale):
    found, factor = frequencies(rope, length=length)
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    np.testing.assert_allclose(factor, scale, rtol=1e-6)


def test_rotation_by_hand_and_pairing():
    """Pairs are (x_0, x_2) and (x_1, x_3); theta = 4: angles p and p / 2."""
    angles = rotation(Rope(theta=4.0), 4, 64, jnp.array([0, 2]), 3)
    x = jnp.array([[[1.0, 0, 0, 3]], [[1.0, 0, 0, 3]]])
    turned = rotate(x, *angles)
    np.testing.assert_allclose(turned[0, 0], [1, 0, 0, 3], atol=1e-7)
    np.testing.assert_allclose(turned[1, 0], [np.cos(2), -3 * np.sin(1), np.sin(2), 3 * np.cos(1)], atol=1e-6)


def test_scores_depend_on_distance_alone():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 8)), jnp.float32) for _ in "qk")
    at = lambda x, p: rotate(x, *rotation(Rope(), 8, 64, jnp.array([p]), p + 1))[0, 0]
    score = lambda i, j: float(at(q, i) @ at(k, j))
    np.testing.assert_allclose([score(7, 3), score(1004, 1000)], score(4, 0), rtol=2e-4)
    assert abs(score(7, 3) - score(7, 5)) > 1e-2


def test_bf16_is_rotated_in_f32():
    x = jnp.ones((1, 1, 8), jnp.bfloat16)
    turned = rotate(x, *rotation(Rope(), 8, 64, jnp.array([3]), 4))
    exact = rotate(x.astype(jnp.float32), *rotation(Rope(), 8, 64, jnp.array([3]), 4))
    assert turned.dtype == jnp.bfloat16
    np.testing.assert_array_equal(turned, exact.astype(jnp.bfloat16))
