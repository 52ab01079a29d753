"""DOTS's predictor, trained on what a run has measured and used by the next."""

import json

import numpy as np
import pytest

from experiments import predictor, train
from rl import config as config_lib
from rl.data.selection import _predictor
from tests.experiments.tiny_train import ROOT, rows, save_start


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return save_start(tmp_path_factory.mktemp("start") / "model")


@pytest.mark.slow
def test_a_run_teaches_a_predictor_that_the_next_one_selects_by(start, tmp_path, capsys):
    def config_of(*overrides, variant):
        path = f"{ROOT / 'tests/rl/learners/tiny_grpo.py'}:{variant}"
        return config_lib.load(path, [f"model.path={start}", "warm_start.steps=0", "steps=2", *overrides])

    run, out = tmp_path / "run", tmp_path / "made" / "predictor.safetensors"
    train.train(config_of(variant="mixed"), run)
    logged = rows(run / "judged.jsonl")
    for line, metrics in zip(logged, rows(run / "metrics.jsonl"), strict=True):
        assert line["step"] == metrics["step"] and all(0 <= reward <= 1 for reward in line["reward"])
        # two prompts measured first, with 2 answers each; the others have 4
        assert 4 * len(line["problem"]) - 2 * 2 * (metrics["step"] == 1) == metrics["completions"]
    assert predictor.main([str(run), str(run), f"--out={out}", "--width=8", "--epochs=3"]) == 0
    printed = capsys.readouterr()
    count = 2 * sum(len(line["problem"]) for line in logged)
    assert f"{count} measurements of" in printed.out and "epoch 3/3" in printed.err
    width = _predictor.load(out)["query"]["Dense_0"]["kernel"].shape
    assert width[1] == 8
    train.train(config_of(f"selection.predictor={out}", variant="mixed"), tmp_path / "next")
    narrow = _predictor.fit(
        np.eye(3, 5), _predictor.Logged(np.zeros(3), np.arange(3), np.array([0.0, 1, 0.5])), width=4
    )
    _predictor.save(tmp_path / "narrow", narrow)
    with pytest.raises(config_lib.ConfigError, match=f"expects a width of 5, this model's is {width[0]}"):
        train.train(config_of(f"selection.predictor={tmp_path / 'narrow'}", variant="mixed"), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_what_teaches_nothing_is_refused(tmp_path, capsys):
    out = [f"--out={tmp_path / 'out'}"]
    assert predictor.main([str(tmp_path), *out]) == 2
    assert "a run is a folder with config.json" in capsys.readouterr().err
    config = config_lib.load(f"{ROOT / 'configs' / 'bandit.py'}")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert predictor.main([str(tmp_path), *out]) == 2
    assert "judged.jsonl holds the rewards that a predictor learns from, but has none" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        predictor.main([str(tmp_path), *out, "--width=0"])
    assert not (tmp_path / "out").exists()
