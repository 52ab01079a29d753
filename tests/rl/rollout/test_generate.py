"""The engine against a sampler without a cache: every kind of model, settings, interruptions, swaps, orders, mistakes."""

import dataclasses
import functools
import io
import json
import os
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import eggroll
from rl.models.presets import make
from rl.rollout import engine
from rl.rollout.engine import Settings
from rl.rollout.generate import Orders, generate, warm_up
from rl.rollout.sampling import GREEDY, Sampling
from rl.rollout.score import score
from rl.types import ABORTED, LENGTH, STOPPED, Requests
from tests.rl.models.tiny import SHAPES, VOCAB, random_params
from tests.rl.rollout import naive

_ROOT = Path(__file__).parents[3]
STORIES = Path(os.environ.get("EGGROLL_DATA", _ROOT.parent / "shared" / "data")) / "stories260K"
T = 32
KEY = jax.random.key(11)
MIXED = Sampling(temperature=0.8, top_k=9, top_p=0.95, min_p=0.01)
BASE = Settings(slots=3, length=T, stop=(3, 7), chunk=4, bucket=8, view=8, prefill_chunk=8)
ONE_SIZE = {"bucket": T, "view": 0}  # least to compile
# a bucket is filled by one token less than it: 9 and 17 fill 8 and 16; 1 fills none; 31 leaves room for one token
PROMPTS, BUDGETS = (9, 1, 31, 2, 17, 5, 8, 10), (20, 31, 1, 1, 15, 25, 12, 9)
CASES = {
    "llama": (SHAPES["llama"], Sampling()),
    "qwen3": (dataclasses.replace(SHAPES["qwen3"], scan_layers=True), MIXED),
    "moe": (SHAPES["moe"], Sampling(temperature=1.4, min_p=0.02)),
    "rwkv7": (SHAPES["rwkv7"], MIXED),
    "greedy": (dataclasses.replace(SHAPES["llama"], layers=1), GREEDY),
}


@functools.cache
def prepared(name):
    config, sampling = CASES[name]
    model = make(config)
    sizes = {"bucket": 16, "view": 16} if name in ("llama", "rwkv7") else ONE_SIZE
    return model, random_params(model, 0.7), dataclasses.replace(BASE, sampling=sampling, **sizes)


def requests(member=-1):
    rng = np.random.default_rng(4)
    prompts = [rng.integers(0, VOCAB, n).tolist() for n in PROMPTS]
    uid = np.array([2**32 - 1, 5, 0, 77, 2**31, 6, 8, 9], np.uint32)
    return Requests.make(prompts, np.array(BUDGETS), uid=uid, member=member)


@functools.cache
def reference(name):
    model, params, settings = prepared(name)
    return naive.generate(model, params, requests(), KEY, settings)


def equal(got, expected, atol=1e-4):
    """Rollouts equal the naive sampler's rows: tokens and how they ended exactly, log-probs to a tolerance."""
    tokens, logp, logp_full, finish = expected
    for row, ids in enumerate(tokens):
        n = int(got.length[row])
        assert got.tokens[row, :n].tolist() == ids.tolist(), row
        assert (got.tokens[row, n:] == 0).all() and (got.logp[row, n:] == 0).all()
        np.testing.assert_allclose(got.logp[row, :n], logp[row], atol=atol, rtol=0)
        np.testing.assert_allclose(got.logp_full[row, :n], logp_full[row], atol=atol, rtol=0)
    np.testing.assert_array_equal(got.finish, finish)


def same(got, expected, rows=None):
    """Two results of the engine: tokens equal, log-probs to 1e-5."""
    expected = expected if rows is None else expected.take(rows)
    width = max(got.tokens.shape[1], expected.tokens.shape[1])
    wide = lambda x: np.pad(x, ((0, 0), (0, width - x.shape[1])))
    for name in ("length", "finish", "member"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), err_msg=name)
    np.testing.assert_array_equal(wide(got.tokens), wide(expected.tokens))
    for name in ("logp", "logp_full"):
        np.testing.assert_allclose(wide(getattr(got, name)), wide(getattr(expected, name)), atol=1e-5, rtol=0)


