"""Continuous flows: closed-form densities, both directions, regularizers, standard errors."""

import math
import runpy
from pathlib import Path

import pytest
import torch
from laws import check_gradients, jacobian_log_det, normal
from torch.distributions import MultivariateNormal

from pyflowkern import flows, nn, ode

TIGHT = {"rtol": 1e-10, "atol": 1e-10}


class Linear(torch.nn.Module):
    """f(t, x) = A x + b."""

    def __init__(self, matrix, offset):
        super().__init__()
        self.matrix, self.offset = torch.nn.Parameter(matrix), torch.nn.Parameter(offset)

    def forward(self, t, x):
        return x @ self.matrix.t() + self.offset


def affine_flow(**options):
    matrix, offset = normal(3, 3) / 2, normal(3, seed=1)
    field = nn.VectorField(Linear(matrix, offset))
    options = {"divergence": "exact", "duration": 0.8, **TIGHT, **options}
    return flows.CNF(3, field=lambda _: field, **options).double(), matrix, offset


def small(**options):
    torch.manual_seed(0)
    options = {"divergence": "exact", **TIGHT, **options}
    return flows.CNF(2, hidden=(8, 8), **options).double()


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_affine_dynamics_have_a_gaussian_density(divergence):
    """The log-determinant is T tr A, and the density that of a Gaussian."""
    flow, matrix, offset = affine_flow(divergence=divergence)
    x, duration = normal(50, 3, seed=2), 0.8
    z, log_det = flow(x)
    augmented = torch.zeros(4, 4).double()
    augmented[:3, :3], augmented[:3, 3] = matrix, offset
    power = torch.matrix_exp(duration * augmented)
    torch.testing.assert_close(z, x @ power[:3, :3].t() + power[:3, 3], rtol=1e-8, atol=1e-8)
    if divergence == "exact":
        exact = (duration * matrix.trace()).expand(50)
        torch.testing.assert_close(log_det, exact, rtol=1e-9, atol=1e-9)
        inverse = torch.linalg.inv(power[:3, :3])
        density = MultivariateNormal(-inverse @ power[:3, 3], inverse @ inverse.t())
        torch.testing.assert_close(flow.log_prob(x), density.log_prob(x), rtol=1e-8, atol=1e-8)


def test_inverse_and_log_det():
    flow, x = small(), normal(7, 2)
    z, log_det = flow(x)
    back, minus = flow.inverse(z)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-7)
    torch.testing.assert_close(minus, -log_det, rtol=0, atol=1e-7)
    expected = jacobian_log_det(lambda v: flow(v)[0], x)
    torch.testing.assert_close(log_det, expected, rtol=0, atol=1e-7)


def test_density_integrates_to_one():
    flow = small(rtol=1e-6, atol=1e-6)
    line = torch.linspace(-9, 9, 121).double()
    grid = torch.cartesian_prod(line, line)
    with torch.no_grad():
        mass = flow.log_prob(grid).exp().sum() * (line[1] - line[0]) ** 2
    assert abs(mass - 1) < 1e-4


def test_regularizers_are_integrals_along_the_path():
    flow, x = small(), normal(5, 2)
    terms = flow.terms(x)
    torch.testing.assert_close(terms.log_prob, flow.log_prob(x), rtol=1e-7, atol=1e-7)
    assert torch.equal(terms.standard_error, torch.zeros(5).double())
    block = next(flow.blocks())
    times = torch.linspace(0, 1, 201).double()
    path = block.trajectory(x, times.tolist())
    values = [
        block.field.velocity_and_divergence(t, p, method="exact", regularizers=True)[2:]
        for t, p in zip(times, path, strict=True)
    ]
    for found, column in zip(terms[2:], zip(*values, strict=True), strict=True):
        expected = torch.trapezoid(torch.stack(column), times, dim=0)
        # error of the trapezoidal rule
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_samples_need_no_divergence(monkeypatch):
    """Only the state is integrated; it agrees with that of a solve with the log-determinant."""
    for options in ({}, {"train_time": True, "duration": 0.7}, {"context_features": 2}):
        flow = small(**options, **TIGHT | {"rtol": (1e-10, 1e-9), "atol": (1e-10, 1e-9)})
        context = normal(5, 2) if "context_features" in options else None
        pair = [torch.Generator().manual_seed(1) for _ in range(2)]
        expected, _ = flow.sample_and_log_prob(5, context, generator=pair[0])

        def fail(*args, **kwargs):
            raise AssertionError("the divergence was computed")

        with monkeypatch.context() as patch:
            patch.setattr(nn.VectorFieldMLP, "velocity_and_divergence", fail)
            found = flow.sample(5, context, generator=pair[1])
        torch.testing.assert_close(found, expected.detach(), rtol=1e-7, atol=1e-7)

    class Pair(torch.nn.Module):
        def velocity_and_divergence(self, t, x, **options):
            return -x, torch.full((1, len(x)), -2.0, dtype=x.dtype)

    assert flows.CNF(2, field=lambda _: Pair()).sample(3).isfinite().all()


