"""Policy gradients in the loop: rounds of sampling, exact resume, a batch that cannot be learnt from."""

import ml_collections
import numpy as np
import pytest

from experiments import language, train
from rl import config as config_lib
from rl import slots
from rl.data import replay, selection
from rl.data.replay import Groups
from rl.learners.types import Learner
from rl.run import Run, RunError
from tests.experiments.tiny_train import ROOT, final, rows, save_start
from tests.rl.learners import toy
from tests.rl.learners.toy import G, P


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return save_start(tmp_path_factory.mktemp("start") / "model")


def config_of(start, *overrides, variant):
    path = f"{ROOT / 'tests/rl/learners/tiny_grpo.py'}:{variant}"
    return config_lib.load(path, [f"model.path={start}", "warm_start.steps=0", *overrides])


# -- rounds ----------------------------------------------------------------------------------------------------------


class Scripted:
    """`train.complete` from a list: whether the answers to each prompt asked for differ."""

    def __init__(self, *spreads):
        self.spreads, self.asked = list(spreads), []

    def __call__(self, setup, state, rows, samples):
        spread = [self.spreads.pop(0) for _ in rows]
        self.asked.append((list(map(int, rows)), int(state.asked)))
        value = np.array([[1, 0, 0.5] if s else [0.5] * G for s in spread]).reshape(-1)
        known = tuple(int(row) % len(toy.PROMPTS) for row in rows)
        made = toy.answers(len(self.asked), known, value=value)
        return made._replace(problem=np.asarray(rows, np.int32))


def collected(monkeypatch, script, refills, replayed=None, change=lambda slot: slot):
    """(state, step) of `train.collect` for P prompts of a pool of 20, half of them replayed where there are any."""
    config = ml_collections.ConfigDict({"prompts": P, "samples": G, "refills": refills})
    bound = lambda name, *args, **keys: slots.bind(f"rl.data.{name}", slots.block(f"rl.data.{name}", *args, **keys))
    chooser, buffer = change(bound("selection", "uniform")), bound("replay", "fifo", fresh=0.5, capacity=4)
    empty = dict.fromkeys(language.Setup._fields)
    learner = Learner(**dict.fromkeys(Learner._fields) | {"members": 0})
    setup = language.Setup(**empty | {"config": config, "learner": learner, "selection": chooser, "replay": buffer})
    memory = buffer.init(replay.Shape(P, G, toy.L, 0))
    if replayed is not None:
        memory, _ = buffer.update(memory, 0, replayed)
    state = train.State(None, chooser.init(selection.Pool(20, 0, lambda: None)), memory, np.int64(0))
    monkeypatch.setattr(train, "complete", script)
    return train.collect(setup, state, 1)


def test_groups_without_spread_are_asked_for_again_whole_until_there_are_enough(monkeypatch):
    script = Scripted(True, False, True, False, False, True, True)  # 4 prompts: 2 of use; 2 more: 1; 1 more: 1
    state, made = collected(monkeypatch, script, refills=5)
    order = [row for asked, _ in script.asked for row in asked]
    assert [len(asked) for asked, _ in script.asked] == [4, 2, 1] and len(set(order)) == 7
    assert [before for _, before in script.asked] == [0, 12, 18]  # nobody's randomness is drawn twice
    assert made.answers.problem.tolist() == [order[i] for i in (0, 2, 5, 6)]
    groups = Groups.make(made.answers.problem, made.answers.rollouts, made.answers.scored)
    assert groups.informative.all() and (groups.value == [1, 0, 0.5]).all()
    assert made.metrics["rounds"] == 3 and made.metrics["completions"] == 21 == state.asked
    discarded = made.tokens - made.answers.rollouts.length.sum()
    assert discarded > 0 and made.replayed is None
    assert sorted(state.replay["groups"].problem) == sorted(made.answers.problem)  # the buffer gets what was kept
    assert state.selection["place"] == 7


def test_the_rounds_are_capped_and_the_batch_filled_with_what_there_is(monkeypatch):
    script = Scripted(False, True, False, False, *[False] * 6)
    state, made = collected(monkeypatch, script, refills=2)
    order = [row for asked, _ in script.asked for row in asked]
    assert [len(asked) for asked, _ in script.asked] == [4, 3, 3] and made.metrics["rounds"] == 3
    assert made.answers.problem.tolist() == [order[i] for i in (1, 0, 2, 3)]
    assert state.replay["groups"].problem.tolist().count(-1) == 3