# -- the right tokens ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_tokens_equal_a_sampler_without_a_cache(name):
    model, params, settings = prepared(name)
    expected = reference(name)
    assert {LENGTH, STOPPED} == set(expected[3].tolist()) and max(map(len, expected[0])) > 12
    got = generate(model, settings, params, requests(), KEY, version=6)
    equal(got, expected)
    assert got.tokens.dtype == got.length.dtype == got.version.dtype == np.int32 and got.logp.dtype == np.float32
    assert (got.version == np.where(got.mask, 6, 0)).all()


@pytest.mark.parametrize("name", ["llama", "moe", "rwkv7"])
def test_log_probs_equal_teacher_forced_scoring_at_every_position(name):
    model, params, settings = prepared(name)
    asked = requests()
    got = generate(model, settings, params, asked, KEY)
    ids = np.zeros((len(asked), T), np.int32)
    for row, n in enumerate(asked.prompt_length):
        ids[row, :n] = asked.prompt[row, :n]
        ids[row, n : n + got.length[row]] = got.tokens[row, : got.length[row]]
    lengths = asked.prompt_length + got.length
    temperatures = {1.0: got.logp_full} | (
        {} if settings.sampling.truncates else {settings.sampling.temperature: got.logp}
    )
    for temperature, logp in temperatures.items():
        scored = np.asarray(score(model, params, ids, lengths, temperature=temperature)[0])
        for row, (start, n) in enumerate(zip(asked.prompt_length, got.length, strict=True)):
            np.testing.assert_allclose(logp[row, :n], scored[row, start : start + n], atol=1e-4, rtol=0)
            assert start == 1 or np.abs(scored[row, 1:start]).max() > 0


VARIANTS = {
    "one slot, one step": {"slots": 1, "chunk": 1, **ONE_SIZE},
    "more slots than work, chunks longer than any row": {"slots": 13, "chunk": 64, **ONE_SIZE},
    "small buckets, small pieces": {"bucket": 1, "view": 1, "prefill_chunk": 3, "slots": 8},
    "sizes that divide nothing": {"bucket": 7, "view": 5, "prefill_chunk": 6, "chunk": 3},
    "sizes beyond the cache": {"bucket": 1000, "view": 1000, "prefill_chunk": 1000, "slots": 4},
}


@functools.cache
def shallow():
    """One layer, for what compiles often; in f32."""
    model = make(dataclasses.replace(SHAPES["llama"], layers=1))
    return model, random_params(model, 0.7), BASE


@functools.cache
def whole(sampling=None, **changes):
    model, params, settings = shallow()
    settings = dataclasses.replace(settings, sampling=sampling or settings.sampling, **changes)
    return generate(model, settings, params, requests(), KEY)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_sizes_change_nothing(name):
    model, params, _ = shallow()
    expected = naive_shallow()
    got = whole(**VARIANTS[name])
    equal(got, expected)
    same(got, whole())


@functools.cache
def naive_shallow():
    model, params, settings = shallow()
    return naive.generate(model, params, requests(), KEY, settings)


def test_order_of_requests_changes_nothing():
    model, params, settings = shallow()
    rng = np.random.default_rng(0)
    for _ in range(3):
        order = rng.permutation(len(PROMPTS))
        same(generate(model, settings, params, requests().take(order), KEY), whole(), order)
    same(generate(model, settings, params, requests().take([4]), KEY), whole(), [4])


def test_bf16_and_a_key_of_another_kind_run():
    model = make(dataclasses.replace(SHAPES["llama"], layers=1, dtype="bfloat16"))
    params = random_params(model, 0.7)
    asked = requests().take([0, 4, 5])
    got = generate(model, dataclasses.replace(BASE, **ONE_SIZE), params, asked, jax.random.key(0, impl="rbg"))
    assert got.length.min() >= 1 and np.isfinite(got.logp).all() and got.logp.dtype == np.float32
    ids = np.concatenate([asked.prompt, np.zeros((3, T), np.int32)], 1)
    for row, n in enumerate(asked.prompt_length):
        ids[row, n : n + got.tokens.shape[1]] = got.tokens[row]
    lengths = asked.prompt_length + got.length
    scored = np.asarray(score(model, params, ids, lengths)[0])
    spans = zip(got.logp, scored, asked.prompt_length, got.length, strict=True)
    gap = np.concatenate([logp[:n] - row[start : start + n] for logp, row, start, n in spans])
    assert np.abs(gap).max() < 0.1 and np.abs(gap).mean() < 0.02


