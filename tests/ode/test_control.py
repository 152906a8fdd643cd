"""Step control: the same evaluations as torchdiffeq, and a step size for each sample."""

import math

import pytest
import torch
from laws import normal
from torch import nn

from pyflowkern import ode
from pyflowkern.ode.norms import Rms
from pyflowkern.ode.options import Options
from pyflowkern.ode.step_control import StepControl
from pyflowkern.ode.tableaus import TABLEAUS

ADAPTIVE = ["bosh3", "dopri5", "dopri8", "tsit5"]


class Pendulum(nn.Module):
    """y'' = -sin y - 0.1 y' + cos 3t, counting its evaluations."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def forward(self, t, y):
        self.count += 1
        a, v = y[..., 0], y[..., 1]
        return torch.stack([v, -torch.sin(a) - 0.1 * v + torch.cos(3 * t)], -1)


SPANS = ([0.0, 5.0], [0.0, 0.7, 0.71, 4.0, 9.0], [1.0, -3.0])
TOLERANCES = ({"rtol": 1e-4, "atol": 1e-5}, {"rtol": 1e-7, "atol": 1e-9})
# evaluations of torchdiffeq 0.2.5, by method, tolerance and span
RECORDED = {
    "bosh3": [257, 473, 200, 2924, 5621, 2459],
    "dopri5": [104, 182, 86, 374, 686, 290],
    "dopri8": [80, 132, 67, 223, 392, 184],
}


@pytest.mark.parametrize("method", ["bosh3", "dopri5", "dopri8"])
def test_evaluations_are_those_of_torchdiffeq(method):
    y0, counts = normal(7, 2), []
    for tolerance in TOLERANCES:
        for span in SPANS:
            field = Pendulum()
            s = ode.solve(field, y0, span, method=method, compat="torchdiffeq", **tolerance)
            assert s.stats.evaluations == field.count
            counts.append(field.count)
    assert counts == RECORDED[method]


@pytest.mark.parametrize(
    "method", ["bosh3", "dopri5", "dopri8", "rk4", "euler", "midpoint", "heun2"]
)
def test_steps_and_results_are_those_of_torchdiffeq(method):
    import torchdiffeq as theirs

    y0 = normal(7, 2)

    class Steps(Pendulum):
        def __init__(self):
            super().__init__()
            self.accepted = []

        def callback_accept_step(self, t0, y0, dt):
            self.accepted.append((t0.item(), dt.item()))

    for tolerance in TOLERANCES:
        for span in SPANS:
            if method == "heun2" or method in ("rk4", "euler", "midpoint"):
                options = {"step_size": 0.3}
                field, ours = Pendulum(), Pendulum()
                a = theirs.odeint(
                    field,
                    y0,
                    torch.tensor(span, dtype=torch.float64),
                    method=method,
                    options=options,
                )
                b = ode.odeint(ours, y0, span, method=method, compat="torchdiffeq", step_size=0.3)
                assert ours.count == field.count
                torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)
                continue
            field = Steps()
            a = theirs.odeint(
                field, y0, torch.tensor(span, dtype=torch.float64), method=method, **tolerance
            )
            s = ode.solve(Pendulum(), y0, span, method=method, compat="torchdiffeq", **tolerance)
            assert s.stats.evaluations == field.count
            assert s.stats.accepted == len(field.accepted)
            # the error of a small step is a difference of nearly equal numbers: rounding changes the step sizes
            # and so, by a fraction of the tolerance, the results
            near = 0.1 * tolerance["rtol"]
            torch.testing.assert_close(s.ys, a, rtol=near, atol=near)


@pytest.mark.parametrize("method", ADAPTIVE[:-1])  # torchdiffeq has no tsit5
def test_the_norm_of_a_tuple_is_the_largest_of_its_entries(method):
    import torchdiffeq as theirs

    counts = []

    def field(t, state):
        counts.append(1)
        return -state[0], torch.cos(5 * t) * torch.ones_like(state[1]) * 30

    state = (normal(5, 3), torch.zeros(5).double())
    theirs.odeint(field, state, torch.tensor([0.0, 2.0]).double(), method=method)
    expected = len(counts)
    s = ode.solve(field, state, [0.0, 2.0], method=method, compat="torchdiffeq")
    assert s.stats.evaluations == expected


@pytest.mark.parametrize("control", ["batch", "device", "sample"])
def test_a_last_step_of_the_smallest_size_is_accepted(control):
    """By rounding t + 0.3 is 9 but 9 - t exceeds 0.3: the last step must not be rejected for ever."""
    y0, t = torch.ones(2, 2).double(), 9 - 0.3
    assert t + 0.3 == 9
    assert 9 - t > 0.3
    s = ode.solve(
        lambda t, y: 1e3 * torch.cos(1e3 * t) * torch.ones_like(y) if t.dim() == 0 else 1e3 * y.cos(),
        y0, [t, 9.0], control=control, min_step=0.3, first_step=0.3,
    )  # fmt: skip
    assert s.ok
    assert s.stats.accepted == 1


# --- a step size for each sample -----------------------------------------------------------------


def stiffness(rates):
    def field(t, y):
        return -rates[:, None] * (y - torch.sin(t)[:, None])

    return field


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("check_every", [1, 8])
def test_samples_are_solved_as_if_they_were_alone(method, check_every):
    """One fast sample and slow ones: each result is what the sample gives alone, bit for bit."""
    rates = torch.tensor([0.1, 1.0, 100.0, 3.0]).double()
    y0, ts = normal(4, 3), [0.0, 0.4, 1.0]
    settings = {"method": method, "control": "sample", "check_every": check_every, "rtol": 1e-6}
    together = ode.solve(stiffness(rates), y0, ts, **settings)
    assert together.ok
    assert together.status.shape == (4,)
    for i in range(4):
        alone = ode.solve(stiffness(rates[i : i + 1]), y0[i : i + 1], ts, **settings)
        torch.testing.assert_close(together.ys[:, i], alone.ys[:, 0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_each_sample_may_have_its_own_times(method):
    ts = torch.tensor([[0.0, 1.0, 0.0, 2.0], [0.5, 0.5, 0.0, 3.0], [1.0, -1.0, 0.0, 3.0]]).double()
    s = ode.solve(lambda t, y: -y, torch.ones(4, 2).double(), ts, method=method, control="sample")
    assert s.ok
    expected = torch.exp(ts[0] - ts)[..., None].expand(3, 4, 2)
    torch.testing.assert_close(s.ys, expected, rtol=1e-5, atol=0)


def test_a_bad_sample_changes_nothing_in_the_others():
    """A NaN sample, one with a NaN field and one that explodes leave the others' results and gradients alone."""
    weight = torch.tensor(1.0).double().requires_grad_()

    def field(t, y):
        return weight * torch.where(y > 0, y * y, -y)

    good = -torch.tensor([[1.0], [0.5], [2.0]]).double()
    bad = torch.tensor([[torch.nan], [1.0]]).double()
    settings = {"control": "sample", "max_steps": 300}
    s = ode.solve(field, torch.cat([good, bad]), [0.0, 0.5, 2.0], **settings)
    alone = ode.solve(field, good, [0.0, 0.5, 2.0], **settings)
    assert s.status[:3].tolist() == [0, 0, 0]
    assert s.status[3].item() == ode.Status.non_finite
    assert s.status[4].item() != ode.Status.ok
    assert torch.isfinite(s.ys[:, 4]).all()
    torch.testing.assert_close(s.ys[:, :3], alone.ys, rtol=1e-13, atol=0)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_results_do_not_depend_on_the_threads(method):
    y0, found = normal(700, 30), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(ode.solve(lambda t, y: torch.sin(y), y0, [0.0, 1.0], method=method,
                               control="sample").ys)  # fmt: skip
    torch.set_num_threads(1)
    assert torch.equal(*found)


