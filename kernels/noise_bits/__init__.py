"""Counter-based noise: a pure function of (key, stream, element), the same bits on every device."""

from kernels.noise_bits.api import gaussian, once, signs, words
from kernels.noise_bits.generated import Generated

__all__ = ["Generated", "gaussian", "once", "signs", "words"]