def test_without_refills_there_is_one_round(monkeypatch):
    _, made = collected(monkeypatch, Scripted(*[False] * 4), refills=0)
    assert made.metrics["rounds"] == 1 and made.answers.problem.size == P


def test_replayed_groups_leave_less_to_sample(monkeypatch):
    old = toy.answers(seed=9, problem=(0, 1, 2, 3))
    script = Scripted(True, True)
    _, made = collected(monkeypatch, script, 3, Groups.make(old.problem, old.rollouts, old.scored))
    assert [len(asked) for asked, _ in script.asked] == [2] and made.answers.problem.size == 2 == made.replayed.size


def test_a_selection_that_returns_nothing_is_an_error(monkeypatch):
    nothing = selection.Choice(selection.EMPTY, selection.EMPTY, 0)
    silent = lambda slot: slot._replace(apply=lambda state, step, count: (state, nothing))
    with pytest.raises(ValueError, match="returns as many problems as asked for, 4; uniform returned 0 in step 1"):
        collected(monkeypatch, Scripted(), 0, change=silent)


# -- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["mixed", "anchored"])
def test_an_interrupted_run_with_everything_ends_bit_equal(start, tmp_path, monkeypatch, variant):
    """All of it is in the checkpoint: refills, replay, a measured selection, a policy of two steps ago, minibatches; and
    adapters of a bf16 model, both anchors, recent groups, epochs, over the step that renews the reference.
    """
    config = config_of(start, variant=variant)
    train.train(config, tmp_path / "whole")
    record = Run.record

    def failing(run, *args, **kwargs):
        if run.step == 3:  # a checkpoint is at 2; the samples of step 4 are written
            raise KeyboardInterrupt
        record(run, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "record", failing)
        with pytest.raises(KeyboardInterrupt):
            train.train(config, tmp_path / "part")
    assert rows(tmp_path / "part" / "samples.jsonl")[-1]["step"] == 4
    train.train(config, tmp_path / "part")
    finals = []
    for name in ("whole", "part"):
        (tmp_path / name / "warm_start").mkdir()
        (tmp_path / name / "warm_start" / "model.safetensors").touch()
        finals.append(final(tmp_path / name))
    assert finals[0] == finals[1]
    metrics = rows(tmp_path / "whole" / "metrics.jsonl")
    if variant == "anchored":
        assert [row["replayed_groups"] for row in metrics] == [0, 2, 2, 0, 0]
        assert [row["kl_reference"] == 0 for row in metrics] == [False, False, False, True, False]
        return
    assert max(row["rounds"] for row in metrics) == 2 and max(row["replayed_groups"] for row in metrics) > 0
    assert [row["age"] > 0 for row in metrics] == [False] + [True] * 4
    assert any(row["skipped"] < 1 and row["gradient_norm"] > 0 for row in metrics)


def test_a_batch_that_cannot_be_learnt_from_ends_the_run_and_is_kept(start, tmp_path):
    """Groups of equal rewards over a std without delta: 0 / 0."""
    with pytest.raises(RunError, match="2 updates in a row had no finite gradient.*nonfinite_batch.npz"):
        train.train(config_of(start, variant="divided"), tmp_path)
    with np.load(tmp_path / "nonfinite_batch.npz") as kept:
        groups = Groups(**kept)
    groups.check()
    assert groups.tokens.shape == (4, 4, 4) and not groups.informative.all()
    assert not (tmp_path / "result.json").exists()


@pytest.mark.slow
def test_adapters_and_recorded_experts_through_the_whole_loop(tmp_path):
    """A mixture of experts: what the engine recorded is forced; the mean that is evaluated has the adapters merged."""
    config = config_of(
        "", "steps=1", "model.preset=tiny-moe", "gradient.routing=r3", "gradient.lora.rank=2", variant=""
    )
    train.train(config, tmp_path)
    (row,) = rows(tmp_path / "metrics.jsonl")
    assert row["skipped"] == 0 and row["ratio"] == 1 and row["sampler_gap_max"] < 1e-4


def test_a_slot_out_of_range_is_refused_before_the_run(start, tmp_path):
    config = config_of(start, "replay.fresh=0.0", variant="mixed")
    with pytest.raises(config_lib.ConfigError, match="fresh must be above 0"):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
