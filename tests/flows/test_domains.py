"""Domains of data: the density is zero outside, ends count as inside in every dtype, and warnings say what helps."""

import math
import warnings

import pytest
import torch
from laws import normal, randomize

from pyflowkern import flows, nn

SOLVER = {"method": "rk4", "step_size": 0.5}
PIXELS = {
    "Glow": lambda **o: flows.Glow((1, 4, 4), levels=1, steps=1, hidden=4, bits=8, **o),
    "RealNVP": lambda **o: flows.RealNVP((1, 4, 4), levels=1, steps=1, hidden=4, bits=8, **o),
    "NSF": lambda **o: flows.NSF((1, 4, 4), levels=1, steps=1, hidden=4, bits=8, **o),
    "FFJORD": lambda **o: flows.FFJORD((1, 4, 4), (4,), bits=8, **SOLVER, **o),
}
pixels = pytest.mark.parametrize("build", PIXELS.values(), ids=PIXELS)


@pixels
@pytest.mark.parametrize("alpha", [0.0, 0.05])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_outside_the_unit_interval_have_density_zero(build, alpha, dtype):
    flow = randomize(build(alpha=alpha), 0.1).to(dtype).eval()
    margin = alpha / (1 - 2 * alpha)
    assert flow.domain == (-margin, 1 + margin)
    x = torch.rand(8, 1, 4, 4, dtype=dtype) * 0.98 + 0.01
    expected = flow.log_prob(x)
    spoilt = x.clone()
    for i, value in enumerate((-0.1, 1.2, 300.0, -margin, 1 + margin, math.inf, math.nan)):
        spoilt[i, 0, 1, 1] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = flow.log_prob(spoilt)
        assert flow.bits_per_dim(spoilt)[0] == math.inf
    assert found[:6].tolist() == [-math.inf] * 6
    assert found[6].isnan()
    torch.testing.assert_close(found[7], expected[7], rtol=1e-6, atol=1e-6)
    known = spoilt[[0, 1, 2, 3, 4, 5, 7]].requires_grad_()
    flow.log_prob(known)[-1].backward()
    assert known.grad[:6].eq(0).all()
    assert known.grad[6].isfinite().all()
    for p in flow.parameters():  # nor do the bad points spoil the gradients of parameters
        assert p.grad is None or p.grad.isfinite().all()
    if isinstance(flow, flows.FFJORD):
        assert flow.terms(spoilt).log_prob[:6].tolist() == [-math.inf] * 6


def test_pixels_at_the_ends_of_the_unit_interval_are_inside_of_the_margin():
    flow = randomize(PIXELS["Glow"](), 0.1).eval()
    x = torch.rand(4, 1, 4, 4).round()
    assert flow.log_prob(x).isfinite().all()
    draws, log_prob = flow.sample_and_log_prob(200)
    torch.testing.assert_close(flow.log_prob(draws), log_prob, rtol=1e-3, atol=1e-2)
    assert flow.distribution().support.check(draws).all()


def test_the_latent_of_pixels_is_any_real_number():
    transform = PIXELS["Glow"]().transform()
    assert transform.codomain.check(torch.full((2, 16), 5.0)).all()
    assert not transform.domain.check(torch.full((2, 1, 4, 4), 5.0)).any()


@pytest.mark.parametrize("options", [{}, {"autoregressive": True}, {"mixing": "permutation"}])
def test_angles_rounded_to_float32_are_valid_in_float64(options):
    flow = flows.NSF(2, circular=True, transforms=2, hidden=8, **options).double().eval()
    end = float(torch.tensor(math.pi))  # above pi by 9e-8
    x = torch.tensor([[end, -end], [end, 0.3], [math.pi, -math.pi]], dtype=torch.float64)
    uniform = torch.full((3,), -2 * math.log(2 * math.pi)).double()
    # the parameters that make the flow an identity were rounded to float32
    torch.testing.assert_close(flow.log_prob(x), uniform, rtol=0, atol=1e-6)
    randomize(flow, 0.5)
    near = torch.tensor([[end - 2 * math.pi, 2 * math.pi - end]], dtype=torch.float64)
    # autoregressive networks see the angle itself, which may jump at the ends
    if "autoregressive" not in options:
        torch.testing.assert_close(flow.log_prob(x[:1]), flow.log_prob(near))
    x.requires_grad_()
    flow.log_prob(x).sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad[:2].ne(0).any(1).all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert flow.log_prob(x.detach() * 1.000001).eq(-math.inf).all()


def test_the_ends_of_a_uniform_base_belong_to_it_in_every_dtype():
    base = flows.Uniform(1, -1.1, 2.2).double()
    ends = torch.tensor([[-1.1], [2.2]])
    assert base.log_prob(ends.double()).isfinite().all()  # 2.2 in float32 is above 2.2
    assert base.log_prob(torch.tensor([[2.2], [-1.1]]).double()).isfinite().all()
    assert base.log_prob(ends.double() * 1.00001).eq(-math.inf).all()


