"""A text as streams that are read side by side, a segment of each a step, for models that remember."""

import jax
import numpy as np
from jax import Array


def lay_out(text: np.ndarray, count: int, tokens: int) -> np.ndarray:
    """Cuts a text into streams, of as many whole segments as there are, each with one byte more, which is the last target.

    Args:
        text: u8 [bytes].
        count: streams.
        tokens: bytes of a segment.

    Returns:
        u8 [count, segments * tokens + 1].

    Raises:
        ValueError: not bytes, counts below 1, or a text too short for one segment of each stream.
    """
    if text.dtype != np.uint8 or text.ndim != 1:
        raise ValueError(f"a text is u8 [bytes]; got {text.dtype}{list(text.shape)}")
    if count < 1 or tokens < 1:
        raise ValueError(f"streams and their tokens a step must be at least 1; got {count} and {tokens}")
    each = len(text) // count
    segments = (each - 1) // tokens
    if segments < 1:
        raise ValueError(
            f"{count} streams of at least {tokens} + 1 bytes need {count * (tokens + 1)} bytes; the text has {len(text)}: use "
            "fewer or shorter ones, or more text"
        )
    return text[: count * each].reshape(count, each)[:, : segments * tokens + 1]


def segment(streams: Array, number: Array, tokens: int) -> tuple[Array, Array]:
    """The inputs and targets [count, tokens] of one step; after the last segment comes the first.

    Args:
        streams: from `lay_out`.
        number: integer, from 0; may be traced.
    """
    first = number % ((streams.shape[1] - 1) // tokens) * tokens
    part = jax.lax.dynamic_slice_in_dim(streams, first, tokens + 1, 1)
    return part[:, :-1], part[:, 1:]
