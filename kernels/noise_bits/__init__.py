"""Counter-based noise: a pure function of (key, stream, element), the same bits on every device."""

from kernels.noise_bits.api import gaussian, once, signs, words

__all__ = ["gaussian", "once", "signs", "words"]
