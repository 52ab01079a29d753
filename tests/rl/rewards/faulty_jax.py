"""A verifier's module that imports jax."""

import jax  # noqa: F401


def verify(completion, answer):
    raise AssertionError("never reached")