@pytest.mark.slow
def test_stories_greedy_continuations():
    if not (STORIES / "model.safetensors").is_file():
        pytest.skip(f"no stories260K in {STORIES.parent} (set EGGROLL_DATA)")
    pytest.importorskip("safetensors", reason="checkpoints are safetensors files")
    pytest.importorskip("tokenizers", reason="the checkpoint has a tokenizer.json")
    from rl.models.load import load

    model, params, tokenizer = load(STORIES)
    prompts = json.loads((STORIES / "reference.json").read_text())["prompts"]
    asked = Requests.make([prompt["ids"] for prompt in prompts], 64)
    settings = Settings(slots=2, length=128, stop=(tokenizer.eos,), sampling=GREEDY, bucket=32, view=128)
    got = generate(model, settings, params, asked, KEY)
    for row, prompt in enumerate(prompts):
        assert got.tokens[row].tolist() == prompt["greedy_ids"]
        np.testing.assert_allclose(got.logp_full[row], prompt["greedy_logprobs"], atol=1e-4, rtol=0)
    assert (got.finish == LENGTH).all() and (got.logp == 0).all()


# -- edges -----------------------------------------------------------------------------------------------------------


def test_no_requests():
    model, params, settings = shallow()
    for asked in (Requests.make([], 4), requests().take(np.array([], int))):
        got = generate(model, settings, params, asked, KEY)
        assert len(got) == 0 and got.tokens.shape == (0, 1)


def test_a_stop_token_first_and_every_token_a_stop():
    model, params, settings = shallow()
    settings = dataclasses.replace(settings, **ONE_SIZE)
    tokens = naive_shallow()[0]
    stop = tuple({int(ids[0]) for ids in tokens})
    got = generate(model, dataclasses.replace(settings, stop=stop), params, requests(), KEY)
    assert (got.length == 1).all() and (got.finish == STOPPED).all()
    assert got.tokens[:, 0].tolist() == [ids[0] for ids in tokens]
    # no stop tokens at all: every budget is used up
    got = generate(model, dataclasses.replace(settings, stop=()), params, requests(), KEY)
    np.testing.assert_array_equal(got.length, BUDGETS)
    assert (got.finish == LENGTH).all()


@pytest.mark.slow
def test_equal_prompts_share_one_prefill(monkeypatch):
    model, params, settings = shallow()
    seen = []
    admit = engine.admit

    def counted(model, settings, weights, state, ids, count, member, rows):
        seen.append((len(ids), int((count > 0).sum()), int((rows.slot < settings.slots).sum())))
        return admit(model, settings, weights, state, ids, count, member, rows)

    monkeypatch.setattr(engine, "admit", counted)
    prompts = [[1, 2, 4, 5]] * 7 + [[1, 2, 4, 6]]
    wide = dataclasses.replace(settings, slots=32, **ONE_SIZE)  # admitted four at a time
    es, state = population("crossed", 1)[:2]
    drawn = jax.jit(es.draw)(state)
    got = generate(model, wide, drawn, Requests.make(prompts, 10), KEY)
    # the last prompt differs in its newest token alone, which is not part of the prefill
    assert seen == [(1, 1, 4)] * 2
    same(generate(model, wide, drawn, Requests.make(prompts[-1:], 10, uid=[7]), KEY), got, [7])
    assert len({tuple(row) for row in got.tokens[:7].tolist()}) > 3
    seen.clear()
    asked = Requests.make(prompts, 10, member=[0, 0, 0, 0, 1, 2, -1, -1])
    shared = generate(model, wide, drawn, asked, KEY)
    assert seen == [(1, 1, 4), (4, 3, 4)]
    same(generate(model, population("crossed", 1)[3], drawn, asked, KEY), shared)


