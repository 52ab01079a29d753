"""Recorded experts against whole forward passes, under everything the engine does."""

import dataclasses
import io

import jax
import numpy as np
import optax
import pytest

import eggroll
from rl.rollout import engine
from rl.rollout.generate import Orders, generate, warm_up
from rl.types import ABORTED, Requests, Rollouts
from tests.rl.models.tiny import random_params
from tests.rl.rollout.routed import KEY, SETTINGS, T, asked, expected, prepared, run, whole


def same_as_reference(requests, rollouts, **kind):
    np.testing.assert_array_equal(rollouts.experts, expected(requests, rollouts, **kind))


# -- recorded = recomputed, at equal weights, for every token of every row -------------------------------------------


@pytest.mark.parametrize("name", ["scanned", "one dense layer"])
def test_refilled_slots_record_what_a_whole_pass_chooses(name):
    got = whole() if name == "scanned" else run(name=name)
    same_as_reference(asked(), got, name=name)
    model = prepared(name)[0]
    assert got.experts.dtype == np.int8 and got.experts.shape == (8, 31 + 31, model.config.layers, 2)
    assert got.experts.nbytes == 8 * (31 + 31) * model.config.layers * 2
    sparse = [bool((got.experts[:, :, layer] >= 0).any()) for layer in range(model.config.layers)]
    assert sparse == [model.config.sparse(layer) for layer in range(model.config.layers)]
    assert got.length.max() > 12 and len(np.unique(got.experts)) == 6  # -1 and all five


def test_recording_changes_no_token():
    got, plain = whole(), run(record_experts=False)
    assert plain.experts is None
    for name in ("tokens", "length", "finish"):
        np.testing.assert_array_equal(getattr(got, name), getattr(plain, name))
    np.testing.assert_allclose(got.logp, plain.logp, atol=1e-6)


SIZES = {
    "pieces": {"slots": 16, "bucket": 7, "view": 5, "prefill_chunk": 3, "chunk": 3},  # of two prompts at a time
    "compacted": {"slots": 16, "tail": 8, "chunk": 64},  # more slots than work, then half of them
}


@pytest.mark.slow
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_sizes_change_nothing(sizes):
    np.testing.assert_array_equal(run(**sizes).experts, whole().experts)


def test_rows_that_share_a_prefill():
    prompts = [[1, 2, 4, 5, 9, 11]] * 5 + [[1, 2, 4, 5, 9, 12], [8], [8]]  # differs in the newest token alone
    requests = Requests.make(prompts, 8, uid=[3, 4, 5, 3, 6, 7, 8, 9])
    got = run(requests, slots=32)
    same_as_reference(requests, got)
    np.testing.assert_array_equal(got.experts[0], got.experts[3])  # one uid
    assert len({row.tobytes() for row in got.experts}) == 7


def test_stopped_and_resumed_rows():
    requests, rng, rollouts, rounds = asked(), np.random.default_rng(1), None, 0
    while rounds == 0 or (rollouts.finish == ABORTED).any():
        after = int(rng.integers(1, 3))

        def between(progress, after=after):
            begun = np.flatnonzero(progress.rollouts.length)  # rows as far as they are
            same_as_reference(requests.take(begun), progress.rollouts.take(begun))
            if progress.chunks == after:
                return Orders(stop=True)
            return Orders(abort=rng.choice(progress.running, 1)) if progress.running.size else None

        rollouts = run(dataclasses.replace(requests, done=rollouts), between)
        rounds += 1
    assert rounds > 2
    np.testing.assert_array_equal(rollouts.experts, whole().experts)


def test_rows_resumed_beside_other_prompts_and_shuffled():
    """The tables of a resumed row have the prompt columns of the batch it was in before."""
    part = run(asked([0, 5, 6]), lambda progress: Orders(stop=True))
    assert part.experts.shape[1] == 31 + 25 and (part.length == 4).sum() >= 2
    short = asked([0, 5, 6])
    short = dataclasses.replace(short, prompt=short.prompt[:, :9], done=part).take(np.array([2, 0, 1]))
    got = run(short)
    assert got.experts.shape[1] == 9 + 25
    same_as_reference(short, got)


def test_refreshed_caches():
    got = run(between=lambda progress: Orders(refresh=True, version=progress.chunks))
    np.testing.assert_array_equal(got.experts, whole().experts)


def test_submitted_rows():
    first, second, third = asked([1, 3]), asked([0, 2, 4]), asked([5, 6, 7])
    first, third = (dataclasses.replace(x, prompt=x.prompt[:, :11]) for x in (first, third))
    part = run(third, lambda progress: Orders(stop=True))
    orders = {1: Orders(submit=second), 2: Orders(submit=dataclasses.replace(third, done=part))}
    got = run(first, lambda progress: orders.get(progress.chunks))
    np.testing.assert_array_equal(got.experts, whole().experts[[1, 3, 0, 2, 4, 5, 6, 7]])


