"""The log of generations: what goes in comes out, and nothing damaged does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from rl import generations
from rl.generations import LogError


def logged(path, count, members=3):
    rng = np.random.default_rng(0)
    made = [{"a": rng.normal(size=members).astype(np.float32), "b": np.arange(2, dtype=np.int16)} for _ in range(count)]
    path.write_bytes(b"".join(generations.pack(k + 1, arrays) for k, arrays in enumerate(made)))
    return made


def test_round_trip_and_size(tmp_path):
    path = tmp_path / "log"
    made = logged(path, 4)
    size = generations.record_bytes(made[0])
    assert size == 16 + 3 * 4 + 2 * 2 and path.stat().st_size == 4 * size
    for ours, theirs in zip(generations.read(path, made[0]), made, strict=True):
        assert ours["a"].dtype == np.float32 and ours["b"].dtype == np.int16
        assert np.array_equal(ours["a"], theirs["a"]) and np.array_equal(ours["b"], theirs["b"])
    with open(path, "ab") as file:
        file.write(path.read_bytes()[: size - 1])  # what a kill leaves
    assert generations.count(path, made[0]) == len(list(generations.read(path, made[0]))) == 4


def test_every_flipped_bit_is_noticed_where_it_is(tmp_path):
    path = tmp_path / "log"
    made = logged(path, 3)
    whole, size = path.read_bytes(), generations.record_bytes(made[0])
    for bit in range(size * 8):
        damaged = bytearray(whole)
        damaged[size + bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        records = generations.read(path, made[0])
        assert np.array_equal(next(records)["a"], made[0]["a"])
        with pytest.raises(LogError, match=f"record 2, byte {size}"):
            next(records)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda records: [records[0], records[2]], "generation 3 stands where 2 should: the log has a gap"),
        (lambda records: records[1:], "generation 2 stands where 1 should"),
        (lambda records: [records[0], records[1][:-1], records[2]], "record 2, byte 32: its CRC-32 differs"),
        (lambda records: [generations.pack(1, np.zeros(7, np.float32))], "it holds 28 bytes of arrays and .* has 16"),
    ],
)
def test_what_is_missing_or_foreign_is_named(tmp_path, edit, message):
    path = tmp_path / "log"
    made = logged(path, 3)
    whole, size = path.read_bytes(), generations.record_bytes(made[0])
    path.write_bytes(b"".join(edit([whole[i * size : (i + 1) * size] for i in range(3)])))
    with pytest.raises(LogError, match=message):
        list(generations.read(path, made[0]))
    with pytest.raises(LogError, match="cannot be read .No such file"):
        list(generations.read(tmp_path / "absent", made[0]))


def test_both_halves_are_the_update():
    es = eggroll.strategy(optax.sgd(0.1), population=eggroll.antithetic(4), sigma=0.1)
    state = es.init({"w": jnp.ones((2, 3))}, jax.random.key(0))
    scores = jnp.arange(4.0)
    shape, update = map(jax.jit, generations.cut(es))
    shaped, metrics = shape(scores)
    new, more = update(state, shaped)
    whole, expected = jax.jit(es.update)(state, scores)
    assert np.array_equal(new.params["w"], whole.params["w"])
    assert {k: float(v) for k, v in (metrics | more).items()} == {k: float(v) for k, v in expected.items()}
