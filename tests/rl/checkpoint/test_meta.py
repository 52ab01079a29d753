"""No flipped bit of `meta.json` changes what a checkpoint says without a word."""

import json
import random

import jax.numpy as jnp
import pytest

from rl import checkpoint


def test_a_flipped_bit_of_the_meta_data_is_damage(tmp_path):
    checkpoint.save(tmp_path, 7, {"w": jnp.arange(3.0)}, {"work": 64, "seconds": 10.125139364998176, "name": "\u00e9"})
    path = tmp_path / "0000000007" / "meta.json"
    whole, rng = path.read_bytes(), random.Random(0)
    for byte in range(len(whole)):
        damaged = bytearray(whole)
        damaged[byte] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            same = json.loads(damaged) == json.loads(whole)  # a space that became another kind of space
        except ValueError:
            same = False
        if same:
            continue
        with pytest.raises(
            checkpoint.CheckpointError, match=r"is unusable .(OSError: checksum of meta.json|\w+Error: )"
        ):
            checkpoint.verify(tmp_path, 7)
    path.write_bytes(whole)
    assert list(checkpoint.verify(tmp_path, 7)) == ["['w']"]
    assert checkpoint.restore(tmp_path, {"w": jnp.zeros(3)}).extra["seconds"] == 10.125139364998176