def test_samples_are_of_the_density():
    """A class that overrides velocity_and_divergence is sampled by that; contexts are passed by position."""

    class Doubled(nn.VectorFieldMLP):
        def velocity_and_divergence(self, *args, **options):
            return tuple(2 * t for t in super().velocity_and_divergence(*args, **options))

    class Placed(torch.nn.Module):
        context_features = 1

        def forward(self, t, x, where):
            return where - x

        def velocity_and_divergence(self, t, x, *, context, **options):
            return context - x, x.new_full((1, len(x)), -2.0)

    def whole(scaled):
        return (scaled[0].square().mean() + scaled[1].square().mean()).sqrt()

    def one(size):
        return Doubled(size, (8,))

    for options, context in (
        ({"field": one, "divergence": "exact"}, None),
        ({"field": lambda _: Placed(), "context_features": 1}, normal(4, 1)),
        ({"divergence": "exact", "norm": whole}, None),
        ({"divergence": "exact"}, None),
    ):
        flow = flows.CNF(2, **options, rtol=1e-6, atol=1e-6)
        pair = [torch.Generator().manual_seed(1) for _ in range(2)]
        context = None if context is None else context.float()
        with torch.autocast("cpu", torch.bfloat16, enabled=len(options) == 1):
            found = flow.sample(4, context, generator=pair[0])
        expected, _ = flow.sample_and_log_prob(4, context, generator=pair[1])
        torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-4)


def test_standard_error_of_the_estimate():
    flow, x = small(divergence="hutchinson"), normal(40, 2)
    exact = small().log_prob(x)
    with torch.no_grad():
        terms = flow.terms(x, probes=64, generator=torch.Generator().manual_seed(0))
        deviations = (terms.log_prob - exact) / terms.standard_error
    # the mean of 40 samples with expectation 1 and deviation 0.22
    assert 0.5 < deviations.square().mean() < 2
    assert flow.terms(x).standard_error.isnan().all()


@pytest.mark.parametrize("adjoint", ["direct", "continuous", "reversible"])
def test_gradients_of_every_adjoint(adjoint):
    x = normal(6, 2)
    found = []
    for kind in ("direct", adjoint):
        flow = small(adjoint=kind)
        terms = flow.terms(x)
        loss = (-terms.log_prob + 0.1 * terms.kinetic + 0.1 * terms.jacobian).mean()
        check_gradients(flow, loss)
        found.append([p.grad for p in flow.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)  # solves with tolerance 1e-10


def test_ffjord_learns_a_mixture():
    torch.manual_seed(0)
    flow = flows.FFJORD(2, hidden=(32, 32), method="rk4", step_size=0.25)
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)

    def data(n):
        centres = torch.tensor([[2.0, 0.0], [-2.0, 0.0]])
        return centres[torch.randint(2, (n,))] + 0.5 * torch.randn(n, 2)

    for _ in range(150):
        optimizer.zero_grad()
        loss = -flow.log_prob(data(256)).mean()
        loss.backward()
        optimizer.step()
    entropy = math.log(2) + math.log(2 * math.pi * math.e) + 2 * math.log(0.5)
    assert loss < entropy + 0.25
    samples = flow.sample(500)
    assert abs(float((samples[:, 0] > 0).float().mean()) - 0.5) < 0.2


def test_images_blocks_and_the_distribution():
    torch.manual_seed(0)
    flow = flows.FFJORD((1, 2, 3), hidden=(8,), blocks=2, bits=8, method="rk4", step_size=0.5)
    x = torch.randint(0, 256, (4, 1, 2, 3), dtype=torch.uint8)
    assert flow.bits_per_dim(x).shape == flow.terms(x).log_prob.shape == (4,)
    assert flow.sample(3, quantized=True).dtype == torch.uint8
    assert flow.distribution().sample((2,)).shape == (2, 1, 2, 3)


def test_a_bad_sample_stays_alone():
    for options in ({"method": "rk4", "step_size": 0.25}, {"control": "sample", "rtol": 1e-6}):
        flow, x = small(**options), normal(5, 2)
        good = flow.log_prob(x)
        x[2] = torch.nan
        found = flow.log_prob(x)
        others = torch.arange(5) != 2
        torch.testing.assert_close(found[others], good[others])
        assert found[2].isnan()


@pytest.mark.parametrize("data", ["rings", "digits"])
def test_the_example_runs(data, tmp_path):
    path = Path(__file__).resolve().parents[2] / "examples" / "ffjord.py"
    main = runpy.run_path(str(path))["main"]
    assert math.isfinite(main(["--quick", "--data", data, "--out", str(tmp_path)]))
    assert data == "digits" or (tmp_path / "density.png").is_file()


def test_wrong_arguments():
    for error, message, call in (
        (TypeError, "field must", lambda: flows.ContinuousBijection(torch.nn.Linear(2, 2))),
        (ValueError, "duration", lambda: flows.CNF(2, duration=0.0)),
        (ValueError, "divergence", lambda: flows.CNF(2, divergence="brute")),
        (ValueError, "noise", lambda: flows.CNF(2, noise="uniform")),
        (ValueError, "probes", lambda: flows.CNF(2, probes=0)),
        (ValueError, "blocks", lambda: flows.CNF(2, blocks=0)),
        (ValueError, "x must have shape", lambda: flows.CNF(2).terms(torch.zeros(3, 4))),
    ):
        with pytest.raises(error, match=message):
            call()
    assert ode.Status.ok == 0
