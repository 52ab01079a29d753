"""Multi-layer perceptrons for control: a policy with a discrete or continuous head, and a value function."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

_LAYER_NORM_EPSILON = 1e-5


def pqn(x: jax.Array) -> jax.Array:
    """relu((x - mean x) / sqrt(var x + 1e-5)) over the last axis: a layer norm without learned scale or bias.

    Source: the policies of arXiv 2511.16652 (section 6.2), after PQN.
    """
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    return nn.relu(centred * jax.lax.rsqrt(variance + _LAYER_NORM_EPSILON))


class MLP(nn.Module):
    """Dense layers with an activation after each but the last: [..., in] -> [..., outputs].

    Attributes:
      outputs: size of the last layer.
      hidden: sizes of the others.
      activation: applied to every hidden layer's output.
      output_scale: the last layer's weights start orthogonal with this gain; None starts them like the others.
    """

    outputs: int
    hidden: tuple[int, ...] = (256, 256, 256)
    activation: Callable[[jax.Array], jax.Array] = pqn
    output_scale: float | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layers to x [..., in]."""
        for size in self.hidden:
            x = self.activation(nn.Dense(size)(x))
        if self.output_scale is None:
            return nn.Dense(self.outputs)(x)
        return nn.Dense(self.outputs, kernel_init=nn.initializers.orthogonal(self.output_scale))(x)
