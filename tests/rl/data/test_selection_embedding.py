"""One vector per prompt: the mean of the model's hidden states, whatever the padding and the blocks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.data.embedding import embed
from rl.models.presets import make, preset

IDS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 1, 2], [3, 3], [4, 1, 2, 5, 6]]


def model_of(name, dtype="float32"):
    config = preset(name, vocab=11, layers=2, width=16, head_dim=8)
    return make(dataclasses.replace(config, dtype=dtype))


@pytest.fixture(scope="module", params=["tiny-transformer", "tiny-rwkv7"])
def prepared(request):
    model = model_of(request.param)
    return model, model.init(jax.random.key(3))


@pytest.mark.slow
def test_every_prompt_alone_gives_the_same_mean(prepared):
    model, params = prepared
    found = embed(model, params, IDS)
    assert found.shape == (5, 16) and found.dtype == np.float32
    forward = jax.jit(model.forward)
    for row, ids in zip(found, IDS, strict=True):
        hidden = np.asarray(forward(params, jnp.array(ids))[0], np.float64)
        np.testing.assert_allclose(row, hidden.sum(axis=0) / len(ids), atol=2e-6)
    assert np.abs(found[0] - found[3]).max() > 1e-2


@pytest.mark.parametrize("block", [1, 2, 3, 100])
def test_blocks_and_order_do_not_matter(prepared, block):
    model, params = prepared
    whole = embed(model, params, IDS)
    np.testing.assert_allclose(embed(model, params, IDS, block=block), whole, atol=2e-6)
    np.testing.assert_allclose(embed(model, params, IDS[::-1], block=block), whole[::-1], atol=2e-6)


@pytest.mark.slow
def test_half_precision_models_give_f32_means():
    model = model_of("tiny-transformer", "bfloat16")
    params = model.init(jax.random.key(3))
    found = embed(model, params, IDS)
    wide = embed(model_of("tiny-transformer"), jax.tree.map(lambda x: x.astype(jnp.float32), params), IDS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wide, atol=0.1)


@pytest.mark.parametrize(
    ("ids", "block", "message"),
    [
        ([], 4, "got 0 prompts"),
        ([[1], []], 4, "got 2 prompts, 1 without tokens"),
        ([[1]], 0, "block 0"),
        ([[1, 11]], 4, "between 0 and 10, the model's vocabulary; got 1 to 11"),
        ([[-1]], 4, "got -1 to -1"),
    ],
)
def test_bad_prompts_are_refused(prepared, ids, block, message):
    with pytest.raises(ValueError, match=message):
        embed(*prepared, ids, block=block)
