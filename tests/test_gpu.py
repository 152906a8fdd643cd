"""Tests that need a GPU: streams, devices, graphs, and tensors of more than 2^31 elements."""

import math
import sys
import warnings
from pathlib import Path

import pytest
import torch

from pyflowkern import _library, flows, nn, ode, ops, use_reference

sys.path.append(str(Path(__file__).parents[1]))  # bench is not part of the installed package

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    _library.require_kernels("cuda")


def inputs(device="cuda", shape=(8, 6, 8, 8)):
    return torch.randn(shape, device=device), torch.randn(shape, device=device)


def glow_step(x):
    channels, like = x.shape[1], {"device": x.device}
    weight, zeros = torch.eye(channels, **like), torch.zeros(channels, **like)
    return ops.glow_step(x, zeros + 0.1, zeros + 1, weight, torch.zeros((), **like))


def line(like, *shape):
    """Return numbers from -0.5 to 0.5, which need no generator."""
    return torch.linspace(-0.5, 0.5, math.prod(shape), device=like.device).view(shape)


def spline(x):
    smap = ops.SplineMap(bins=4)
    return ops.spline(x, x[..., None] * line(x, smap.params), smap)


def autoregressive(x):
    z = x.flatten(1)[:, :6]
    return ops.autoregressive_inverse(
        z, [line(x, 9, 6), line(x, 12, 9)], [z[:, :1] * line(x, 9), None], PLAN, transform="tanh"
    )


def field(x):
    h = x.flatten(1)[:, :6]
    weights, biases = [line(x, 9, 6), line(x, 6, 9)], [line(x, 9), line(x, 6)]
    probe = torch.where(h > 0, 1.0, -1.0)
    estimate = ops.field_divergence(h, weights, biases, probe=probe, regularizers=True)
    exact = ops.field_divergence(h, weights, biases, method="exact")
    layer = ops.field_layer(torch.cat((x, x)), x[0, :, 0, 0], x[:, :, 0, 0], tangents=1)
    return (*estimate, *exact, layer)


def chain(x):
    program = ops.ChainProgram(6, [ops.ActNormStep(), ops.PLUStep(), ops.LinearStep()])
    given = [line(x, *wanted.shape) + 1 for wanted in program.tensors]
    given[2] = torch.arange(6, device=x.device).flip(0)
    return ops.chain(x.flatten(1)[:, :6].contiguous(), program, given)


PLAN = nn.MaskedMLP(6, 2, (9,)).plan

