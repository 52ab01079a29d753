"""Training language models on eight devices, through `config.mesh`, against the same run on one."""

import pytest
from safetensors.numpy import load_file

from experiments import train
from rl import config as config_lib
from rl.models import presets
from tests.experiments.tiny_train import ROOT, SHAPE, config_of, leaves, rows
from tests.rl.models.tiny import close, trees_close

pytestmark = pytest.mark.slow
GRPO = [
    "warm_start.steps=0",
    "steps=2",
    "prompts=4",
    "samples=4",
    "log_samples=1000",
    "eval_every=2",
    "eval_problems=16",
]
SMALL = ["task.problems=64", "gradient.tokens=64", "engine.slots=16", "engine.bucket=16", "engine.view=0"]


@pytest.fixture(scope="module", autouse=True)
def tiny():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "tiny-transformer", SHAPE)
        yield


def meshed(**sizes):
    return [f"mesh.{name}={size}" for name, size in sizes.items()]


def policy_gradient(workdir, **sizes):
    train.train(config_lib.load(f"{ROOT}/configs/countdown_grpo.py", [*GRPO, *SMALL, *meshed(**sizes)]), workdir)
    return workdir


def test_policy_gradients_on_a_mesh_give_the_same_answers_and_numbers(tmp_path, monkeypatch):
    alone = policy_gradient(tmp_path / "alone")
    learn, held = train.learn, []

    def watched(*args):
        state, metrics = learn(*args)
        adam = state.opt_state[1][0]
        kernels = [tree["layer_0"]["mlp"]["up"]["kernel"] for tree in (state.params, adam.mu, adam.nu)]
        held.extend(x.addressable_shards[0].data.shape for x in kernels)
        return state, metrics

    monkeypatch.setattr(train, "learn", watched)
    workdir = policy_gradient(tmp_path / "eight", data=2, fsdp=2, tensor=2)
    assert (workdir / "samples.jsonl").read_bytes() == (alone / "samples.jsonl").read_bytes()
    for got, want in zip(rows(workdir / "metrics.jsonl"), rows(alone / "metrics.jsonl"), strict=True):
        assert got.keys() == want.keys()
        for name, value in want.items():
            close(got[name], value, 1e-5)
    params = [load_file(folder / "model" / "model.safetensors") for folder in (workdir, alone)]
    trees_close(*params, 1e-5)
    assert held == [(16 // 2, 32 // 2)] * 6  # the up projection and its moments, after both steps


def test_evolution_on_a_mesh_gives_the_same_bits(tmp_path):
    for workdir, sizes in ((tmp_path / "alone", {}), (tmp_path / "eight", {"population": 8})):
        overrides = ["warm_start.steps=0", "steps=2", "es.chunk=1", "log_samples=1000"]
        train.train(config_of("", *overrides, *meshed(**sizes)), workdir)
    alone, eight = tmp_path / "alone", tmp_path / "eight"
    for name in ("samples.jsonl", "metrics.jsonl", "generations.bin", "model/model.safetensors"):
        assert (eight / name).read_bytes() == (alone / name).read_bytes(), name
    assert leaves(eight) == leaves(alone) and len(leaves(alone)) > 30  # checksums of parameters and moments
