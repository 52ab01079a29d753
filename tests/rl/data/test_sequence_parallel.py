"""Sequence-parallel groups: typed-in costs, brute force, the exact mixed-integer program, and what every plan must keep."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, sparse

from rl.data import sequence_parallel as sp

# 4 devices, groups of 1, 2 and 4; links so slow that the degree matters
SLOW = dataclasses.replace(sp.GPT_7B, bandwidth={2: 40e9, 4: 10e9})
EIGHT = dataclasses.replace(sp.GPT_7B, bandwidth={2: 154e9, 4: 60e9, 8: 9e9})


def draw(seed, n, longest):
    lengths = np.random.default_rng(seed).lognormal(math.log(1500), 1.3, n)
    return np.clip(lengths, 1, longest).astype(int)


def exact(lengths, profile, capacity, devices) -> float:
    """M of one micro-batch by HiGHS: A[k, p] sequences of length b_k in group p, m[p] whether the group is used."""
    values, counts = np.unique(lengths, return_counts=True)
    degree = np.array([d for d in profile.degrees for _ in range(devices // d)])
    keys, groups = len(values), len(degree)
    seconds = sp.sequence_seconds(profile, values, degree)
    cells = keys * groups
    assigned = sparse.kron(sparse.eye(keys), np.ones(groups))
    of_group = lambda weight: sparse.csr_matrix(
        (weight.ravel(), (np.tile(np.arange(groups), keys), np.arange(cells))), (groups, cells)
    )
    zeros, eye = lambda *shape: sparse.csr_matrix(shape), sparse.eye(groups)
    rows = [
        (sparse.hstack([assigned, zeros(keys, groups + 1)]), counts, counts),
        (sparse.hstack([of_group(values[:, None] / degree), zeros(groups, groups + 1)]), -np.inf, capacity),
        (sparse.hstack([of_group(seconds), zeros(groups, groups), -np.ones((groups, 1))]), -np.inf, -profile.constant),
        (sparse.hstack([of_group(np.ones((keys, groups))), -len(lengths) * eye, zeros(groups, 1)]), -np.inf, 0),
        (sparse.hstack([zeros(1, cells), degree[None], zeros(1, 1)]), -np.inf, devices),
    ]
    most = np.where(values[:, None] <= capacity * degree, counts[:, None], 0).ravel()
    solved = optimize.milp(
        np.r_[np.zeros(cells + groups), 1],
        integrality=np.r_[np.ones(cells + groups), 0],
        bounds=optimize.Bounds(0, np.r_[most, np.ones(groups), np.inf]),
        constraints=[optimize.LinearConstraint(*row) for row in rows],
        options={"mip_rel_gap": 1e-6, "time_limit": 20},
    )
    return solved.fun if solved.status == 0 else math.inf


def brute(lengths, profile, capacity, devices) -> float:
    """M over all layouts and all assignments."""
    best = math.inf
    for counts in sp.adaptive(profile, devices):
        degree = np.repeat(profile.degrees[: len(counts)], counts)
        group = np.array(list(itertools.product(range(len(degree)), repeat=len(lengths))))
        seconds = sp.sequence_seconds(profile, lengths, degree)
        member = group[:, :, None] == np.arange(len(degree))
        fits = ((member * np.asarray(lengths)[:, None]).sum(axis=1) <= capacity * degree).all(axis=1)
        slowest = (member * seconds).sum(axis=1).max(axis=1)
        best = min(best, slowest[fits].min(initial=math.inf))
    return profile.constant + best


def check(step, lengths, profile, capacity, devices):
    """What every plan keeps: each sequence once, memory, devices, and the seconds it says."""
    np.testing.assert_array_equal(np.sort(np.concatenate([micro.sequence for micro in step])), np.arange(len(lengths)))
    for micro in step:
        assert micro.degree.sum() == devices and set(micro.degree) <= set(profile.degrees)
        assert (np.diff(micro.degree) <= 0).all()
        groups = [np.asarray(lengths)[micro.sequence[micro.group == g]] for g in range(len(micro.degree))]
        assert sum(map(len, groups)) == len(micro.sequence)
        for members, degree in zip(groups, micro.degree, strict=True):
            assert members.sum() <= capacity * degree
        seconds = [sp.group_seconds(profile, members, d) for members, d in zip(groups, micro.degree, strict=True)]
        assert max(seconds) == pytest.approx(micro.seconds, rel=1e-9)
        assert micro.bound <= micro.seconds * (1 + 1e-9)


def total(step):
    return sum(micro.seconds for micro in step)


def test_costs_by_hand():
    # 32,768 tokens on 16 devices: 5.128e-9 s^2 + 0.18396e-3 s = 11.5342 s of arithmetic; 2^21 bytes a token over 8.7 GB/s
    seconds = sp.sequence_seconds(sp.GPT_7B, [32768, 1000], [1, 16])
    assert seconds[0, 0] == pytest.approx(5.506148 + 6.028001, rel=1e-6)
    assert seconds[0, 1] == pytest.approx((5.506148 + 6.028001 + 2**21 * 32768 / 8.7e9) / 16, rel=1e-6)
    assert seconds[1, 0] == pytest.approx(0.005128 + 0.18396, rel=1e-9)
    assert sp.group_seconds(sp.GPT_7B, [1000, 1000], 1) == pytest.approx(0.6294 + 2 * 0.189088)
    assert sp.group_seconds(sp.GPT_7B, [], 4) == 0.6294
    # 16 x 6.7e9 bytes over 16 devices leave 24,330 of 30,720 MiB, at 4.71 a token
    assert sp.capacity(sp.GPT_7B, 30 * 2**30, 16) == 5165
    with pytest.raises(ValueError, match=r"its share of the state, 1.07e\+11 bytes.*got 1.07e\+09"):
        sp.capacity(sp.GPT_7B, 2**30, 1)
    with pytest.raises(ValueError, match=r"degrees \[1, 2, 4, 8, 16\] have; got \[32\]"):
        sp.sequence_seconds(sp.GPT_7B, [5], [32])


def test_layouts_add_up_to_all_devices():
    links = dataclasses.replace(sp.GPT_7B, bandwidth=dict.fromkeys((2, 4, 8, 16, 32, 64, 128, 256), 1e9))
    for devices, count in ((1, 1), (2, 2), (6, 6), (16, 36), (64, 1828)):  # binary partitions, OEIS A018819
        layouts = sp.adaptive(links, devices)
        assert len(np.unique(layouts, axis=0)) == len(layouts) == count
        assert (layouts @ np.array(links.degrees[: layouts.shape[1]]) == devices).all()
    np.testing.assert_array_equal(sp.homogeneous(links, 6), [[6, 0, 0], [0, 3, 0]])
    np.testing.assert_array_equal(sp.static(links, 8, 4), [[0, 0, 2, 0]])
    with pytest.raises(ValueError, match=r"divide 6 devices and be measured, which \[1, 2\] are; got 4"):
        sp.static(links, 6, 4)
    with pytest.raises(ValueError, match="at most 50000 layouts are compared.*got 256 devices"):
        sp.adaptive(links, 256)
    with pytest.raises(ValueError, match="at least 1 device; got 0"):
        sp.homogeneous(links, 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=10), st.integers(1, 5))
def test_boundaries_pad_least(lengths, count):
    edges = sp.boundaries(lengths, count)
    assert len(edges) <= count and edges[-1] == max(lengths) and (np.diff(edges) > 0).all()
    padded = lambda edges: np.sum(np.asarray(edges)[np.searchsorted(edges, lengths)]) - sum(lengths)
    shorter = sorted(set(lengths))[:-1]
    ways = [(*some, max(lengths)) for k in range(count) for some in itertools.combinations(shorter, k)]
    assert padded(edges) == min(map(padded, ways))


def test_buckets_multiply_until_half_of_the_free_memory_is_left():
    lengths = np.arange(1, 101)  # 5,050 tokens; in one bucket 10,000
    assert set(sp.bucketed(lengths, 20_000, count=1)) == {100}
    few = sp.bucketed(lengths, 5_350, count=1)
    assert (few >= lengths).all() and few.sum() <= 5_200
    assert sp.boundaries(lengths, len(set(few)) - 1)[-1] == 100
    fewer = sp.boundaries(lengths, len(set(few)) - 1)
    assert fewer[np.searchsorted(fewer, lengths)].sum() > 5_200  # no fewer would do
    np.testing.assert_array_equal(sp.bucketed(lengths, 5_050, count=1), lengths)
    with pytest.raises(ValueError, match="at most the 5049 tokens.*got 5050"):
        sp.bucketed(lengths, 5_049)
    with pytest.raises(ValueError, match="at least 1 bucket; got 2 sequences and 0"):
        sp.boundaries([1, 2], 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.integers(1, 5))
def test_split_has_the_least_largest_run(lengths, parts):
    runs = sp.split(lengths, parts)
    order = np.concatenate(runs)
    down = np.asarray(lengths)[order]
    assert sorted(order) == list(range(len(lengths))) and (np.diff(down) <= 0).all() and len(runs) <= parts
    ends = itertools.combinations(range(1, len(lengths)), min(parts, len(lengths)) - 1)
    best = min(max(run.sum() for run in np.split(down, list(cut))) for cut in ends)
    assert max(down_run.sum() for down_run in (np.asarray(lengths)[run] for run in runs)) == best
    dealt = sp.deal(lengths, parts)
    assert sorted(np.concatenate(dealt)) == list(range(len(lengths))) and len(dealt) == min(parts, len(lengths))
    tokens = [np.asarray(lengths)[part].sum() for part in dealt]
    assert max(tokens) - min(tokens) <= max(lengths)


@pytest.mark.parametrize("seed", range(4))
def test_brute_force_and_the_program_agree_and_the_plan_is_near(seed):
    lengths = draw(seed, 6, 16_000)
    capacity = max(3_000, int(lengths.sum() / 4 / 0.8))
    best = brute(lengths, SLOW, capacity, 4)
    assert exact(lengths, SLOW, capacity, 4) == pytest.approx(best, rel=1e-5)
    groups = sp.solve(lengths, SLOW, capacity, sp.adaptive(SLOW, 4))
    check([groups], lengths, SLOW, capacity, 4)
    assert groups.bound * (1 - 1e-9) <= best and best * (1 - 1e-9) <= groups.seconds <= 1.03 * best


@pytest.mark.parametrize("seed", range(4))
def test_within_three_percent_of_the_program(seed):
    """8 devices, 14 sequences; memory at three quarters. The program alone takes seconds here."""
    lengths = draw(10 + seed, 14, 20_000)
    capacity = max(int(lengths.sum() / 8 / 0.75), 2_600)
    best = exact(lengths, EIGHT, capacity, 8)
    groups = sp.solve(lengths, EIGHT, capacity, sp.adaptive(EIGHT, 8))
    check([groups], lengths, EIGHT, capacity, 8)
    assert groups.bound * (1 - 1e-5) <= best and best * (1 - 1e-5) <= groups.seconds <= 1.03 * best
    step = sp.plan(lengths, EIGHT, capacity, sp.adaptive(EIGHT, 8))
    check(step, lengths, EIGHT, capacity, 8)
    assert total(step) <= groups.seconds * (1 + 1e-9)  # more micro-batches may be faster


def test_equal_sequences_get_groups_of_equal_size():
    step = sp.plan([4_000] * 16, sp.GPT_7B, 5_000, sp.adaptive(sp.GPT_7B, 16))
    assert [set(micro.degree) for micro in step] == [{1}]
    lengths = [9_000] * 8  # too long for one device
    step = sp.plan(lengths, sp.GPT_7B, 5_000, sp.adaptive(sp.GPT_7B, 16))
    assert [set(micro.degree) for micro in step] == [{2}]
    assert total(step) == pytest.approx(sp.group_seconds(sp.GPT_7B, [9_000], 2))


def test_one_device_is_trivial():
    step = sp.plan([300, 200, 100], sp.GPT_7B, 5_000, sp.adaptive(sp.GPT_7B, 1))
    assert len(step) == 1 and list(step[0].degree) == [1] and not step[0].group.any()
    assert (
        step[0].seconds
        == pytest.approx(sp.group_seconds(sp.GPT_7B, [300, 200, 100], 1))
        == pytest.approx(step[0].bound)
    )
    assert sp.plan([], sp.GPT_7B, 5_000, sp.adaptive(sp.GPT_7B, 1)) == ()


def test_with_infinite_bandwidth_only_balance_matters():
    free = dataclasses.replace(sp.GPT_7B, bandwidth=dict.fromkeys((2, 4, 8, 16), math.inf))
    lengths = draw(0, 60, 16_000)
    step = sp.plan(lengths, free, 20_000, sp.adaptive(free, 16))
    # all devices on every sequence in turn are perfectly balanced, and nothing is better
    perfect = free.constant + sp.sequence_seconds(free, lengths, [1]).sum() / 16
    assert total(step) == pytest.approx(perfect, rel=1e-9)


def test_data_parallel_balance_is_longest_first_or_better():
    lengths = np.array([5, 5, 4, 4, 3, 3, 3])  # longest first alone makes loads of 11; 9 is the optimum
    linear = dataclasses.replace(sp.GPT_7B, quadratic=0.0, linear=1.0, constant=0.0)
    step = sp.plan(lengths, linear, 1_000, sp.static(linear, 3, 1))
    assert list(step[0].degree) == [1, 1, 1] and step[0].seconds == 9


@pytest.mark.parametrize(("devices", "n"), [(16, 128), (8, 40)])
def test_plans_keep_the_rules_and_adaptive_ones_are_no_slower(devices, n):
    profile = sp.GPT_7B if devices == 16 else EIGHT
    capacity = 5_166
    for seed, longest in itertools.product(range(2), (16_000, 5_000 * devices)):
        lengths = draw(seed, n, longest)
        adaptive, uniform = (
            sp.plan(lengths, profile, capacity, f(profile, devices)) for f in (sp.adaptive, sp.homogeneous)
        )
        static = sp.plan(lengths, profile, capacity, sp.static(profile, devices, devices))
        for step in (adaptive, uniform, static):
            check(step, lengths, profile, capacity, devices)
        assert total(adaptive) <= total(uniform) * (1 + 1e-9) and total(uniform) <= total(static) * (1 + 1e-9)
        assert all(len(set(micro.degree)) == 1 for micro in uniform)


def test_memory_so_short_that_only_one_way_fits():
    lengths = [7, 7, 7, 7, 4, 4, 4, 4, 2, 2]  # 48 tokens on 4 devices of 12: every device must be full
    step = sp.plan(lengths, SLOW, 12, sp.adaptive(SLOW, 4))
    check(step, lengths, SLOW, 12, 4)
    crowded = sp.plan([9] * 7, SLOW, 16, sp.static(SLOW, 4, 1))  # 63 tokens of 64, but one sequence a device
    check(crowded, [9] * 7, SLOW, 16, 4)
    assert len(crowded) == 2


def test_true_lengths_are_no_slower_than_rounded_ones():
    lengths = draw(3, 100, 16_000)
    capacity = 9_000
    rounded = sp.bucketed(lengths, 16 * capacity * 4)
    assert len(set(rounded)) <= 16 and (rounded >= lengths).all()
    for micro in sp.plan(rounded, sp.GPT_7B, capacity, sp.adaptive(sp.GPT_7B, 16)):
        true = [
            sp.group_seconds(sp.GPT_7B, lengths[micro.sequence[micro.group == g]], d)
            for g, d in enumerate(micro.degree)
        ]
        assert max(true) <= micro.seconds


def test_a_sequence_that_fits_no_group_is_named():
    with pytest.raises(ValueError, match=r"degree, 16, holds at 5000 a device; sequence 1 has 80001 \(1 such\)"):
        sp.plan([10, 80_001], sp.GPT_7B, 5_000, sp.adaptive(sp.GPT_7B, 16))
    with pytest.raises(ValueError, match="1 to 10000 tokens.*degree, 2, holds"):
        sp.plan([10_001], sp.GPT_7B, 5_000, sp.static(sp.GPT_7B, 16, 2))
    with pytest.raises(ValueError, match="sequence 1 has 80001"):
        sp.solve([10, 80_001], sp.GPT_7B, 5_000, sp.adaptive(sp.GPT_7B, 16))
    with pytest.raises(ValueError, match="4 devices of 16 tokens; got 7 sequences of 63 tokens"):
        sp.solve([9] * 7, SLOW, 16, sp.static(SLOW, 4, 1))
    with pytest.raises(ValueError, match="sequence 0 has 0"):
        sp.plan([0, 5], sp.GPT_7B, 5_000, sp.adaptive(sp.GPT_7B, 16))


def test_layouts_of_another_profile_are_refused():
    with pytest.raises(ValueError, match=r"groups of \[1, 2, 4\].*got shape \(1, 5\) for \[0\] devices"):
        sp.plan([5], SLOW, 100, sp.static(sp.GPT_7B, 16, 16))
    with pytest.raises(ValueError, match=r"for \[3, 4\] devices"):
        sp.plan([5], SLOW, 100, np.array([[4, 0, 0], [1, 1, 0]]))


def test_mixed_lengths_and_best_fit_fill_memory():
    # long with short, (6, 4) a device, fill two micro-batches; cut by length, three 6 would share two devices of 10
    step = sp.plan([6] * 4 + [4] * 4, SLOW, 10, sp.static(SLOW, 2, 1))
    check(step, [6] * 4 + [4] * 4, SLOW, 10, 2)
    assert len(step) == 2
    # 95 % of memory in use, where the first group done and the least full one are the wrong ones
    lengths = [1842, 2308, 2413, 2729, 8495, 11367]
    groups = sp.solve(lengths, SLOW, 7672, sp.adaptive(SLOW, 4))
    assert groups.seconds <= 1.03 * brute(lengths, SLOW, 7672, 4)