def test_the_norm_of_a_large_state_does_not_depend_on_the_threads():
    y0, found = normal(300, 1000, dtype=torch.float32), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(ode.solve(lambda t, y: torch.sin(y), y0, [0.0, 2.0], rtol=1e-4, atol=1e-4))
    torch.set_num_threads(1)
    assert found[0].stats == found[1].stats
    assert torch.equal(found[0].ys, found[1].ys)


# --- CUDA ----------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_fixed_steps_are_captured_as_a_graph():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    layer = nn.Linear(8, 8, device="cuda")
    x = torch.randn(16, 8, device="cuda")

    def solve():
        with torch.no_grad():
            return ode.solve(
                lambda t, y: torch.tanh(layer(y)), x, [0.0, 1.0], method="rk4", step_size=0.1
            )

    eager = solve().ys.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        solve()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = solve()
    graph.replay()
    torch.testing.assert_close(captured.ys, eager)
    assert captured.status.item() == ode.Status.ok


# --- the rules themselves ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratios", "settings"),
    [
        ([0.5, 1.0, 1.5, math.nan, 0.0, 0.3, 0.2, 2.0, 0.1, 0.9], {}),
        ([math.inf] * 40, {}),
        ([0.5] * 40, {"max_steps": 3}),
        ([7.0] * 40, {"min_step": 0.05}),
        ([0.5] * 40, {"max_step": 0.125}),
    ],
    ids=str,
)
@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_step_control_is_the_same_for_numbers_and_tensors(ratios, settings, direction):
    """The same proposals, decisions and status, whether they are numbers or tensors."""
    options = Options(TABLEAUS["dopri5"], 1e-5, 1e-5, Rms([]), **settings)
    end = 2.0 * direction
    number = StepControl(options, 0.0, end, 0.1)
    tensor = StepControl(options, torch.zeros(2).double(), end, 0.1 * torch.ones(2).double())
    for ratio in ratios:
        number.propose(end)
        tensor.propose(end, tensor.status == 0)
        assert tensor.running.tolist() == [number.running] * 2
        if not number.running:
            break
        least = settings.get("min_step", 0.0)
        allowed = ratio <= 1 or abs(number.dt) <= least
        accept = number.decide(ratio)
        assert (
            tensor.decide(torch.tensor([ratio] * 2, dtype=torch.float64)).tolist() == [accept] * 2
        )
        assert accept == allowed
        # Python and torch round powers differently
        assert tensor.t.tolist() == pytest.approx([number.t] * 2, rel=1e-14)
        assert tensor.h.tolist() == pytest.approx([number.h] * 2, rel=1e-14)
        if number.t == end:
            break
    assert tensor.status.tolist() == [int(number.status)] * 2
    expected = {"max_steps": ode.Status.max_steps}.get(next(iter(settings), ""), ode.Status.ok)
    assert number.status == (ode.Status.non_finite if ratios[0] == math.inf else expected)


def test_as_many_steps_as_torchdiffeq_takes():
    """y' = cos 3000 t to 2 takes 11,000 steps; without ``compat`` a solve ends after 10,000, and says so."""

    def wave(t, y):
        return torch.cos(3000 * t).expand(1)

    y0 = torch.zeros(1, dtype=torch.float64)
    y = ode.odeint(wave, y0, [0.0, 2.0], compat="torchdiffeq")
    assert y[-1].item() == pytest.approx(math.sin(6000) / 3000, abs=1e-6)
    with pytest.warns(RuntimeWarning, match="max_steps"):
        ode.odeint(wave, y0, [0.0, 2.0])
    s = ode.solve(wave, y0, [0.0, 1.3], compat="torchdiffeq", method="euler", step_size=1e-4)
    assert s.ok
    assert s.stats.accepted == 13_000