def test_equal_uids_get_equal_completions():
    model, params, settings = shallow()
    got = generate(model, settings, params, Requests.make([[4, 5]] * 5, 12, uid=[3, 3, 4, 3, 4]), KEY)
    assert got.tokens[0].tolist() == got.tokens[1].tolist() == got.tokens[3].tolist() != got.tokens[2].tolist()
    other = generate(model, settings, params, Requests.make([[4, 5]], 12, uid=[3]), jax.random.key(12))
    assert other.tokens[0].tolist() != got.tokens[0].tolist()


# -- stop and go on --------------------------------------------------------------------------------------------------


def going_on(asked, rollouts, budget=BUDGETS):
    return dataclasses.replace(asked, done=rollouts, budget=np.asarray(budget, np.int32))


@pytest.mark.parametrize("name", ["llama", "rwkv7", "greedy"])
def test_stopped_and_resumed_at_random_points_equals_one_go(name):
    model, params, settings = prepared(name)
    expected, asked, rng = reference(name), requests(), np.random.default_rng(1)
    rollouts, rounds = None, 0
    while rounds == 0 or (rollouts.finish == ABORTED).any():
        after = int(rng.integers(1, 3))

        def between(progress, after=after):
            if progress.chunks == after:
                return Orders(stop=True)
            return Orders(abort=rng.choice(progress.running, 1)) if progress.running.size else None

        rollouts = generate(model, settings, params, going_on(asked, rollouts), KEY, version=rounds, between=between)
        rounds += 1
    assert rounds > 2
    equal(rollouts, expected)
    assert set(rollouts.version[rollouts.mask].tolist()) == set(range(rounds))


def test_budgets_that_grow_equal_one_go():
    """A row that used up its budget goes on under a larger one, as if it had had it from the start."""
    model, params, settings = shallow()
    asked, rng = requests(), np.random.default_rng(2)
    rollouts = None
    for share in (0.1, 0.5, 0.6, 1.0):
        budget = np.maximum(1, np.ceil(share * np.array(BUDGETS))).astype(np.int32)
        order = rng.permutation(len(asked))
        rollouts = generate(model, settings, params, going_on(asked, rollouts, budget).take(order), KEY)
        rollouts = rollouts.take(np.argsort(order))
        assert (rollouts.length <= budget).all()
        assert ((rollouts.finish == LENGTH) == (rollouts.length == budget))[rollouts.finish != STOPPED].all()
    same(rollouts, whole())


def test_rows_done_already_are_returned_untouched():
    model, params, settings = shallow()
    asked, finished = requests(), whole()
    calls = []
    again = generate(model, settings, params, going_on(asked, finished), KEY, between=calls.append)
    assert len(calls) == 1 and not calls[0].running.size  # asked once: it might have submitted something
    jax.tree.map(np.testing.assert_array_equal, dataclasses.asdict(again), dataclasses.asdict(finished))
    # interrupted exactly at the budget: nothing is left to do
    cut = dataclasses.replace(
        finished, finish=np.where(finished.finish == LENGTH, ABORTED, finished.finish).astype(np.int8)
    )
    same(generate(model, settings, params, going_on(asked, cut), KEY, between=calls.append), finished)
    assert len(calls) == 2


def test_inputs_are_not_written_to():
    model, params, settings = shallow()
    asked, stopper = requests(), lambda progress: Orders(stop=True)
    partial = generate(model, settings, params, asked, KEY, between=stopper)
    assert (partial.finish == ABORTED).any() and partial.length.sum() > 0
    copy = jax.tree.map(np.copy, dataclasses.asdict(partial))
    generate(model, settings, params, going_on(asked, partial), KEY)
    jax.tree.map(np.testing.assert_array_equal, dataclasses.asdict(partial), copy)


