"""Captured solves as far as they can be tested without a GPU: checks of arguments, inputs and outputs of a replay."""

import pytest
import torch
from laws import normal

from pyflowkern import ode
from pyflowkern.ode import graphs

Y0 = torch.ones(2, 3).double()


def decay(t, y):
    return -y


def test_wrong_arguments():
    for error, message, call in (
        (ValueError, "CUDA device, got cpu", lambda: ode.capture(decay, Y0, [0.0, 1.0])),
        (ValueError, "needs step_size", lambda: ode.capture(decay, Y0, [0, 1], method="dopri5")),
        (ValueError, "method", lambda: ode.capture(decay, Y0, [0.0, 1.0], method="rk7")),
        (TypeError, "func must be callable", lambda: ode.capture(None, Y0, [0.0, 1.0])),
        (TypeError, "y0 must be", lambda: ode.capture(decay, [1.0], [0.0, 1.0])),
        (TypeError, "floating-point", lambda: ode.capture(decay, Y0.long(), [0.0, 1.0])),
        (
            ValueError,
            "require a gradient",
            lambda: ode.capture(decay, Y0.clone().requires_grad_(), [0.0, 1.0]),
        ),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.fixture
def recorder(monkeypatch):
    """In place of a CUDA graph: a replay runs the solve again and writes into the same memory."""

    def record(first, run, device):
        first()
        solution = run()

        def replay():
            again = run()
            pairs = zip(graphs._entries(solution.ys), graphs._entries(again.ys), strict=True)
            for old, new in pairs:
                old.copy_(new)

        return replay, solution

    monkeypatch.setattr(graphs, "_record", record)
    monkeypatch.setattr(graphs, "_check_device", lambda y: None)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_a_replay_is_a_solve(recorder, method):
    settings = {"method": method, "step_size": 0.1}
    captured = ode.capture(decay, Y0, torch.tensor([0.0, 0.5, 1.0]), **settings)
    starts = [normal(2, 3, seed=i) for i in (0, 1)]
    found = [captured(y0) for y0 in starts]
    for s, y0 in zip(
        found, starts, strict=True
    ):  # the second call does not touch the first result
        expected = ode.solve(decay, y0, [0.0, 0.5, 1.0], **settings)
        assert torch.equal(s.ys, expected.ys)
        assert s.stats == expected.stats


def test_tuples(recorder):
    def field(t, state):
        return -state[0], state[1]

    start = (normal(2, 3), normal(2, seed=1))
    captured = ode.capture(field, (Y0, Y0[:, 0]), [0.0, 1.0], step_size=0.1)
    expected = ode.solve(field, start, [0.0, 1.0], method="rk4", step_size=0.1)
    for a, b in zip(captured(start).ys, expected.ys, strict=True):
        assert torch.equal(a, b)
    for wrong in (Y0, (Y0,)):
        with pytest.raises(TypeError, match="a tuple of 2"):
            captured(wrong)


def test_states_that_differ_from_the_captured_one(recorder):
    captured = ode.capture(decay, Y0, [0.0, 1.0])
    for error, message, y0 in (
        (ValueError, "captured shape", Y0[0]),
        (ValueError, "captured dtype", Y0.float()),
        (ValueError, "captured device", Y0.to("meta")),
        (TypeError, "a tensor", (Y0,)),
        (TypeError, "tensor", 1.0),
    ):
        with pytest.raises(error, match=message):
            captured(y0)


def test_more_steps_than_allowed(recorder):
    with pytest.raises(ValueError, match="max_steps must allow for all steps, got 3"):
        ode.capture(decay, Y0, [0.0, 1.0], step_size=0.1, max_steps=3)


def test_parameters_that_move_are_noticed(recorder):
    net = torch.nn.Linear(3, 3).double().requires_grad_(False)
    factor = torch.ones(3).double()
    captured = ode.capture(lambda t, y: factor * net(y), Y0, [0.0, 1.0], step_size=0.5)
    before = captured(Y0).ys
    net.weight.add_(1.0)  # in place: seen
    factor.mul_(2.0)
    assert not torch.equal(captured(Y0).ys, before)
    for tensor in (net.weight, factor):
        place = tensor.data
        tensor.data = tensor + 1.0
        with pytest.raises(
            RuntimeError, match="has other memory than when the solve was captured"
        ):
            captured(Y0)
        tensor.data = place
        captured(Y0)
