"""Counter-based noise: a pure function of (key, stream, element), the same bits on every device."""

from kernels.noise_bits.api import gaussian, gaussian_int8, once, signs, signs_int8, words
from kernels.noise_bits.generated import Generated

__all__ = ["Generated", "gaussian", "gaussian_int8", "once", "signs", "signs_int8", "words"]
