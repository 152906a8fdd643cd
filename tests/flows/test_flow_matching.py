"""Flow matching: its loss against the formula, and a linear Gaussian problem against its closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyflowkern import flows, nn, transport

D = 3


def _gaussians() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    roots = torch.randn(2, D, D, dtype=torch.float64, generator=draw)
    covs = roots @ roots.mT + 0.5 * torch.eye(D, dtype=torch.float64)
    means = torch.randn(2, D, dtype=torch.float64, generator=draw)
    return means[0], covs[0], means[1], covs[1]


class _ExactField(torch.nn.Module):
    """The velocity between two Gaussians with independent ends, in the time of the field."""

    def __init__(self) -> None:
        super().__init__()
        self.ends = _gaussians()

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        m0, a, m1, b = self.ends
        s = 1 - t
        mean, cov = (1 - s) * m0 + s * m1, (1 - s) ** 2 * a + s**2 * b
        gain = (s * b - (1 - s) * a) @ torch.linalg.inv(cov)
        return -(m1 - m0 + (x - mean) @ gain.mT)


def _exact() -> flows.FlowMatching:
    m0, a, _, _ = _gaussians()
    base = torch.distributions.MultivariateNormal(m0, a)
    solver = {"rtol": 1e-10, "atol": 1e-10}
    flow = flows.FlowMatching(
        D, field=lambda _: nn.VectorField(_ExactField()), base=base, **solver
    )
    return flow.double().eval()


def test_exact_velocity_gives_the_density_of_the_target() -> None:
    flow = _exact()
    _, _, m1, b = _gaussians()
    target = torch.distributions.MultivariateNormal(m1, b)
    x = torch.randn(20, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    torch.testing.assert_close(flow.log_prob(x), target.log_prob(x), rtol=1e-8, atol=1e-8)
    y, log_prob = flow.sample_and_log_prob(20)
    torch.testing.assert_close(log_prob, target.log_prob(y), rtol=1e-8, atol=1e-8)


def test_exact_velocity_maps_base_to_target() -> None:
    _, _, m1, b = _gaussians()
    x = _exact().sample(20_000, generator=torch.Generator().manual_seed(1))
    error = (x.mean(0) - m1) / (b.diagonal() / len(x)).sqrt()
    assert error.abs().max() < 5
    torch.testing.assert_close(x.T.cov(), b, rtol=0.06, atol=0.06)


@pytest.mark.parametrize("coupling", ["independent", "ot", "sinkhorn"])
@pytest.mark.parametrize("context_features", [0, 2])
def test_loss_is_its_formula(coupling: str, context_features: int) -> None:
    flow = flows.FlowMatching(D, hidden=(8,), coupling=coupling, context_features=context_features)
    x1 = torch.randn(16, D)
    context = x1[:, :2].clone() if context_features else None
    loss = flow.loss(x1, context, generator=torch.Generator().manual_seed(5))
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in flow.parameters())
    draw = torch.Generator().manual_seed(5)
    x0 = flow.base.sample(16, temperature=1.0, generator=draw)
    if coupling != "independent":
        i, j = flow.coupling.ot_sampler.pairs(x0, x1, True, generator=draw)
        x0, x1 = x0[i], x1[j]
    s = torch.rand(16, generator=draw)
    xs = torch.lerp(x0, x1, s[:, None])
    given = x1[:, :2] if context_features else None  # a context goes where its sample goes
    want = (flow.velocity(s, xs, given) - (x1 - x0)).square().mean()
    torch.testing.assert_close(loss, want)


def test_images_and_pixels() -> None:
    solver = {"method": "rk4", "step_size": 0.5}
    flow = flows.FlowMatching((1, 4, 4), hidden=(8,), conv=True, bits=8, **solver)
    x = torch.randint(0, 256, (3, 1, 4, 4), dtype=torch.uint8)
    flow.loss(x).backward()
    assert flow.velocity(0.5, torch.randn(3, 1, 4, 4)).shape == (3, 1, 4, 4)
    assert flow.sample(2, quantized=True).shape == (2, 1, 4, 4)
    flat = flows.FlowMatching((1, 4, 4), hidden=(8,), coupling="ot", **solver)
    flat.loss(torch.randn(3, 1, 4, 4)).backward()
    assert flat.sample(2).shape == (2, 1, 4, 4)


def test_own_matcher_and_given_base_samples() -> None:
    matcher = transport.ConditionalFlowMatcher(sigma=0.1)
    flow = flows.FlowMatching(2, hidden=(8,), coupling=matcher)
    assert flow.coupling is matcher
    assert flow.loss(torch.randn(4, 2), x0=torch.randn(4, 2)).shape == ()


def test_trained_samples_have_the_mean_and_spread_of_the_data() -> None:
    torch.manual_seed(0)
    flow = flows.FlowMatching(2, hidden=(32, 32))
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        flow.loss(3 + 0.5 * torch.randn(256, 2)).backward()
        optimizer.step()
    x = flow.sample(2000)
    assert (x.mean(0) - 3).abs().max() < 0.1
    assert (x.std(0) - 0.5).abs().max() < 0.1


@pytest.mark.parametrize(
    ("make", "error", "name"),
    [
        (lambda: flows.FlowMatching(2, coupling="exact"), ValueError, "coupling"),
        (lambda: flows.FlowMatching(2, coupling=3), TypeError, "coupling"),
        (lambda: flows.FlowMatching(2, blocks=2), TypeError, "blocks"),
        (
            lambda: flows.FlowMatching(
                2,
                coupling=transport.TargetConditionalFlowMatcher(0.1),
                base=flows.MixtureOfGaussians(2, 3),
            ),
            ValueError,
            "base",
        ),
        (lambda: flows.FlowMatching(2).loss(torch.randn(4, 3)), ValueError, "x1"),
        (lambda: flows.FlowMatching(2).loss(torch.randn(4, 2), x0=torch.randn(3, 2)), ValueError, "x0"),
        (lambda: flows.FlowMatching(2).loss(torch.randn(4, 2).double()), TypeError, "x1"),
        (lambda: flows.FlowMatching(2).loss(torch.randn(4, 2), x0=[1]), TypeError, "x0"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(make, error, name) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=name):
        make()


def test_the_loss_compiles_to_one_graph() -> None:
    flow = flows.FlowMatching(2, hidden=(8,))
    x1, x0 = torch.randn(16, 2), torch.randn(16, 2)
    graphs: list[object] = []

    def backend(graph, inputs):  # type: ignore[no-untyped-def]
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(flow.loss, fullgraph=True, backend=backend)
    torch.manual_seed(0)
    got = compiled(x1, x0=x0)
    torch.manual_seed(0)
    torch.testing.assert_close(got, flow.loss(x1, x0=x0))
    assert len(graphs) == 1


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_standard_error_is_that_of_the_estimator(noise: str) -> None:
    """Of a field with Jacobian A: 2 (|S|^2 - sum S_ii^2) for signs and 2 |S|^2 for normal probes, S = (A + A^T) / 2."""
    torch.manual_seed(0)
    matrix = torch.randn(6, 6, dtype=torch.float64)

    class Linear(torch.nn.Module):
        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return x @ matrix.T

    settings = {"noise": noise, "method": "rk4", "step_size": 0.5}
    flow = flows.FlowMatching(6, field=lambda _: nn.VectorField(Linear()), **settings).double()
    x = 0.1 * torch.randn(400, 6, dtype=torch.float64)
    symmetric = (matrix + matrix.T) / 2
    variance = 2 * symmetric.square().sum()
    if noise == "rademacher":
        variance -= 2 * symmetric.diagonal().square().sum()
    exact = flow.eval().log_prob(x)
    torch.testing.assert_close(flow.terms(x).log_prob, exact)
    assert not flow.terms(x).standard_error.any()
    for probes in (4, 64):
        draw = torch.Generator().manual_seed(probes)
        terms = flow.terms(x, probes=probes, generator=draw)
        found = terms.standard_error.square().mean() * probes
        torch.testing.assert_close(found, variance, rtol=0.1, atol=0.0)
        error = terms.log_prob - exact
        # the mean of 400 samples, each with this variance
        torch.testing.assert_close(error.square().mean() * probes, variance, rtol=0.35, atol=0.0)
        assert error.mean().abs() < 5 * (variance / probes / 400) ** 0.5


def test_images_with_a_u_net() -> None:
    """Bright squares at one of two places: the loss falls, samples are such images, errors shrink."""
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(1)

    def images(n: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(2, (n,), generator=draw)
        x = 0.1 * torch.randn(n, 1, 6, 5, generator=draw)
        x[labels == 0, :, 1:3, 1:3] += 1.5
        x[labels == 1, :, 3:5, 2:4] += 1.5
        return x, labels

    solver = {"method": "midpoint", "step_size": 0.25}
    flow = flows.FlowMatching((1, 6, 5), (8, 12), conv="unet", classes=2, **solver)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        loss = flow.loss(*images(64))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1
    assert sum(losses[-20:]) / 20 < 0.35 * losses[0]
    labels = torch.tensor([0, 1]).repeat(20)
    x = flow.eval().sample(40, labels, guidance=1.5, generator=draw)
    assert x.shape == (40, 1, 6, 5)
    first, second = x[:, 0, 1:3, 1:3].mean((1, 2)), x[:, 0, 3:5, 2:4].mean((1, 2))
    assert ((first > second) == (labels == 0)).float().mean() > 0.9
    x, labels = images(12)
    exact = flow.log_prob(x, labels)  # 30 dimensions: the exact trace
    swapped = flow.log_prob(x, 1 - labels)
    assert exact.isfinite().all()
    assert ((exact > swapped).float().mean()) > 0.9
    errors = []
    for probes in (4, 36):
        terms = flow.terms(x, labels, probes=probes, generator=draw)
        assert ((terms.log_prob - exact).abs() < 6 * terms.standard_error).float().mean() > 0.9
        errors.append(terms.standard_error.mean())
    assert 0.2 < errors[1] / errors[0] < 0.5  # a third
