"""Every flow obeys the laws of a density model."""

import math
from functools import partial

import pytest
import torch
from laws import (
    check_copies,
    check_gradients,
    check_inverse,
    check_log_det,
    check_samples_are_independent,
    normal,
    randomize,
)

from pyflowkern import flows, nn

K = 2
Glow = partial(flows.Glow, steps=1, hidden=4, context_features=K)
RealNVP = partial(flows.RealNVP, steps=2, hidden=4, blocks=1, context_features=K)
MAF = partial(flows.MAF, transforms=2, hidden=(8, 8), context_features=K)
IAF = partial(flows.IAF, transforms=2, hidden=(8, 8), context_features=K)
NSF = partial(flows.NSF, transforms=2, steps=1, hidden=(4, 4), bins=4, context_features=K)

#: name: (flow, event shape)
FLOWS = {
    "Glow image": (lambda: Glow((1, 4, 4), levels=2), (1, 4, 4)),
    "Glow three levels": (lambda: Glow((1, 8, 8), levels=3), (1, 8, 8)),
    "Glow dense": (lambda: Glow((2, 2, 4), levels=1, parameterization="dense"), (2, 2, 4)),
    "Glow sequence": (lambda: Glow((2, 8), levels=2), (2, 8)),
    "Glow volume": (lambda: Glow((1, 2, 2, 2), levels=1), (1, 2, 2, 2)),
    "Glow vector": (lambda: Glow(5), (5,)),
    "Glow pixels": (lambda: Glow((1, 4, 4), levels=1, bits=8), (1, 4, 4)),
    "RealNVP image": (lambda: RealNVP((1, 4, 4), levels=2), (1, 4, 4)),
    "RealNVP sequence": (lambda: RealNVP((2, 4), levels=1), (2, 4)),
    "RealNVP volume": (lambda: RealNVP((1, 4, 4, 4), levels=2, steps=1), (1, 4, 4, 4)),
    "RealNVP vector": (lambda: RealNVP((5,)), (5,)),
    "RealNVP pixels": (lambda: RealNVP((1, 4, 4), levels=1, bits=5), (1, 4, 4)),
    "MAF": (lambda: MAF(5), (5,)),
    "MAF residual": (lambda: MAF(5, residual=True, scale_map="tanh", order="random"), (5,)),
    "MAF on a mixture": (lambda: MAF(5, base=flows.MixtureOfGaussians(5, 3)), (5,)),
    "IAF": (lambda: IAF(5), (5,)),
    "NSF": (lambda: NSF(5), (5,)),
    "NSF unconditional": (
        lambda: NSF(5, unconditional=True, tails="affine", mixing="none", residual=False),
        (5,),
    ),
    "NSF autoregressive": (lambda: NSF(5, autoregressive=True), (5,)),
    "NSF autoregressive plu": (
        lambda: NSF(5, autoregressive=True, mixing="plu", residual=False),
        (5,),
    ),
    "NSF angles": (lambda: NSF(5, circular=True, mixing="permutation"), (5,)),
    "NSF angles autoregressive": (lambda: NSF(4, circular=True, autoregressive=True), (4,)),
    "NSF unit interval": (lambda: NSF(5, tails="none"), (5,)),
    "NSF image": (lambda: NSF((1, 4, 4), levels=2), (1, 4, 4)),
    "NSF sequence": (lambda: NSF((2, 4), levels=1, residual=False), (2, 4)),
    "NSF pixels": (lambda: NSF((1, 4, 4), levels=1, bits=8), (1, 4, 4)),
    "own bijection": (
        lambda: flows.Flow(
            nn.Sequential(nn.Squeeze(), nn.GlowStep(4)), (1, 4, 2), context_features=K
        ),
        (1, 4, 2),
    ),
}
every_flow = pytest.mark.parametrize("name", FLOWS)


def make(name, n=3, dtype=torch.float64):
    """Return a flow in eval mode with changed parameters, data and a context."""
    torch.manual_seed(0)
    build, shape = FLOWS[name]
    flow = randomize(build()).to(dtype).eval()
    x = normal(n, *shape, dtype=dtype)
    if flow.domain is not None:
        low, high = flow.domain
        x = low + (high - low) * torch.sigmoid(x)
    return flow, x if flow.preprocess is None else torch.sigmoid(x), normal(n, K, dtype=dtype)


@every_flow
def test_inverse_undoes_forward(name):
    flow, x, context = make(name)
    check_inverse(flow, x, context, atol=1e-8)
    assert flow(x, context)[0].shape == (3, math.prod(x.shape[1:]))


@every_flow
def test_log_det_is_that_of_the_jacobian(name):
    check_log_det(*make(name, n=1))


