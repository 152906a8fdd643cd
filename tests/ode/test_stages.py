"""The sums over stages inside a solve: which ops run, and that kernels work for any slopes of the field."""

import pytest
import torch
from laws import Calls

from pyflowkern import _library, ode, use_reference

CONTROLS = ["batch", "device", "sample"]
TIGHT = {"rtol": 1e-8, "atol": 1e-8}


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def y0(request):
    return torch.linspace(0.5, 1.5, 24, dtype=request.param).view(8, 3)


def served():
    return _library.kernel_serves("rk_stage", torch.ones(1))


@pytest.mark.parametrize("state", ["tensor", "tuple"])
@pytest.mark.parametrize("control", CONTROLS)
def test_a_stage_is_one_op_and_the_error_is_one_op(y0, control, state):
    assert served()
    start, field = y0, lambda t, y: -y
    if state == "tuple":
        start, field = (y0, y0[:, 0]), lambda t, s: (-s[0], s[1])
    with torch.no_grad(), Calls() as calls:
        s = ode.solve(
            field, start, [0.0, 1.0], control=control, max_step=0.1, first_step=0.1, rtol=1, atol=1
        )
    steps = s.stats.accepted + s.stats.rejected
    stages = calls.names.count("pyflowkern::rk_stage")
    assert stages + calls.names.count("pyflowkern::rk_combine") == 6 * steps
    assert stages >= 6 * steps - 1  # one fewer if the first slope was read before
    assert calls.names.count("pyflowkern::rk_last") == steps
    assert calls.names.count("aten::addmv") == calls.names.count("aten::mv") == 0


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "dopri8", "tsit5"])
def test_kernels_and_torch_take_the_same_steps(y0, control, method):
    def run():
        ts = [0.0, 0.3, 1.0]
        return ode.solve(
            lambda t, y: torch.sin(3 * y), y0, ts, method=method, control=control, **TIGHT
        )

    ours = run()
    with use_reference():
        plain = run()
    if y0.dtype == torch.float64:  # in float32 rounding is as large as the tolerance
        assert ours.stats == plain.stats
    eps = torch.finfo(y0.dtype).eps
    torch.testing.assert_close(ours.ys, plain.ys, rtol=200 * eps, atol=1e-7)


@pytest.mark.parametrize("settings", [{"control": c} for c in CONTROLS] + [
    {"adjoint": "reversible"}, {"method": "rk4", "step_size": 0.1}, {"method": "euler", "step_size": 0.1},
    {"compat": "torchdiffeq"}, {"dense": True}, {"first_step": 0.01},
], ids=str)  # fmt: skip
def test_a_field_may_reuse_the_memory_of_its_result(y0, settings):
    """As a field that replays a CUDA graph does."""
    memory = torch.empty_like(y0)

    def again(t, y):
        return torch.mul(y, -1.0, out=memory)

    with torch.no_grad():
        ts = [0.0, 0.37, 1.0]
        found = ode.solve(again, y0, ts, **settings)
        fresh = ode.solve(lambda t, y: y * -1.0, y0, ts, **settings)
    assert torch.equal(found.ys, fresh.ys)
    if found.dense is not None:
        assert torch.equal(found.dense(0.4), fresh.dense(0.4))


@pytest.mark.parametrize("make", [
    lambda k: k.t().contiguous().t(), lambda k: k.double(), lambda k: k.bfloat16(),
    lambda k: k[:1].expand_as(k), lambda k: torch.stack((k, k), -1)[..., 0],
], ids=["transposed", "double", "bfloat16", "expanded", "strided"])  # fmt: skip
def test_slopes_of_any_layout_and_dtype(y0, make):
    with torch.no_grad():
        found = ode.solve(lambda t, y: make(-y), y0, [0.0, 1.0], rtol=1e-3, atol=1e-3)
        plain = ode.solve(
            lambda t, y: make(-y).to(y.dtype).contiguous(), y0, [0.0, 1.0], rtol=1e-3, atol=1e-3
        )
    assert torch.equal(found.ys, plain.ys)


def test_a_field_may_return_its_argument(y0):
    """y' = y: the slope is the state itself, which must not be overwritten."""
    with torch.no_grad():
        found = ode.solve(lambda t, y: y, y0, [0.0, 1.0], **TIGHT)
    torch.testing.assert_close(found.ys[-1], y0 * torch.e, rtol=1e-6, atol=0)


@pytest.mark.parametrize("more", [
    {"norm": lambda r: r.abs().amax()}, {"norm": lambda r: r.square().mean().sqrt()},
])  # fmt: skip
def test_a_norm_of_the_user(y0, more):
    with torch.no_grad(), Calls() as calls:
        found = ode.solve(lambda t, y: -y, y0, [0.0, 1.0], **TIGHT, **more)
    assert calls.names.count("pyflowkern::rk_last") == 0
    assert found.ok
    torch.testing.assert_close(found.ys[-1], y0 / torch.e, rtol=1e-5, atol=0)


def test_a_tolerance_for_each_entry(y0):
    both = (y0.double(), y0.double())
    with torch.no_grad():
        found = ode.solve(
            lambda t, s: (-s[0], -s[1]), both, [0.0, 1.0], rtol=(1e-9, 1e-3), atol=(1e-9, 1e-3)
        )
        plain = ode.solve(lambda t, s: (-s[0], -s[1]), both, [0.0, 1.0], rtol=1e-9, atol=1e-9)
    assert found.stats == plain.stats  # the tighter tolerance determines the steps


def test_a_tableau_of_many_stages(y0):
    """Forty midpoint steps as one method, which has more slopes than the kernels take."""
    n = 40
    rows = [(), *((2 / n,) * i for i in range(1, n))]
    many = ode.Tableau("many", 1, tuple(tuple(r[:i]) for i, r in enumerate(rows)), (1 / n,) * n,
                       tuple(2 * i / n for i in range(n)))  # fmt: skip
    s = ode.solve(lambda t, y: torch.ones_like(y), y0, [0.0, 1.0], method=many, step_size=0.5)
    torch.testing.assert_close(s.ys[-1], y0 + 1)


def test_only_the_kernels_copy_slopes(y0):
    with torch.no_grad(), Calls() as calls:
        s = ode.solve(lambda t, y: -y, y0, [0.0, 1.0], max_step=0.1, rtol=1.0, atol=1.0)
    steps = s.stats.accepted
    assert steps >= 10
    assert calls.names.count("aten::copy_") <= 5  # the first slope and the outputs
