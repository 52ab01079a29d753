"""How far a rank-r factor product is from Gaussian noise: exact expectations by numerical integration.

For a scalar weight and sigma = 1 the estimator's mean is E[x f(x)], x = (1/sqrt r) sum of r products a b. Everything
here follows from the characteristic function of a product, phi(t) = E cos(t a b), which is known for Gaussian factors,
for the generator's popcount-plus-uniform factors and for signs; x has phi(t / sqrt r)^r. NumPy and SciPy only.
"""

import math

import numpy as np
import pytest
from scipy import special

RANKS = (1, 2, 4, 8, 16, 32, 64)
GAUSSIAN_LIMIT = {"tanh": 0.605706, "sin": 0.606531, "sign": 0.797885}
# r * (E[x f(x)] at rank r - its Gaussian value), exact Gaussian factors
TABLE = {
    "tanh": (-0.1278, -0.1540, -0.1717, -0.1818, -0.1871, -0.1897, -0.1910),
    "sin": (-0.2530, -0.3242, -0.3781, -0.4128, -0.4328, -0.4436, -0.4492),
    "sign": (-0.1613, -0.1816, -0.1915, -0.1959, -0.1978, -0.1987, -0.1991),
}
FUNCTIONS = {"tanh": np.tanh, "sin": np.sin, "sign": np.sign}

HALF_PERIOD = 45.0  # |x| beyond it has probability below e^-45 for Gaussian factors, 0 for the generator's at rank 1
TERMS = 6000
WIDTH = 1 / math.sqrt(4 + 1 / 12)  # the generator: (popcount of 16 bits - 8 + uniform on (-1/2, 1/2)) * WIDTH


def panels(edges, points):
    """Gauss-Legendre nodes and weights on every interval between consecutive edges."""
    node, weight = np.polynomial.legendre.leggauss(points)
    middle, half = (edges[1:] + edges[:-1]) / 2, (edges[1:] - edges[:-1]) / 2
    return (middle[:, None] + half[:, None] * node).ravel(), (half[:, None] * weight).ravel()


def generator_density(points=24):
    """Nodes and probability weights of one factor entry: constant density on the 17 unit cells around -8 .. 8."""
    edges = np.sort(np.append(np.arange(-8.5, 9), 0.0))  # split at 0, where |a| has its kink
    node, weight = panels(edges, points)
    probability = special.comb(16, np.round(node + 8)) / 2**16
    return node * WIDTH, weight * probability


def product_characteristic(factors):
    """phi(t) = E cos(t a b) for the named factor distribution."""
    if factors == "gaussian":
        return lambda t: 1 / np.sqrt(1 + t**2)
    node, probability = generator_density()

    def phi(t):  # E over b of the characteristic function of a at t b: 16 half-unit signs and a uniform unit cell
        half = np.multiply.outer(t, node) * (WIDTH / 2)
        return (np.cos(half) ** 16 * np.sinc(half / np.pi)) @ probability

    return phi


def cosine_coefficients(functions):
    """x f(x) = sum_k c_k cos(pi k x / HALF_PERIOD) on [-HALF_PERIOD, HALF_PERIOD] for each odd f. [functions, TERMS]"""
    node, weight = panels(np.linspace(0, HALF_PERIOD, 1501), 12)
    values = np.stack([weight * node * function(node) for function in functions], axis=1)
    k = np.arange(TERMS)
    coefficients = np.concatenate(
        [np.cos(np.multiply.outer(chunk, node) * (np.pi / HALF_PERIOD)) @ values for chunk in np.array_split(k, 24)]
    )
    return coefficients.T * np.where(k == 0, 1, 2) / HALF_PERIOD


@pytest.fixture(scope="module")
def coefficients():
    return dict(zip(FUNCTIONS, cosine_coefficients(FUNCTIONS.values()), strict=True))


def mean_product(coefficients, factors, rank):
    t = np.arange(TERMS) * (np.pi / HALF_PERIOD)
    return coefficients @ product_characteristic(factors)(t / math.sqrt(rank)) ** rank