@every_flow
def test_log_prob_is_that_of_the_latent_plus_log_det(name):
    flow, x, context = make(name)
    z, log_det = flow(x, context)
    assert torch.equal(flow.log_prob(x, context), flow.base.log_prob(z) + log_det)
    torch.testing.assert_close(
        flow.base.log_prob(z), flow.base.distribution().log_prob(z), check_dtype=False
    )


@every_flow
def test_samples_are_independent(name):
    check_samples_are_independent(*make(name))


@every_flow
def test_copies_compute_the_same(name):
    flow, x, context = make(name)
    check_copies(flow, FLOWS[name][0]().double(), x, context)


@every_flow
def test_every_parameter_has_a_gradient(name):
    flow, x, context = make(name, n=8)
    check_gradients(flow.train(), flow.log_prob(x, context).mean())


@every_flow
def test_a_new_flow_is_volume_preserving_and_finite(name):
    flow = FLOWS[name][0]().eval()
    _, x, context = make(name, dtype=torch.float32)
    z, log_det = flow.bijection(x, context)
    torch.testing.assert_close(log_det, torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.square().sum(), x.square().sum())  # it is at most a rotation


@every_flow
def test_an_empty_batch_is_a_batch(name):
    flow, x, context = make(name)
    z, log_det = flow(x[:0], context[:0])
    assert z.shape == (0, flow.dims)
    assert log_det.shape == flow.log_prob(x[:0], context[:0]).shape == (0,)
    assert flow.sample(0, context[:0]).shape == (0, *x.shape[1:])