@pytest.mark.parametrize("bits", [5, 8])
def test_pixels_of_a_float64_flow_are_dequantised_in_float64(bits):
    flow = randomize(
        flows.Glow((1, 4, 4), levels=1, steps=1, hidden=4, bits=bits, alpha=1e-6), 0.1
    ).double()
    flow.eval()
    x = torch.randint(0, 2**bits, (64, 1, 4, 4)).to(torch.uint8)
    x[0], x[1] = 0, 2**bits - 1
    y, log_det = flow._from_pixels(x)
    assert y.dtype == log_det.dtype == torch.float64
    v, from_v = flow.preprocess.inverse(y)
    expected = -from_v - 16 * bits * math.log(2)
    torch.testing.assert_close(log_det, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(flow.preprocess.quantize(v), x)
    # the noise has 16 bits: every point is the middle of a step of 2^-(16 + bits), which needs float64
    steps = v * 2.0 ** (16 + bits)
    torch.testing.assert_close(steps - steps.floor(), torch.full_like(v, 0.5), rtol=0, atol=1e-6)
    z, total = flow(x)
    assert z.dtype == total.dtype == torch.float64


# --- hints ---


def test_angles_from_0_to_2_pi_get_a_hint_once():
    flow = flows.NSF(2, circular=True, transforms=1, hidden=8)
    x = torch.rand(50, 2) * 2 * math.pi
    with pytest.warns(UserWarning, match=r"outside of the domain .*-inf; angles .*remainder"):
        assert flow.log_prob(x).isinf().any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flow.log_prob(x)
        low, length = -math.pi, 2 * math.pi
        assert flow.log_prob(low + torch.remainder(x - low, length)).isfinite().all()


def test_pixels_as_floats_get_a_hint():
    x = torch.randint(0, 256, (4, 1, 4, 4)).float()
    with pytest.warns(UserWarning, match="give integer pixels as uint8"):
        PIXELS["Glow"]().log_prob(x)


def test_columns_on_the_unit_interval_get_a_hint():
    with pytest.warns(UserWarning, match="rescale the data"):
        flows.NSF(2, tails="none", transforms=1, hidden=8).log_prob(normal(9, 2).float())


@pytest.mark.parametrize(
    "build",
    [
        lambda: flows.NSF(2, transforms=1, hidden=8),
        lambda: flows.MAF(2, transforms=1, hidden=8),
        lambda: flows.CNF(2, (8,), **SOLVER),
    ],
)
def test_data_of_another_scale_get_a_hint(build):
    x = 1e5 * torch.randn(20, 2)
    with (
        pytest.warns(UserWarning, match=r"size .*e\+0.* standardise them as \(x - mean\) / std"),
    ):
        build().log_prob(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build().log_prob(x / 1e5)


def test_data_of_another_scale_get_a_hint_where_actnorm_has_not_started():
    """In eval mode it has no effect before the first batch in training; the hint comes once."""
    flow, x = flows.RealNVP(2, steps=1, hidden=8).eval(), 1e5 * torch.randn(20, 2)
    with pytest.warns(UserWarning, match=r"standardise them .* or call the flow in training mode"):
        flow.log_prob(x)
    flow(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flow.log_prob(x)
        started = flows.RealNVP(2, steps=1, hidden=8)
        started(x)
        started.eval().log_prob(x)


def test_no_hint_with_actnorm_or_without_values():
    x = 1e5 * torch.randn(20, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flows.RealNVP(2, steps=1, hidden=8).log_prob(x)
        flow = flows.MAF(2, transforms=1, hidden=8)
        torch.func.vmap(lambda row: flow.log_prob(row[None])[0])(x)
        torch.compile(flow.log_prob, backend="eager", fullgraph=True)(x)
        flow.to("meta").log_prob(x.to("meta"))


def test_a_bounded_flow_of_the_user():
    flow = flows.Flow(
        nn.CircularShift(2), (2,), base=flows.Uniform(2), domain=(-math.pi, math.pi), periodic=True
    )
    assert flow.log_prob(torch.zeros(1, 2)).isfinite().all()
    assert flow.support.check(flow.sample(5)).all()
    for domain, message in (((1.0, 1.0), "low < high"), ((0.0, math.inf), "low < high")):
        with pytest.raises(ValueError, match=message):
            flows.Flow(nn.CircularShift(2), (2,), domain=domain)
    with pytest.raises(ValueError, match="domain must be None with bits=8"):
        flows.Flow(nn.CircularShift(2), (2,), domain=(0.0, 1.0), bits=8)