# -- between chunks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refresh", [False, True])
@pytest.mark.parametrize("name", ["llama", "rwkv7"])
def test_swapping_in_equal_weights_changes_nothing(name, refresh):
    model, params, settings = prepared(name)
    clone = jax.tree.map(lambda x: x + 0, params)
    versions = lambda progress: Orders(weights=clone, version=progress.chunks, refresh=refresh)
    got = generate(model, settings, params, requests(), KEY, between=versions)
    equal(got, reference(name))
    for row in np.flatnonzero(got.length > 0):
        version = got.version[row, : got.length[row]]
        assert (np.diff(version) >= 0).all() and np.bincount(version).max() <= settings.chunk
    assert got.version.max() > 3


@pytest.mark.parametrize("refresh", [False, True])
def test_swapping_in_other_weights_changes_later_tokens_only(refresh):
    model, params, settings = shallow()
    other = jax.tree.map(lambda x: 1.5 * x, params)
    asked = requests().take([0, 1, 5])  # all run from the start
    swap = lambda progress: Orders(weights=other, version=9, refresh=refresh) if progress.chunks == 1 else None
    settings = dataclasses.replace(settings, stop=(), **ONE_SIZE)
    before = generate(model, settings, params, asked, KEY)
    got = generate(model, settings, params, asked, KEY, version=8, between=swap)
    assert got.version[got.mask].tolist() == sum(([8] * 4 + [9] * int(n - 4) for n in got.length), [])
    np.testing.assert_array_equal(got.tokens[:, :4], before.tokens[:, :4])
    assert all((got.tokens[row, 4:] != before.tokens[row, 4:]).any() for row in range(3))
    # refreshed, the rest is what the other weights write after the first tokens; else the cache is still the old one's
    done = generate(model, settings, params, asked, KEY, version=8, between=lambda progress: Orders(stop=True))
    expected = generate(model, settings, other, dataclasses.replace(asked, done=done), KEY, version=9)
    close = np.allclose(got.logp, expected.logp, atol=1e-5)
    assert close == refresh
    if refresh:
        same(got, expected)
        np.testing.assert_array_equal(got.version, expected.version)


def test_submitted_rows_equal_rows_asked_for_at_once():
    model, params, settings = shallow()
    first, second, third = requests().take([0, 5, 4]), requests().take([1, 2]), requests().take([3, 6, 7])
    done = generate(model, settings, params, third, KEY, between=lambda progress: Orders(stop=True))
    submitted = {1: second, 3: dataclasses.replace(third, done=done)}
    seen = []

    def between(progress):
        seen.append((progress.running.size + progress.waiting.size, len(progress.rollouts)))
        return Orders(submit=submitted.get(progress.chunks))

    got = generate(model, settings, params, first, KEY, between=between)
    same(got, whole(), [0, 5, 4, 1, 2, 3, 6, 7])
    assert seen[0][1] == 3 and seen[1][1] == 5 and seen[-1] == (0, 8)


def test_submission_after_the_last_row_ended_goes_on():
    model, params, settings = shallow()
    more = [requests().take([1])]

    def between(progress):
        if not progress.running.size and more:
            return Orders(submit=more.pop())

    same(generate(model, settings, params, requests().take([3]), KEY, between=between), whole(), [3, 1])


def test_aborts_of_running_waiting_ended_and_new_rows():
    model, params, settings = shallow()
    extra = Requests.make([[1, 2]], 5)
    log = []

    def between(progress):
        log.append(progress)
        if progress.chunks == 1:
            ended = progress.ended.tolist()
            # in any order, twice, what runs, what waits, what ended, and the row submitted in the same breath
            return Orders(abort=[8, 7, *progress.running[:1], 7, *ended, 6, 8], submit=extra)

    got = generate(model, settings, params, requests(), KEY, between=between)
    gone = {6, 7, 8, int(log[0].running[0])}
    full = whole()
    for row in range(8):
        if row in gone:
            n = got.length[row]
            assert got.finish[row] == ABORTED and (0 < n <= 4 if row == log[0].running[0] else n == 0)
            np.testing.assert_array_equal(got.tokens[row, :n], full.tokens[row, :n])
    assert got.length[8] == 0 and got.finish[8] == ABORTED
    kept = np.array([row for row in range(8) if row not in gone])
    same(got.take(kept), full, kept)
    assert not any(np.isin([*progress.running, *progress.waiting], [*gone]).any() for progress in log[1:])