#: One call of each family, whose results depend on x only.
CALLS = {
    "affine": lambda x: ops.affine_coupling(x, x),
    "actnorm": lambda x: ops.actnorm(x, x[0, :, 0, 0].clamp(-1, 1), x[1, :, 0, 0]),
    "linear": glow_step,
    "matrix": lambda x: ops.slogdet_inverse(x[:, 0, :8, :8] + 16 * torch.eye(8, device=x.device)),
    "preprocess": lambda x: ops.logit(x.sigmoid(), alpha=0.05),
    "density": lambda x: (ops.normal_log_prob(x, x[0], log_det=x[:, 0, 0, 0]),),
    "spline": spline,
    "autoregressive": autoregressive,
    "chain": chain,
    "field": field,
    "runge_kutta": lambda x: (
        ops.rk_combine(x[0], x, (0.5, 0.0, 0.25), 0.1),
        ops.rk_error(x[0], x[1], x, (1.0, -1.0), 0.1, rtol=0.1, atol=0.1),
    ),
    "diffusion": lambda x: (ops.euler_maruyama(x, x, 0.1, 1.0, other=x, index=3, seed=1),),
}
every_family = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def check(got, call, x):
    with use_reference():
        for found, expected in zip(got, call(x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@every_family
def test_ops_run_on_the_current_stream(call):
    """The op must see work queued earlier on the same side stream; on the default stream it would not wait for it."""
    x = torch.randn(64, 24, 32, 32, device="cuda")
    call(x)  # plans are copied to the device once, which would wait for the queued work
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        got = call(x * 2)
    side.synchronize()
    check(got, call, 2 * x)


@every_family
def test_a_tensor_of_another_device_than_the_current_one(call):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    x = torch.randn(8, 6, 8, 8, device="cuda:1")
    with torch.cuda.device(0):
        got = call(x)
        assert torch.cuda.current_device() == 0
    assert all(t.device == x.device for t in got)
    check(got, call, x)


def test_storage_offset_by_one_element():
    x = torch.randn(8 * 6 * 64 + 1, device="cuda")[1:].view(8, 6, 8, 8)
    params = torch.randn_like(x)
    y, _ = ops.affine_coupling(x, params)
    torch.testing.assert_close(
        y, ops.affine_coupling_reference(x, params)[0], rtol=1e-5, atol=1e-5
    )


def test_empty_batch():
    x, params = (torch.randn(0, 6, 4, 4, device="cuda", requires_grad=True) for _ in range(2))
    y, log_det = ops.affine_coupling(x, params)
    (y.sum() + log_det.sum()).backward()
    assert y.shape == x.shape
    assert log_det.shape == (0,)


def linear_spline(x):
    return ops.spline(x, torch.stack([x, -x], -1), ops.SplineMap("linear", bins=2))[0]


def many_samples(x):
    plan = nn.MaskedMLP(2, 1, (3,)).plan
    weights = [line(x, 3, 2), line(x, 2, 3)]
    z = x.view(-1, 2)
    return ops.autoregressive_inverse(z, weights, [None, None], plan, transform="additive")[
        0
    ].view_as(x)


@pytest.mark.parametrize(
    "op",
    [
        lambda x: ops.logit(x)[0],
        lambda x: ops.affine(x, x, x)[0],
        linear_spline,
        many_samples,
        lambda x: ops.hutchinson_trace(x, x),
    ],
)
def test_more_than_2_to_the_31_elements(op):
    if torch.cuda.get_device_properties(0).total_memory < 60 << 30:
        pytest.skip("needs 60 GiB")
    x = torch.rand(2176, 2, 2**19, device="cuda", dtype=torch.bfloat16)
    got = op(x)[-1]
    torch.testing.assert_close(got, op(x[-1:].clone())[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["Glow", "RealNVP", "NSF", "MAF"])
def test_a_training_step_replays_as_a_graph(name):
    from bench import _steps

    make = _steps.models()[name]
    device = torch.device("cuda")
    plain, step = _steps.Step(make, device, False), _steps.Step(make, device, False)
    graph = _steps.captured(step)
    for _ in range(_steps.WARM + 2):
        plain()
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(step.parameters(), plain.parameters(), rtol=1e-3, atol=1e-4)


WITHOUT_WAITING = {
    "Glow": lambda: flows.Glow((3, 16, 16), levels=2, steps=2, hidden=16),
    "NSF": lambda: flows.NSF(6, transforms=2, hidden=(16, 16), mixing="permutation"),
    "NSF autoregressive": lambda: flows.NSF(
        6, transforms=2, hidden=(16, 16), autoregressive=True, tails="none"
    ),
    "MAF": lambda: flows.MAF(6, transforms=2, hidden=(16, 16)),
}


@pytest.mark.parametrize("name", WITHOUT_WAITING)
def test_nothing_waits_for_the_host(name):
    flow = WITHOUT_WAITING[name]().cuda()
    x = torch.rand(8, *flow.event_shape, device="cuda")
    flow.log_prob(x)
    flow.sample(4)  # plans are copied to the device once
    torch.cuda.set_sync_debug_mode("error")
    try:
        flow.log_prob(x).mean().backward()
        flow.sample(4)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def swing(t, y):
    a, v = y[..., 0], y[..., 1]
    return torch.stack([v, torch.cos(3 * t) - torch.sin(a)], -1)


def test_a_captured_solve_replays():
    layer = torch.nn.Linear(8, 8, device="cuda")
    starts = torch.randn(3, 16, 8, device="cuda")
    settings = {"method": "rk4", "step_size": 0.1}

    def field(t, y):
        return torch.tanh(layer(y)) * torch.cos(t)

    captured = ode.capture(field, starts[0], [0.0, 0.5, 1.0], **settings)
    with torch.no_grad():
        for y0 in starts:
            expected = ode.solve(field, y0, [0.0, 0.5, 1.0], **settings)
            found = captured(y0)
            torch.testing.assert_close(found.ys, expected.ys)
            assert found.ok
        layer.weight.mul_(0.5)  # a replay reads the current parameters
        expected = ode.solve(field, y0, [0.0, 0.5, 1.0], **settings)
        torch.testing.assert_close(captured(y0).ys, expected.ys)
        assert captured(y0 * torch.nan).status.item() == ode.Status.non_finite


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
def test_steps_controlled_on_the_device_wait_only_every_few_steps():
    """Of more than 30 steps, one wait for every eight, and a few at the start and at the end."""
    y0 = torch.randn(64, 2, device="cuda", dtype=torch.float64)
    settings = {"rtol": 1e-7, "atol": 1e-9}
    expected = ode.solve(swing, y0, [0.0, 5.0, 9.0], **settings)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            s = ode.solve(swing, y0, [0.0, 5.0, 9.0], control="device", check_every=8, **settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    steps = s.stats.accepted + s.stats.rejected
    assert s.stats.accepted == expected.stats.accepted > 30
    assert len(waits) <= -(-steps // 8) + 6
    torch.testing.assert_close(s.ys, expected.ys, rtol=1e-6, atol=1e-6)
