"""The perceptron against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from rl.models.mlp import MLP, pqn


def pqn_numpy(x):
    x = np.asarray(x, np.float64)
    return np.maximum((x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5), 0)


def test_pqn_typed_in_numbers():
    # mean 2, variance 2/3: (3 - 2) / sqrt(0.66667667) = 1.224736
    np.testing.assert_allclose(pqn(jnp.array([1.0, 2.0, 3.0])), [0.0, 0.0, 1.224736], rtol=1e-6)
    np.testing.assert_array_equal(pqn(jnp.full(4, 7.0)), 0.0)  # no spread: zero, not NaN


def test_default_is_three_layers_of_256_and_equals_numpy():
    model = MLP(3)
    x = jax.random.normal(jax.random.key(0), (5, 4))
    params = model.init(jax.random.key(1), x[0])
    layers = [params["params"][f"Dense_{i}"] for i in range(4)]
    assert [layer["kernel"].shape for layer in layers] == [(4, 256), (256, 256), (256, 256), (256, 3)]
    expected = np.asarray(x, np.float64)
    for i, layer in enumerate(layers):
        expected = expected @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"])
        expected = pqn_numpy(expected) if i < 3 else expected
    np.testing.assert_allclose(model.apply(params, x), expected, rtol=1e-4, atol=1e-5)


def test_output_scale_is_the_gain_of_the_last_layer():
    params = MLP(2, hidden=(16,), output_scale=0.01).init(jax.random.key(0), jnp.zeros(4))
    kernel = params["params"]["Dense_1"]["kernel"]
    np.testing.assert_allclose(kernel.T @ kernel, 1e-4 * np.eye(2), atol=1e-9)