@pytest.mark.slow
def test_members_of_a_population():
    model, params = prepared()
    es = eggroll.strategy(optax.sgd(0.1), population=eggroll.crossed(4), sigma=0.3, rules=model.rules)
    state = es.init(params, jax.random.key(3))
    requests = dataclasses.replace(asked([0, 0, 0, 5, 5]), member=np.array([-1, 0, 2, 2, 3], np.int32))
    got, materialised = run(requests, params=jax.jit(es.draw)(state)), jax.jit(es.member_params)
    for row, member in enumerate(requests.member):
        weights = state.params if member < 0 else materialised(state, int(member))
        same_as_reference(requests.take([row]), got.take([row]), params=weights)
    assert (got.experts[0, :9] != got.experts[1, :9]).any()


@pytest.mark.parametrize("resumed", [False, True])
def test_other_weights_record_with_the_version_that_drew_the_next_token(resumed):
    """Caches are rebuilt, but what older weights were recorded with stays: it belongs to the log-probabilities of its time."""
    model, params = prepared()
    other = random_params(model, 1.4)
    requests = asked([0, 5, 6])
    if resumed:
        part = run(requests, lambda progress: Orders(stop=True), stop=())
        settings = dataclasses.replace(SETTINGS, stop=())
        got = generate(model, settings, other, dataclasses.replace(requests, done=part), KEY, version=2)
    else:
        swap = lambda progress: Orders(weights=other, version=2, refresh=True) if progress.chunks == 1 else None
        got = run(requests, swap, stop=())
    old, new = (expected(requests, got, params=weights) for weights in (params, other))
    drawn_by = np.ones(got.experts.shape[:2], int)
    columns = requests.prompt.shape[1]
    for row in range(3):  # the token before completion token j is its neighbour, or the prompt's last
        drawn_by[row, columns : columns + got.length[row] - 1] = got.version[row, 1 : got.length[row]]
    assert set(got.version[got.mask]) == {1, 2} and (old != new).any()
    np.testing.assert_array_equal(got.experts, np.where(drawn_by[..., None, None] == 1, old, new))


def test_rows_done_without_a_record_are_filled_in():
    part = run(between=lambda progress: Orders(stop=True), record_experts=False)
    got = run(dataclasses.replace(asked(), done=part))
    going = part.finish == ABORTED
    np.testing.assert_array_equal(got.experts[going], whole().experts[going])
    assert (got.experts[~going] == -1).all() and (~going).any()
    # and a record is not carried where nothing is recorded
    assert run(dataclasses.replace(asked(), done=whole()), record_experts=False).experts is None


def test_nothing_is_traced_after_warm_up():
    model, params = prepared()
    warm_up(model, SETTINGS, params, stream=io.StringIO())
    before = engine.TRACES.copy()
    run(asked([0, 1, 4]), lambda progress: Orders(refresh=True))
    assert engine.TRACES - before == {}


def test_programs_without_a_record_hold_no_ids():
    model, params = prepared()

    def text(record):
        settings = dataclasses.replace(SETTINGS, record_experts=record)
        state = jax.eval_shape(lambda: engine.init(model, settings))
        lowered = engine.decode.lower(model, settings, T, params, state, KEY, np.int32(1))
        return lowered.as_text(), jax.eval_shape(lambda: lowered.out_info[1].experts)

    off, on = text(False), text(True)
    assert "xi8>" not in off[0] and off[1] is None
    assert "tensor<4x3x2x2xi8>" in on[0] and (on[1].shape, on[1].dtype) == ((4, 3, 2, 2), np.int8)


def test_tables_are_joined_with_their_records():
    a, b = whole().take([0, 3]), run(Requests.make([[4] * 40], 5), length=64)
    joined = Rollouts.join([a, b])
    assert joined.experts.shape == (3, 40 + 31, 2, 2)
    np.testing.assert_array_equal(joined.experts[:2, :31], a.experts[:, :31])
    np.testing.assert_array_equal(joined.experts[:2, 40:], a.experts[:, 31:])
    np.testing.assert_array_equal(joined.experts[2, :45], b.experts[0])
    assert (joined.experts[:2, 31:40] == -1).all() and (joined.experts[2, 45:] == -1).all()
    with pytest.raises(ValueError, match=r"all have recorded experts, or none of them; got \[True, False\]"):
        Rollouts.join([a, dataclasses.replace(b, experts=None)])


def test_records_of_another_model_cannot_be_resumed():
    part, requests = whole(), asked()
    for shape in ((8, 62, 3, 2), (8, 62, 2, 1), (7, 62, 2, 2), (8, 61, 2, 2), (8, 62, 4)):
        done = dataclasses.replace(part, experts=np.zeros(shape, np.int8))
        with pytest.raises(
            ValueError, match=r"at least 62 prompt and completion columns, .* \(8, 2, 2\) without .*; got \("
        ):
            run(dataclasses.replace(requests, done=done))
    for value in (5, -2):
        experts = part.experts.copy()
        experts[4, 3, 1, 0] = value
        with pytest.raises(ValueError, match=rf"ids 0 to 4, or -1 .*; got \[{value}\] in rows \[4\] \(1 of 8\)"):
            run(dataclasses.replace(requests, done=dataclasses.replace(part, experts=experts)))
