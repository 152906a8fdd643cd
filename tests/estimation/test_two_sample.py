"""Two-sample tests: closed forms, p-values under equal laws, and power."""

import math

import pytest
import torch

from pyflowkern.estimation import classifier_test, energy_test, mmd_test, sliced_test

PERMUTED = (mmd_test, energy_test, sliced_test)
ALL = (*PERMUTED, classifier_test)
every = pytest.mark.parametrize("test", ALL, ids=lambda t: t.__name__)


def quick(test):
    """Options that make a test quick."""
    if test is classifier_test:
        return {"steps": 60, "hidden": 16}
    return {"permutations": 99} | ({"projections": 10} if test is sliced_test else {})


@pytest.mark.parametrize("test", PERMUTED, ids=lambda t: t.__name__)
def test_p_values_of_equal_laws_are_uniform(test):
    """Of 60 runs some p x 60 have a p-value of p at most: within 4 standard deviations, for three p."""
    g = torch.Generator().manual_seed(0)
    found = torch.tensor(
        [
            test(
                *torch.randn(44, 2, generator=g).split([24, 20]), generator=g, **quick(test)
            ).p_value
            for _ in range(60)
        ]
    )
    for p in (0.1, 0.5, 0.9):
        share = float((found <= p + 1e-9).double().mean())
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / 60), p
    assert found.min() >= 0.01 - 1e-6


def test_a_classifier_rarely_tells_equal_laws_apart():
    g = torch.Generator().manual_seed(0)
    found = [
        classifier_test(*torch.randn(2, 100, 2, generator=g), generator=g, steps=60, hidden=16)
        for _ in range(8)
    ]
    assert sum(f.p_value < 0.01 for f in found) <= 2
    assert sum(f.statistic for f in found) / 8 == pytest.approx(0.5, abs=0.06)


@every
@pytest.mark.parametrize("change", ["shift", "scale"])
def test_power(test, change):
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 250, 2, generator=g)
    y = y + 0.7 if change == "shift" else 2.5 * y
    assert test(x, y, generator=g, **quick(test)).p_value <= 0.01


@every
def test_the_generator_decides(test):
    x, y = torch.randn(2, 30, 2, generator=torch.Generator().manual_seed(2))
    before = torch.get_rng_state()
    one, two = (
        test(x, y, generator=torch.Generator().manual_seed(3), **quick(test)) for _ in range(2)
    )
    assert one == two
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("test", PERMUTED, ids=lambda t: t.__name__)
def test_chunks_change_nothing_but_rounding(test):
    x, y = torch.randn(2, 33, 2, generator=torch.Generator().manual_seed(2))
    one, parts = (
        test(x, y[:20], generator=torch.Generator().manual_seed(3), **quick(test), **given)
        for given in ({}, {"chunk": 5})
    )
    assert parts.statistic == pytest.approx(one.statistic, rel=1e-12)
    assert parts.p_value == one.p_value


def test_energy_and_kernel_by_their_definitions():
    x, y = torch.randn(2, 9, 3, dtype=torch.float64)
    y = y[:6]
    within = [torch.cdist(a, a).sum() / (len(a) * (len(a) - 1)) for a in (x, y)]
    wanted = 2 * torch.cdist(x, y).mean() - sum(within)
    found = energy_test(x, y, standardize=False, permutations=3)
    assert found.statistic == pytest.approx(float(wanted), rel=1e-10, abs=1e-12)

    def kernel(a, b):
        return torch.exp(-torch.cdist(a, b).square() / (2 * 0.8**2))

    within = [(kernel(a, a).sum() - len(a)) / (len(a) * (len(a) - 1)) for a in (x, y)]
    wanted = sum(within) - 2 * kernel(x, y).mean()
    found = mmd_test(x, y, bandwidth=0.8, standardize=False, permutations=3)
    assert found.statistic == pytest.approx(float(wanted), rel=1e-10, abs=1e-12)


def test_energy_distance_of_shifted_normals():
    """In one dimension: 2 E|Z sqrt 2 + d| - 2 E|Z sqrt 2|, with E|N(d, 2)| in closed form."""
    g = torch.Generator().manual_seed(4)
    x, y = torch.randn(2, 2000, 1, generator=g)

    def folded(d):
        return 2 / math.sqrt(math.pi) * math.exp(-d * d / 4) + d * math.erf(d / 2)

    found = energy_test(x, y + 1, standardize=False, permutations=1, generator=g)
    wanted = 2 * folded(1) - 2 * folded(0)
    assert found.statistic == pytest.approx(wanted, abs=0.1)  # its deviation is about 0.03


def test_sliced_distance_of_a_line_is_that_of_sorted_rows():
    x, y = torch.randn(2, 50, 1, dtype=torch.float64)
    wanted = (x.sort(0)[0] - y.sort(0)[0]).abs().mean()
    found = sliced_test(x, y, standardize=False, permutations=1)
    assert found.statistic == pytest.approx(float(wanted), rel=1e-10)


def test_sliced_distance_of_a_shift():
    """All directions see theta . d: on average |d| 2 / pi in two dimensions."""
    x = torch.randn(50, 2)
    shift = torch.tensor([3.0, 4.0])
    found = sliced_test(
        x,
        x + shift,
        standardize=False,
        projections=4000,
        permutations=1,
        generator=torch.Generator().manual_seed(0),
    )
    assert found.statistic == pytest.approx(5 * 2 / math.pi, rel=0.03)  # 4000 directions: 0.8 %


def test_columns_are_made_comparable():
    """A difference in a column of small numbers is seen beside one of large numbers."""
    g = torch.Generator().manual_seed(5)
    x, y = torch.randn(2, 150, 2, generator=g) * torch.tensor([1000.0, 0.01])
    y[:, 1] += 0.01
    assert energy_test(x, y, generator=g, permutations=99).p_value == 0.01
    constant = torch.ones(150, 1)
    energy_test(torch.cat([x, constant], 1), torch.cat([y, constant], 1), permutations=3)


@every
@pytest.mark.parametrize(
    ("x", "y", "kind", "words"),
    [
        ([[1.0]], torch.zeros(9, 2), TypeError, "x must be a floating tensor, got list"),
        (torch.zeros(9, 2), torch.zeros(9), ValueError, r"y must have shape \[N, D\]"),
        (torch.zeros(9, 2), torch.zeros(9, 3), ValueError, "same columns.* got 2 and 3"),
        (torch.zeros(1, 2), torch.zeros(9, 2), ValueError, "x must have at least 2 rows"),
        (torch.zeros(9, 2), torch.full((9, 2), math.nan), ValueError, "y must be finite"),
    ],
)
def test_errors(test, x, y, kind, words):
    with pytest.raises(kind, match=words):
        test(x, y)


def test_arguments():
    x = torch.zeros(9, 2)
    with pytest.raises(ValueError, match="bandwidth must be above 0"):
        mmd_test(x, x)
    with pytest.raises(ValueError, match="10 rows at least"):
        classifier_test(x, x, folds=10)
    with pytest.raises(TypeError, match="standardize"):
        sliced_test(x, x, standardize=1)
    for name in ("permutations", "chunk"):
        with pytest.raises(ValueError, match=name):
            energy_test(x, x, **{name: 0})
