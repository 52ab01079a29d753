"""Layouts of members: indices, shared factors, and refusals."""

import jax.numpy as jnp
import numpy as np
import pytest

import eggroll
from eggroll.population import Population


@pytest.mark.parametrize(
    ("population", "shape", "directions"),
    [
        (eggroll.independent(6), (6, 1, 1, 1), 6),
        (eggroll.antithetic(6), (3, 1, 1, 2), 3),
        (eggroll.crossed(12), (1, 3, 4, 1), 12),
        (eggroll.crossed(12, rows=2), (1, 2, 6, 1), 12),
        (eggroll.crossed(24, blocks=2), (2, 3, 4, 1), 24),
        (eggroll.crossed(4096), (1, 64, 64, 1), 4096),
    ],
)
def test_layout(population, shape, directions):
    assert population.shape == shape
    assert population.size == np.prod(shape)
    assert population.directions == directions
    grid = population.grid(jnp.arange(population.size))
    assert grid.shape == shape
    g, i, j, sign = np.indices(shape)
    expected = population.row_ids()[g, i], population.column_ids()[g, j], sign
    for got, want in zip(population.coordinates(grid), expected, strict=True):
        np.testing.assert_array_equal(got, want)


def test_members_of_a_row_share_its_factor_and_no_two_members_share_both():
    population = Population(blocks=2, rows=3, columns=4, signs=2)
    rows, columns, signs = (np.asarray(x) for x in population.coordinates(jnp.arange(population.size)))
    assert len({*zip(rows, columns, signs, strict=True)}) == population.size
    blocks = np.arange(population.size) // 24
    assert all(len({*blocks[rows == r]}) == 1 for r in rows) and all(len({*blocks[columns == c]}) == 1 for c in columns)
    assert [int((rows == r).sum()) for r in range(6)] == [8] * 6
    assert [int((columns == c).sum()) for c in range(8)] == [6] * 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: eggroll.antithetic(7), "must be even, got 7; use 8"),
        (lambda: eggroll.independent(0), "blocks >= 1; got 0"),
        (lambda: eggroll.crossed(7), "7 members per block"),
        (lambda: eggroll.crossed(12, rows=5), "5 rows"),
        (lambda: eggroll.crossed(12, blocks=5), "12 members in 5 blocks"),
        (lambda: eggroll.crossed(12, rows=12), "12 rows"),
        (lambda: eggroll.crossed(0), "0 members in 1 blocks"),
        (lambda: Population(1, 2, 2, 3), "signs is 1"),
        (lambda: eggroll.independent(6).grid(jnp.zeros(5)), r"expected 6, got shape \(5,\)"),
    ],
)
def test_a_population_that_does_not_divide_says_so(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_crossed_pairs_have_both_signs_of_every_direction():
    population = eggroll.crossed(24, rows=3, signs=2)
    assert population.shape == (1, 3, 4, 2) and population.size == 24 and population.directions == 12
    row, column, sign = population.coordinates(jnp.arange(24))
    assert sign.tolist() == [0, 1] * 12 and row.tolist() == [i // 8 for i in range(24)]
    assert column.tolist() == [i // 2 % 4 for i in range(24)]
    with pytest.raises(ValueError, match="24 members in 1 blocks, 3 signs"):
        eggroll.crossed(24, signs=3)
