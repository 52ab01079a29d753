"""Sequences of very different lengths on groups of devices of different sizes, chosen anew for every micro-batch.

One degree of sequence parallelism has to fit the longest sequence, and all the short ones then pay for exchanges over slow
links. Lengths are known before a step, so a plan can do better: a few large groups for the longest, small ones for the rest.

    profile = sequence_parallel.GPT_7B
    layouts = sequence_parallel.adaptive(profile, devices=16)
    for micro in sequence_parallel.plan(lengths, profile, capacity=5_000, layouts=layouts): ...

Host NumPy throughout: it says who works on what, and runs nothing. With `static(profile, devices, 1)` it is longest-first
balancing over data-parallel ranks. The packed rows of `rl.data.packing` are all equally long and need no balancing.
"""

from rl.data.sequence_parallel.buckets import boundaries, bucketed, deal, split
from rl.data.sequence_parallel.cost import GPT_7B, Profile, capacity, group_seconds, sequence_seconds
from rl.data.sequence_parallel.layouts import adaptive, homogeneous, static
from rl.data.sequence_parallel.solver import Groups, plan, solve

__all__ = [
    "GPT_7B", "Groups", "Profile", "adaptive", "boundaries", "bucketed", "capacity", "deal", "group_seconds", "homogeneous",
    "plan", "sequence_seconds", "solve", "split", "static",
]  # fmt: skip
