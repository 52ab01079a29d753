"""The layer behind every kernel of a language model's layers."""

import flax.linen as nn
from jax import Array

KERNEL, FACTORS = "kernel", ("kernel.a", "kernel.b")


class Dense(nn.Dense):
    """`flax.linen.Dense`, and a low-rank adapter beside it where its parameters have one (`rl.lora.attach`):
    x W + (x A) B + bias.
    """

    def __call__(self, x: Array) -> Array:
        """[..., in] -> [..., features]."""
        y = super().__call__(x)
        if not self.has_variable("params", FACTORS[0]):
            return y
        a, b = (self.get_variable("params", name).astype(y.dtype) for name in FACTORS)
        return y + (x.astype(y.dtype) @ a) @ b