def test_progress_says_what_ended_runs_and_waits():
    model, params, settings = shallow()
    ended = []

    def between(progress):
        ended.extend(progress.ended.tolist())
        parts = [np.array(ended), progress.running, progress.waiting]
        assert sorted(np.concatenate(parts).tolist()) == list(range(8))
        finish = progress.rollouts.finish
        assert (finish[progress.ended] != ABORTED).all() and (finish[progress.running] == ABORTED).all()
        assert progress.running.size <= 3

    generate(model, settings, params, requests(), KEY, between=between)
    assert sorted(ended) == list(range(8))


def test_compacting_the_tail_changes_nothing(monkeypatch):
    """16 slots with one long row: with a tail, and without `between`, the slots are halved."""
    model, params, settings = shallow()
    sizes = []
    decode = engine.decode

    def watched(model, settings, view, weights, state, key, enough):
        sizes.append(state.token.shape[0])
        return decode(model, settings, view, weights, state, key, enough)

    monkeypatch.setattr(engine, "decode", watched)
    settings = dataclasses.replace(settings, slots=16, tail=8, **ONE_SIZE)
    order = [2, 3] * 4 + [0, 1, 4, 5, 6, 7, 0, 1]  # what goes on is in the upper half
    got = generate(model, settings, params, requests().take(order), KEY)
    assert sizes[0] == 16 and sizes[-1] == 8
    sizes.clear()
    same(got, generate(model, settings, params, requests().take(order), KEY, between=lambda progress: None))
    assert set(sizes) == {16}
    same(got, whole(), order)


# -- populations -----------------------------------------------------------------------------------------------------

POPULATIONS = {
    "crossed": eggroll.crossed(4),
    "antithetic": eggroll.antithetic(4),
    "independent": eggroll.independent(3),
}


KINDS = {
    "qwen3": (dataclasses.replace(SHAPES["qwen3"], layers=1, scan_layers=True), MIXED),
    "moe": (dataclasses.replace(SHAPES["moe"], layers=1), Sampling(temperature=1.4, min_p=0.02)),
    "rwkv7": (dataclasses.replace(SHAPES["rwkv7"], layers=1), GREEDY),
}


@functools.cache
def population(name, rank, kind=None):
    model, params, settings = shallow()
    if kind:
        model = make(KINDS[kind][0])
        params = random_params(model, 0.7)
    settings = dataclasses.replace(settings, sampling=KINDS[kind][1] if kind else Sampling(), **ONE_SIZE)
    es = eggroll.strategy(optax.sgd(0.1), population=POPULATIONS[name], sigma=0.1, rank=rank, rules=model.rules)
    return es, es.init(params, jax.random.key(3)), model, settings


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rank", "kind"),
    [
        ("independent", 1, None),
        ("crossed", 4, "qwen3"), ("antithetic", 1, "moe"), ("independent", 4, "rwkv7"),
    ],
)  # fmt: skip
def test_a_population_in_one_batch_equals_each_member_alone(name, rank, kind):
    es, state, model, settings = population(name, rank, kind)
    members = range(-1, es.population.size)
    member = np.random.default_rng(1).permutation([*members, *members]).astype(np.int32)
    asked = dataclasses.replace(requests().take(np.resize([0, 5, 6, 4, 7, 1], len(member))), member=member)
    got = generate(model, settings, jax.jit(es.draw)(state), asked, KEY)
    materialised, seen = jax.jit(es.member_params), set()
    for n in members:
        rows = np.flatnonzero(member == n)
        params = state.params if n < 0 else materialised(state, n)
        expected = naive.generate(model, params, asked.take(rows), KEY, settings)
        equal(got.take(rows), expected)
        seen.add(tuple(expected[2][0][:1]))
    assert len(seen) == len(members) and got.length.max() > 5


