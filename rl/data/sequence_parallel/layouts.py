"""How devices may be divided into groups: i64 [K, D], row k has layouts[k, j] groups of the profile's degree j.

The three below are what a plan may choose from, and all that tells an adaptive method from a static one. Groups may stay empty,
so a layout also stands for those that leave devices idle.
"""

import functools

import numpy as np

from rl.data.sequence_parallel.cost import Profile

_MOST = 50_000


def adaptive(profile: Profile, devices: int) -> np.ndarray:
    """Every layout: 36 of 16 devices, 1,828 of 64, where degrees are the powers of 2.

    Raises:
        ValueError: more layouts than can be compared.
    """
    degrees = _degrees(profile, devices)
    count = _count(devices, degrees)
    if count > _MOST:
        raise ValueError(
            f"at most {_MOST} layouts are compared, which 128 devices stay below where degrees are the powers of 2; got "
            f"{devices} devices with {count}: plan for blocks of them apart"
        )
    return np.array(_ways(devices, degrees), np.int64)


def homogeneous(profile: Profile, devices: int) -> np.ndarray:
    """Groups of one size, any that divides the devices."""
    degrees = _degrees(profile, devices)
    return np.array([[devices // d if d == e else 0 for e in degrees] for d in degrees if devices % d == 0], np.int64)


def static(profile: Profile, devices: int, degree: int) -> np.ndarray:
    """Groups of `degree` devices; those of 1 are data parallelism.

    Raises:
        ValueError: a degree that has no bandwidth or does not divide the devices.
    """
    degrees = _degrees(profile, devices)
    allowed = [d for d in degrees if devices % d == 0]
    if degree not in allowed:
        raise ValueError(f"the degree must divide {devices} devices and be measured, which {allowed} are; got {degree}")
    return np.array([[devices // d if d == degree else 0 for d in degrees]], np.int64)


def _degrees(profile: Profile, devices: int) -> tuple[int, ...]:
    if devices < 1:
        raise ValueError(f"there must be at least 1 device; got {devices}")
    return tuple(d for d in profile.degrees if d <= devices)


@functools.cache
def _count(devices: int, degrees: tuple[int, ...]) -> int:
    if degrees == (1,):
        return 1
    return sum(_count(devices - used, degrees[:-1]) for used in range(0, devices + 1, degrees[-1]))


def _ways(devices: int, degrees: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Numbers of groups of each degree that add up to the devices; degree 1 takes what the others leave."""
    if degrees == (1,):
        return [(devices,)]
    return [
        (*rest, used)
        for used in range(devices // degrees[-1] + 1)
        for rest in _ways(devices - used * degrees[-1], degrees[:-1])
    ]
