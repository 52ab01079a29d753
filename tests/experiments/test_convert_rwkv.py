"""Conversion of released RWKV-7 files: the logits of the public package, and files that are refused."""

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import convert_rwkv
from rl.models.load import load
from tests.rl.models import checkpoints
from tests.rl.models.tiny import forward

ROOT = Path(__file__).parents[2]
torch_needed = "reading .pth files needs torch: pip install 'eggroll-jax[reference]'"


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason=torch_needed)


@pytest.fixture
def pth(torch, tmp_path):
    checkpoints.write_pth(tmp_path / "rwkv7.pth")
    return tmp_path / "rwkv7.pth"


@pytest.mark.slow
def test_the_command_converts_what_load_reads(pth, tmp_path):
    target = tmp_path / "converted"
    command = [sys.executable, "-m", "experiments.convert_rwkv", f"--source={pth}", f"--target={target}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    config = json.loads((target / "config.json").read_text())
    assert {key: config[key] for key in checkpoints.RWKV} == checkpoints.RWKV
    assert (config["dtype"], config["eos_token_id"]) == ("float32", 0)
    expected = load(checkpoints.write(tmp_path / "direct", "rwkv7"))
    model, params, _ = load(target)
    assert model is expected[0]
    jax.tree.map(np.testing.assert_array_equal, params, expected[1])
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert again.returncode != 0 and "must not hold a checkpoint already" in again.stderr


@pytest.mark.slow
def test_logits_of_the_public_package(pth, tmp_path):
    if importlib.util.find_spec("rwkv") is None:
        pytest.skip("needs the package rwkv: pip install 'eggroll-jax[reference]'")
    expected = checkpoints.rwkv_logits(pth)
    convert_rwkv.convert(pth, tmp_path / "converted")
    for scan_layers in (False, True):
        model, params, _ = load(tmp_path / "converted", scan_layers=scan_layers)
        answer = model.head(params, forward(model)(params, jnp.asarray(checkpoints.IDS))[0])
        assert np.abs(expected).max() > 1
        np.testing.assert_allclose(answer, expected, atol=1e-4, rtol=0)


def test_bf16_stays_bf16_and_layer_0s_unused_tensors_are_let_through(torch, tmp_path):
    tensors = {name: torch.from_numpy(x).bfloat16() for name, x in checkpoints.tensors("rwkv7").items()}
    tensors |= {f"blocks.0.att.v{i}": tensors[f"blocks.1.att.v{i}"] for i in range(3)}
    torch.save(tensors, tmp_path / "a.pth")
    assert convert_rwkv.convert(tmp_path / "a.pth", tmp_path / "a")["dtype"] == "bfloat16"
    _, params, _ = load(tmp_path / "a", dtype="bfloat16")
    expected = tensors["blocks.2.att.key.weight"].T.float().numpy()
    np.testing.assert_array_equal(params["layer_2"]["time"]["key"]["kernel"].astype(jnp.float32), expected)


class Malicious:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


def test_a_file_with_code_is_refused_and_its_code_not_run(torch, tmp_path):
    victim = tmp_path / "made-by-the-file"
    torch.save({"emb.weight": Malicious(victim)}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="must hold a dictionary of tensors and nothing else") as error:
        convert_rwkv.convert(tmp_path / "bad.pth", tmp_path / "out")
    assert not victim.exists() and not (tmp_path / "out").exists()
    assert "weights_only=False" not in str(error.value)  # no advice to run the code
    # the file is dangerous: the unsafe reader runs it
    torch.load(tmp_path / "bad.pth", weights_only=False)
    assert victim.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "must hold a dictionary of tensors; it holds a list"),
        ({"emb.weight": 3}, "must hold a dictionary of tensors"),
        ({}, "it is no RWKV checkpoint"),
        ({"blocks.0.att.time_maa_x": 1.0}, "must be an RWKV-7 checkpoint .* it is version 6"),
        ({"blocks.0.att.time_faaaa": 1.0}, "it is version 5"),
        ({"blocks.0.att.time_first": 1.0}, "it is version 4"),
        ({"blocks.0.att.r_k": 1.0}, "must hold the matrix 'emb.weight'"),
    ],
)
def test_what_is_no_rwkv7_file(torch, tmp_path, content, message):
    if isinstance(content, dict):
        content = {k: torch.tensor([v]) if isinstance(v, float) else v for k, v in content.items()}
    torch.save(content, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=message):
        convert_rwkv.convert(tmp_path / "bad.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_files_are_refused(torch, tmp_path):
    for content in (b"", b"hello", b"\x80\x02]."):
        (tmp_path / "bad.pth").write_bytes(content)
        with pytest.raises(ValueError, match="is not a file that torch.load|must hold a dictionary of tensors"):
            convert_rwkv.convert(tmp_path / "bad.pth", tmp_path / "out")
    with pytest.raises(ValueError, match="no file"):
        convert_rwkv.convert(tmp_path / "absent.pth", tmp_path / "out")


@pytest.mark.parametrize("version", ["2.5.1", "1.13.0+cu117"])
def test_a_torch_whose_safe_reader_was_not_is_refused(monkeypatch, tmp_path, version):
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(__version__=version))
    (tmp_path / "a.pth").write_bytes(b"")
    with pytest.raises(ImportError, match=f"needs torch >= 2.6; got .*{version[:3]}"):
        convert_rwkv.read(tmp_path / "a.pth")


def test_without_torch_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "a.pth").write_bytes(b"")
    with pytest.raises(ImportError, match="pip install torch"):
        convert_rwkv.read(tmp_path / "a.pth")