@every_flow
def test_log_det_is_float32_at_least(name):
    flow, x, context = make(name, dtype=torch.bfloat16)
    assert flow(x, context)[0].dtype == torch.bfloat16
    assert flow.log_prob(x, context).dtype == torch.float32
    flow, x, context = make(name, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert flow.log_prob(x, context).dtype == torch.float32
        assert flow.log_prob(x.bfloat16(), context).dtype == torch.float32


@every_flow
def test_split_latents_are_the_latent_in_parts(name):
    flow, x, context = make(name)
    z, _ = flow(x, context)
    parts = flow.split_latents(z)
    assert torch.equal(torch.cat([p.flatten(1) for p in parts], 1), z)
    assert len(parts) == (
        len(flow.bijection.levels) if isinstance(flow.bijection, nn.MultiScale) else 1
    )


@every_flow
def test_a_flow_made_on_meta_becomes_the_flow_whose_state_it_takes(name):
    flow, x, context = make(name)
    with torch.device("meta"):
        other = FLOWS[name][0]().double().eval()
        assert all(t.is_meta for t in (*other.parameters(), *other.buffers()))
        assert other.log_prob(*(torch.empty_like(t, device="meta") for t in (x, context))).is_meta
    other.to_empty(device="cpu")
    check_takes_the_state(other, flow, x, context)
    other.to_empty(device="cpu")  # also if memory is allocated twice
    check_takes_the_state(other, flow, x, context)


def check_takes_the_state(other, flow, x, context):
    """Memory of to_empty holds anything: what is not state is spoilt first, but for masks."""
    for t in (*other.parameters(), *other.buffers()):
        if t.is_floating_point():
            t.detach().fill_(torch.nan)
    other.load_state_dict(flow.state_dict())
    assert torch.equal(seeded(other.log_prob, x, context), seeded(flow.log_prob, x, context))
    assert torch.equal(seeded(other.sample, 3, context[:3]), seeded(flow.sample, 3, context[:3]))
    if hasattr(flow.base, "distribution"):
        z = flow(x, context)[0]
        expected = flow.base.distribution().log_prob(z)
        assert torch.equal(other.base.distribution().log_prob(z), expected)


def seeded(call, *args):
    torch.manual_seed(0)
    return call(*args)


def test_split_latents_have_the_shapes_of_the_levels():
    flow = flows.Glow((3, 16, 16), levels=3, steps=1, hidden=4)
    shapes = [tuple(p.shape) for p in flow.split_latents(torch.zeros(2, 768))]
    assert shapes == [(2, 6, 8, 8), (2, 12, 4, 4), (2, 48, 2, 2)]
    flow = flows.RealNVP((3, 16, 16), levels=2, steps=1, hidden=4)
    shapes = [tuple(p.shape) for p in flow.split_latents(torch.zeros(2, 768))]
    assert shapes == [(2, 6, 8, 8), (2, 6, 8, 8)]


@every_flow
def test_the_transform_is_the_flow(name):
    flow, x, context = make(name, n=4)
    transform = flow.transform(context.view(2, 2, K))
    batched = x.view(2, 2, *x.shape[1:])
    y = transform(batched)
    z, log_det = flow(x, context)
    torch.testing.assert_close(y.flatten(0, 1), z)
    torch.testing.assert_close(transform.log_abs_det_jacobian(batched, y).flatten(), log_det)
    assert transform.forward_shape(batched.shape) == y.shape
    torch.testing.assert_close(transform.inv(y), batched)


def test_in_one_dimension_the_density_integrates_to_one():
    flow = (
        randomize(flows.Flow(nn.Sequential(nn.ActNorm(1), nn.Logit(0.01)), (1,))).double().eval()
    )
    # the logit is defined on an interval: put it after a scale, and integrate over that interval
    scale, bias = flow.bijection[0].log_scale.exp().item(), flow.bijection[0].bias.item()
    x = torch.linspace(-bias, 1 / scale - bias, 20001).double()[1:-1, None]
    mass = torch.trapezoid(flow.log_prob(x).exp(), x[:, 0])
    # the probability of the interval under the base
    inside = math.erf(math.log(0.99 / 0.01) / math.sqrt(2))
    torch.testing.assert_close(mass.item(), inside, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "build", [Glow, RealNVP, MAF, IAF, NSF, partial(NSF, autoregressive=True)]
)
def test_in_two_dimensions_the_density_integrates_to_one(build):
    flow = randomize(build(2, context_features=0), scale=0.5).double().eval()
    # splines have kinks in their slopes, which this many points resolve: 601 leave 1.4e-3, 1201 leave 1e-4
    grid = torch.linspace(-24, 24, 1001).double()
    points = torch.cartesian_prod(grid, grid)
    with torch.no_grad():
        mass = flow.log_prob(points).exp().sum() * (grid[1] - grid[0]) ** 2
    torch.testing.assert_close(mass.item(), 1.0, atol=1e-3, rtol=0)


# --- pixels ---


def pixel_flow(bits=8):
    torch.manual_seed(0)
    return randomize(flows.Glow((3, 4, 4), levels=1, steps=1, hidden=4, bits=bits), 0.1).eval()


def test_bits_per_dim_of_pixels_and_of_points_are_one_scale():
    flow = pixel_flow()
    x = torch.randint(0, 256, (16, 3, 4, 4), dtype=torch.uint8)
    pixels = torch.stack([flow.bits_per_dim(x) for _ in range(64)]).mean()
    points = torch.stack(
        [flow.bits_per_dim((x + torch.rand(x.shape)) / 256) for _ in range(64)]
    ).mean()
    torch.testing.assert_close(pixels, points, atol=0.01, rtol=0)


@pytest.mark.parametrize("bits", [5, 8])
def test_a_new_flow_needs_about_bits_for_uniform_pixels(bits):
    flow = flows.Glow((3, 4, 4), levels=1, steps=1, hidden=4, bits=bits)
    x = torch.randint(0, 2**bits, (64, 3, 4, 4)).to(torch.uint8)
    flow(x)  # initialises ActNorm
    assert abs(flow.bits_per_dim(x).mean().item() - bits) < 0.5


def test_bits_per_dim_of_real_data_is_the_log_prob_in_bits():
    flow, x, context = make("RealNVP vector")
    expected = -flow.log_prob(x, context) / (5 * math.log(2))
    torch.testing.assert_close(flow.bits_per_dim(x, context), expected)


def test_pixels_in_every_dtype():
    x = torch.randint(0, 256, (4, 3, 4, 4), dtype=torch.uint8)
    flow = pixel_flow()
    assert flow.log_prob(x).dtype == torch.float32
    assert flow.double()(x)[0].dtype == flow.log_prob(x).dtype == torch.float64
    assert flow.bfloat16()(x)[0].dtype == torch.bfloat16
    assert flow.log_prob(x).dtype == torch.float32


# --- training ---


@pytest.mark.parametrize("build", [flows.Glow, flows.RealNVP])
def test_three_lines_make_train_and_sample(build):
    torch.manual_seed(0)
    flow = build(2, steps=4, hidden=32)
    optimizer = torch.optim.Adam(flow.parameters(), 5e-3)
    angle = 2 * math.pi * torch.rand(256)
    x = torch.stack([angle.cos(), angle.sin()], 1) * 3 + 0.1 * torch.randn(256, 2) + 50
    for _ in range(150):
        optimizer.zero_grad()
        loss = -flow.log_prob(x).mean()
        loss.backward()
        optimizer.step()
    gaussian = 0.5 * torch.logdet(2 * math.pi * math.e * torch.cov(x.T, correction=0))
    assert loss < gaussian - 0.5  # nats better than the best Gaussian
    radius = (flow.sample(500) - 50).norm(dim=1)
    assert 2.5 < radius.median() < 3.5
