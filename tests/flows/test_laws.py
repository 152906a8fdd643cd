"""Every flow of tests/cases/flows.py obeys the laws of a bijection and of a density model."""

import math
from functools import partial

import pytest
import torch
from cases.flows import FLOWS, IAF, MAF, NSF, Glow, RealNVP
from laws import check_gradients, randomize
from laws import module_checks as laws
from laws.graph_checks import STRIDES

from pyflowkern import flows, nn

every_flow = pytest.mark.parametrize("case", FLOWS, ids=str)
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
#: The layers inside have these laws on the reference, too: here it is seen that flows put them together as they should.
kernels = pytest.mark.parametrize("backend", ["cpu", CUDA], indirect=True)
#: Whose strides Inductor looks at; C++ of its own is written for layers in tests/nn and flows in test_compile.py.
INDUCTOR = ("Glow image", "MAF", "NSF angles")
#: Whose densities, samples and training test_subsystems.py compiles, for any number of samples.
OF_ANY_NUMBER = (
    *("Glow vector", "RealNVP vector", "IAF", "NSF autoregressive"),
    *("CNF", "FFJORD", "FlowMatching"),
)


@every_flow
@kernels
def test_inverse_undoes_forward(backend, case):
    laws.check_the_inverse(case)


@every_flow
@kernels
def test_log_det_is_that_of_the_jacobian(backend, case):
    laws.check_the_log_det(case)


@every_flow
@kernels
def test_values_and_gradients_are_those_of_the_reference(backend, case):
    laws.check_reference(case)


@every_flow
@kernels
def test_a_bad_sample_stays_alone(backend, case):
    laws.check_bad_samples(case)


@every_flow
@kernels
def test_copies_compute_the_same(backend, case):
    laws.check_copies_and_meta(case)


@every_flow
@kernels
def test_every_parameter_has_a_gradient(backend, case):
    laws.check_every_parameter_learns(case)
    flow, x, context = case.make(n=8)
    check_gradients(flow.train(), flow.log_prob(x, context).mean())


@every_flow
@kernels
def test_empty_and_single_batches(backend, case):
    laws.check_empty_and_single_batches(case)
    flow, x, context = case.make()
    none = None if context is None else context[:0]
    assert flow.log_prob(x[:0], none).shape == (0,)
    assert flow.sample(0, none).shape == (0, *x.shape[1:])


@every_flow
def test_shapes(case):
    laws.check_shapes(case)


@every_flow
@kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types(backend, case, dtype):
    laws.check_half_types(case, dtype)
    flow, x, context = case.make(dtype=dtype)
    assert flow.log_prob(x, context).dtype == torch.float32


@every_flow
@kernels
def test_autocast(backend, case):
    laws.check_autocast(case)
    flow, x, context = case.make(dtype=torch.float32)
    with torch.autocast(backend.type, torch.bfloat16):
        assert flow.log_prob(x, context).dtype == torch.float32
        assert flow.log_prob(x.bfloat16(), context).dtype == torch.float32


@pytest.mark.parametrize(
    "case", [c for c in FLOWS if c.name not in (*INDUCTOR, *OF_ANY_NUMBER)], ids=str
)
@kernels
def test_compiles_into_one_graph(backend, case):
    laws.check_compiles(case, "eager")


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in FLOWS if c.name in INDUCTOR], ids=str)
@kernels
def test_compiles_with_inductor(backend, case):
    laws.check_compiles(case, "inductor", STRIDES)


@every_flow
@kernels
def test_bits_depend_on_neither_threads_nor_the_run(backend, case):
    laws.check_determinism(case, (1, 3))


@every_flow
@kernels
def test_function_transforms(backend, case):
    laws.check_function_transforms(case)


@every_flow
@kernels
@pytest.mark.parametrize("layout", laws.LAYOUTS)
def test_strides(backend, case, layout):
    laws.check_strides(case, layout)