def test_members_differ_on_one_prompt_with_one_uid_and_the_mean_is_the_mean():
    es, state, model, settings = population("crossed", 1)
    asked = Requests.make([[4, 5, 6]] * 5, 12, uid=[2] * 5, member=range(-1, 4))
    got = generate(model, settings, jax.jit(es.draw)(state), asked, KEY)
    assert len({tuple(row) for row in got.logp.tolist()}) == 5
    plain = generate(model, settings, state.params, asked.take([0]), KEY)
    same(got.take([0]), plain)


# -- what is compiled ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_nothing_is_traced_after_warm_up():
    model, weights, _ = shallow()
    settings = Settings(slots=16, length=12, stop=(3,), chunk=2, bucket=12, view=6, tail=8)
    stream = io.StringIO()
    seconds = warm_up(model, settings, weights, stream=stream)
    printed = stream.getvalue().splitlines()
    assert len(printed) == len(seconds) and all(value >= 0 for value in seconds.values())
    for name, line in zip(seconds, printed, strict=True):
        assert name in line and line.endswith(f"{seconds[name]:.1f} s")
    assert {name.split(",")[0] for name in seconds} == {"decode", "admit", "compact", "release"}
    before, rng = engine.TRACES.copy(), np.random.default_rng(0)
    for n in (1, 2, 5, 40):
        prompts = [rng.integers(0, VOCAB, rng.integers(1, 12)).tolist() for _ in range(n)]
        budget = [int(rng.integers(1, 13 - len(prompt))) for prompt in prompts]
        asked = Requests.make(prompts, np.array(budget))
        generate(model, settings, weights, asked, KEY, version=n)

        def between(progress):
            others = jax.tree.map(lambda x: x * 1, weights)
            abort = progress.running[:1] if progress.chunks == 2 else ()
            return Orders(weights=others, version=3, refresh=progress.chunks == 3, abort=abort)

        generate(model, settings, weights, asked, KEY, between=between)
    assert engine.TRACES - before == {}


def test_another_generation_is_not_traced_again():
    es, state, model, settings = population("crossed", 1)
    draw, asked = (
        jax.jit(es.draw),
        dataclasses.replace(requests(), member=np.resize(np.arange(-1, 4, dtype=np.int32), 8)),
    )
    first = generate(model, settings, draw(state), asked, KEY)
    before = engine.TRACES.copy()
    state = dataclasses.replace(state, generation=state.generation + 1)
    second = generate(model, settings, draw(state), asked, KEY)
    assert engine.TRACES - before == {}
    mean = asked.member < 0
    same(second.take(mean), first, mean)
    assert (np.abs(second.logp - first.logp)[~mean, 0] > 1e-4).all()


# -- mistakes --------------------------------------------------------------------------------------------------------


def column(**values):
    return lambda asked: dataclasses.replace(
        asked, **{k: np.array(v, np.uint32 if k == "uid" else np.int32) for k, v in values.items()}
    )


def with_done(**values):
    return lambda asked: dataclasses.replace(asked, done=dataclasses.replace(_done(), **values))


def _done():
    done = whole().take([0, 5, 6])
    return dataclasses.replace(done, finish=np.zeros(3, np.int8), length=np.array([2, 0, 1], np.int32))


