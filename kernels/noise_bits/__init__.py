"""Counter-based noise: a pure function of (key, stream, element), the same bits on every device."""

from kernels.noise_bits.api import gaussian, signs, words

__all__ = ["gaussian", "signs", "words"]