@every_flow
def test_the_transform_is_the_flow(case):
    laws.check_transform(case)


@every_flow
def test_wrong_arguments_are_named(case):
    laws.check_wrong_arguments(case)


def test_every_flow_has_a_case():
    assert {*INDUCTOR, *OF_ANY_NUMBER} <= {case.name for case in FLOWS}
    public = {getattr(flows, name) for name in flows.__all__}
    wanted = {c for c in public if isinstance(c, type) and issubclass(c, flows.Flow)}
    assert {type(case.build()) for case in FLOWS} == wanted


# --- of densities -----------------------------------------------------------------------------------


@every_flow
def test_log_prob_is_that_of_the_latent_plus_log_det(case):
    flow, x, context = case.make()
    z, log_det = flow(x, context)
    assert z.shape == (3, math.prod(x.shape[1:]))
    found, wanted = flow.log_prob(x, context), flow.base.log_prob(z) + log_det
    # where one op computes all, it adds the terms of the base in another order
    torch.testing.assert_close(found, wanted, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(
        flow.base.log_prob(z), flow.base.distribution().log_prob(z), check_dtype=False
    )
    if flow.preprocess is None:
        bits = -flow.log_prob(x, context) / (flow.dims * math.log(2))
        torch.testing.assert_close(flow.bits_per_dim(x, context), bits)


@every_flow
def test_samples_are_latents_of_the_generator_and_have_their_density(case):
    flow, _, context = case.make()
    draws = [torch.Generator().manual_seed(1) for _ in range(4)]
    x, log_prob = flow.sample_and_log_prob(3, context, generator=draws[0])
    torch.testing.assert_close(
        log_prob, flow.log_prob(x, context), rtol=1e-6, atol=100 * case.atol
    )
    expected = flow.sample(3, context, generator=draws[1])
    assert torch.equal(flow.sample(3, context, generator=draws[2]), expected)
    kept = x if flow.preprocess is None else x.clamp(0, 1)
    torch.testing.assert_close(expected, kept.detach(), rtol=0, atol=case.atol)
    z = flow.base.sample(3, generator=draws[3])
    torch.testing.assert_close(flow.inverse(z, context)[0], x, rtol=0, atol=case.atol)


# fields are random, a standardized flow has the scale of its data, and BatchNorm adds to a variance
NEUTRAL = [c for c in FLOWS if not c.ode and "of other scales" not in c.name]
NEUTRAL = [c for c in NEUTRAL if "batch norm" not in c.name]


@pytest.mark.parametrize("case", NEUTRAL, ids=str)
def test_a_new_flow_is_volume_preserving_and_finite(case):
    flow = case.build().eval()
    _, x, context = case.make(dtype=torch.float32)
    z, log_det = flow.bijection(x, context)
    torch.testing.assert_close(log_det, torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.square().sum(), x.square().sum())  # it is at most a rotation


@every_flow
def test_split_latents_are_the_latent_in_parts(case):
    flow, x, context = case.make()
    z, _ = flow(x, context)
    parts = flow.split_latents(z)
    assert torch.equal(torch.cat([p.flatten(1) for p in parts], 1), z)
    levels = flow.bijection.levels if isinstance(flow.bijection, nn.MultiScale) else [0]
    assert len(parts) == len(levels)


def test_split_latents_have_the_shapes_of_the_levels():
    flow = flows.Glow((3, 16, 16), levels=3, steps=1, hidden=4)
    shapes = [tuple(p.shape) for p in flow.split_latents(torch.zeros(2, 768))]
    assert shapes == [(2, 6, 8, 8), (2, 12, 4, 4), (2, 48, 2, 2)]
    flow = flows.RealNVP((3, 16, 16), levels=2, steps=1, hidden=4)
    shapes = [tuple(p.shape) for p in flow.split_latents(torch.zeros(2, 768))]
    assert shapes == [(2, 6, 8, 8), (2, 6, 8, 8)]


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
