"""What a group of devices needs for the sequences that it shares: seconds, and tokens of memory.

Ulysses-type sequence parallelism: the d devices of a group hold s / d tokens each of a sequence of s tokens, and exchange them
for heads (all-to-all) around every attention. After FlexSP (Wang et al. 2024, arXiv 2412.01523).
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Profile:
    """A model on a machine, as measured.

    Attributes:
        quadratic: seconds per token^2 on one device, forward and backward: attention.
        linear: seconds per token on one device: everything else.
        constant: seconds of a micro-batch whatever is in it: gathering weights, reducing gradients.
        exchanged: bytes that a token sends in all-to-alls, forward and backward.
        bandwidth: bytes per second and device of an all-to-all between so many devices. These are the degrees there are, and 1.
        token_bytes: activations of a token.
        state_bytes: weights, gradients and optimizer, shared evenly by all devices.
    """

    quadratic: float
    linear: float
    constant: float
    exchanged: float
    bandwidth: Mapping[int, float]
    token_bytes: float
    state_bytes: float

    @property
    def degrees(self) -> tuple[int, ...]:
        """How many devices a group may have, ascending."""
        return (1, *sorted(self.bandwidth))


# GPT-7B (32 layers, width 4,096, bf16) on nodes of 8 A100, as published with FlexSP. A token sends queries, keys, values and
# outputs, 2 bytes each, twice. The table ends at two nodes.
GPT_7B = Profile(
    quadratic=5.128e-9,
    linear=0.18396e-3,
    constant=0.6294,
    exchanged=4 * 2 * 32 * 4096 * 2,
    bandwidth={2: 154e9, 4: 137e9, 8: 121e9, 16: 8.7e9},
    token_bytes=4.71 * _MIB,
    state_bytes=16 * 6.7e9,
)


def sequence_seconds(profile: Profile, lengths: Sequence[int], degrees: Sequence[int]) -> np.ndarray:
    """T(s, d) = (quadratic s^2 + linear s + exchanged s / bandwidth(d)) / d, nothing being exchanged at d = 1.

    Args:
        lengths: [n] tokens.
        degrees: [D] devices.

    Returns:
        f64 [n, D] seconds.

    Raises:
        ValueError: a degree without a bandwidth.
    """
    unknown = sorted(set(map(int, degrees)) - set(profile.degrees))
    if unknown:
        raise ValueError(
            f"a degree needs a measured bandwidth, which degrees {list(profile.degrees)} have; got {unknown}: measure it, or "
            "take another degree"
        )
    s = np.asarray(lengths, np.float64)[:, None]
    per_byte = np.array([0.0 if d == 1 else 1 / profile.bandwidth[int(d)] for d in degrees])
    return ((profile.quadratic * s + profile.linear) * s + profile.exchanged * s * per_byte) / np.asarray(degrees)


def group_seconds(profile: Profile, lengths: Sequence[int], degree: int) -> float:
    """Of a group's part of a micro-batch: `constant` and the sum of its sequences' seconds."""
    return profile.constant + float(sequence_seconds(profile, lengths, [degree]).sum())


def capacity(profile: Profile, memory: float, devices: int) -> int:
    """C, the tokens that fit a device of so many bytes: state_bytes / devices + token_bytes C <= memory.

    Raises:
        ValueError: no token fits.
    """
    free = memory - profile.state_bytes / devices
    if free < profile.token_bytes:
        raise ValueError(
            f"a device must hold its share of the state, {profile.state_bytes / devices:.3g} bytes, and a token of "
            f"{profile.token_bytes:.3g}; got {memory:.3g} bytes: take more devices or more memory"
        )
    return int(free // profile.token_bytes)