def sign_factor_mean_product(function, rank):
    """Exact: for +-1 factors sqrt(r) x is a sum of r signs."""
    ups = np.arange(rank + 1)
    x = (2 * ups - rank) / math.sqrt(rank)
    return float(special.comb(rank, ups) / 2.0**rank @ (x * function(x)))


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
def test_table_of_first_order_constants(coefficients, name):
    node, weight = np.polynomial.hermite_e.hermegauss(201)
    gaussian = weight @ (node * FUNCTIONS[name](node)) / math.sqrt(2 * math.pi)
    if name == "sign":  # quadrature cannot see the kink; E|x| is known
        gaussian = math.sqrt(2 / math.pi)
    assert gaussian == pytest.approx(GAUSSIAN_LIMIT[name], abs=6e-7)
    measured = [rank * (mean_product(coefficients[name], "gaussian", rank) - gaussian) for rank in RANKS]
    np.testing.assert_allclose(measured, TABLE[name], atol=6e-5)
    # first order in 1/r: the increments shrink by about two when r doubles
    steps = np.diff(measured)
    assert np.all(steps[2:] / steps[1:-1] < 0.7)


def test_closed_forms_agree_with_the_integration(coefficients):
    for rank in RANKS:
        # given b, x is Gaussian with variance chi2_r / r
        sine = (1 + 1 / rank) ** -(rank / 2 + 1)
        absolute = math.sqrt(4 / (math.pi * rank)) * math.exp(
            special.gammaln((rank + 1) / 2) - special.gammaln(rank / 2)
        )
        assert mean_product(coefficients["sin"], "gaussian", rank) == pytest.approx(sine, abs=2e-7)
        assert mean_product(coefficients["sign"], "gaussian", rank) == pytest.approx(absolute, abs=3e-6)
    assert mean_product(coefficients["sign"], "gaussian", 1) == pytest.approx(2 / math.pi, abs=3e-6)


def test_generator_density_has_its_stated_moments():
    node, probability = generator_density()
    moments = [probability @ node**power for power in range(5)]
    np.testing.assert_allclose(moments[:4], [1, 0, 1, 0], atol=1e-12)
    # excess of a sum: 16 signs of 1/2 give -2 * 16 / 2^4, the uniform -1/120, over the squared variance
    assert moments[4] - 3 == pytest.approx((-2 - 1 / 120) / (4 + 1 / 12) ** 2, abs=1e-12)
    assert moments[4] - 3 == pytest.approx(-0.12045, abs=5e-6)


LIMITS = {"tanh": 0.6057055, "sin": math.exp(-0.5), "sign": math.sqrt(2 / math.pi)}


def first_order(function, kurtosis):
    """Edgeworth: r * bias -> (kurtosis^2 - 3) / 24 * E[He4(z) z f(z)], kurtosis of a factor entry."""
    node, weight = panels(np.linspace(0, 12, 200), 12)
    hermite = node**4 - 6 * node**2 + 3
    density = np.exp(-(node**2) / 2) * math.sqrt(2 / math.pi)
    return (kurtosis**2 - 3) / 24 * (weight @ (density * hermite * node * function(node)))


@pytest.mark.parametrize(
    ("name", "factors"),
    [(name, factors) for name in FUNCTIONS for factors in ("gaussian", "generator", "signs")][:-1],
)
def test_constants_converge_to_the_first_order_of_edgeworth(coefficients, name, factors):
    """The bias is proportional to the fourth cumulant of a product: 6 if Gaussian, 5.29 generator, -2 signs.

    Left out: the discontinuous function with sign factors, whose lattice distribution has no such expansion.
    """
    kurtosis = {"gaussian": 3, "generator": 3 - (2 + 1 / 120) / (4 + 1 / 12) ** 2, "signs": 1}[factors]

    def constant(rank):
        if factors == "signs":
            return rank * (sign_factor_mean_product(FUNCTIONS[name], rank) - LIMITS[name])
        return rank * (mean_product(coefficients[name], factors, rank) - LIMITS[name])

    extrapolated = 2 * constant(64) - constant(32)  # cancels the second order
    assert extrapolated == pytest.approx(first_order(FUNCTIONS[name], kurtosis), abs=1e-3)
    assert abs(constant(32) - extrapolated) < 3e-2