MISTAKES = {
    "empty prompt": (
        column(prompt_length=[9, 0, 8]),
        r"a prompt has at least one token; got \[0\] in rows \[1\] \(1 of 3\)",
    ),
    "negative length": (column(prompt_length=[9, 5, -4]), r"at least one token; got \[-4\] in rows \[2\]"),
    "no budget": (
        column(budget=[0, 4, -3]),
        r"a budget is at least one token; got \[0, -3\] in rows \[0, 2\] \(2 of 3\)",
    ),
    "too long": (
        column(budget=[24, 27, 24]),
        r"must fit `length`, 32 tokens: raise it or lower the budget; got \[33\] in rows \[0\] \(1 of 3\)",
    ),
    "huge budget": (column(budget=[2**31 - 1] * 3), r"got \[2147483656, 2147483652, 2147483655\] in rows \[0, 1, 2\]"),
    "id beyond": (
        column(prompt=[[1] * 9, [1, 2, VOCAB, 4, 99, 0, 0, 0, 0], [-7] * 9]),
        rf"ids must be 0 to {VOCAB - 1}, the model's vocabulary; got \[{VOCAB}, -7\] in rows \[1, 2\]",
    ),
    "member of plain weights": (
        column(member=[-1, 0, 5]),
        r"plain parameters have no members but -1; got \[0, 5\] in rows \[1, 2\]",
    ),
    "member below": (column(member=[-2, -1, -1]), r"no members but -1; got \[-2\] in rows \[0\]"),
    "done beyond the budget": (
        lambda asked: with_done()(column(budget=[1, 1, 1])(asked)),
        r"a budget counts the tokens in `done`: raise it; got \[2\] in rows \[0\]",
    ),
    "done with an id beyond": (
        with_done(tokens=np.full((3, 31), VOCAB, np.int32)),
        rf"ids must be 0 to {VOCAB - 1}, the model's vocabulary; got \[{VOCAB}, {VOCAB}\] in rows \[0, 2\]",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_requests_name_the_rows_and_both_values(name):
    model, params, settings = shallow()
    change, words = MISTAKES[name]
    asked = change(requests().take([0, 5, 6]))
    with pytest.raises(ValueError, match=words):
        generate(model, settings, params, asked, KEY)
    # the same for rows that are submitted later
    with pytest.raises(ValueError, match=words):
        generate(model, settings, params, requests(), KEY, between=lambda progress: Orders(submit=asked))


def test_ids_in_padding_are_no_mistake():
    model, params, settings = shallow()
    asked = requests()
    padding = np.arange(asked.prompt.shape[1]) >= asked.prompt_length[:, None]
    same(generate(model, settings, params, column(prompt=np.where(padding, -100, asked.prompt))(asked), KEY), whole())


@pytest.mark.slow
def test_members_that_the_weights_do_not_have():
    es, state, model, settings = population("crossed", 1)
    drawn = jax.jit(es.draw)(state)
    asked = requests().take([0, 5, 6])
    with pytest.raises(
        ValueError, match=r"members must be -1 to 3 of these weights; got \[4\] in rows \[1\] \(1 of 3\)"
    ):
        generate(model, settings, drawn, column(member=[3, 4, -1])(asked), KEY)
    # weights are swapped for ones that lack the members of rows in slots and waiting
    asked = column(member=[2, -1, 1])(asked)
    settings = dataclasses.replace(settings, slots=2)
    with pytest.raises(ValueError, match=r"plain parameters have no members but -1; got \[2, 1\] in rows \[0, 2\]"):
        generate(model, settings, drawn, asked, KEY, between=lambda progress: Orders(weights=state.params))
    with pytest.raises(ValueError, match=r"members must be -1 to 3 of these weights; got \[7\] in rows \[0\]"):
        submit = lambda progress: Orders(weights=drawn, submit=Requests.make([[1]], 2, member=7))
        generate(model, settings, state.params, Requests.make([[1]], 9), KEY, between=submit)


@pytest.mark.parametrize(
    ("abort", "got"),
    [([8], r"\[8\]"), ([-1, 2], r"\[-1, 2\]"), (np.ones(8, bool), "True"), ([1.5], r"\[1.5\]")],
    ids=["beyond", "negative", "mask", "fraction"],
)
def test_aborting_rows_that_do_not_exist(abort, got):
    model, params, settings = shallow()
    with pytest.raises(ValueError, match=f"rows to abort are whole numbers, 0 to 7; got .*{got}"):
        generate(model, settings, params, requests(), KEY, between=lambda progress: Orders(abort=abort))


@pytest.mark.parametrize("stop", [(VOCAB,), (3, -1)])
def test_stop_tokens_outside_the_vocabulary(stop):
    model, params, settings = shallow()
    with pytest.raises(ValueError, match=rf"stop tokens must be ids 0 to {VOCAB - 1} .*; got \[{stop[-1]}\]"):
        generate(model, dataclasses.replace(settings, stop=stop), params, requests(), KEY)
