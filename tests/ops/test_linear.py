"""invertible_linear and glow_step beside the laws: layouts, means that cancel, bad input."""

import pytest
import torch
from cases.linear import sample
from laws import Sample, hold

from pyflowkern.ops import glow_step, glow_step_reference, invertible_linear

KINDS = {
    "linear": (invertible_linear, {}),
    "linear without bias": (invertible_linear, {"bias": False}),
    "glow": (glow_step, {"scale": True}),
}
kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
def test_channels_last_stays(backend, kind):
    function, options = KINDS[kind]
    args = sample((4, 13, 6, 5), torch.float32, **options).tensors
    args["x"] = args["x"].to(memory_format=torch.channels_last)
    assert function(**args)[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(64, 12), (32, 12, 8, 8)], ids=str)
def test_bias_cancels_a_large_mean(backend, shape):
    """Data around 1e4 with a bias of -1e4: x + b is exact, so nothing of W (x + b) is lost."""
    args = sample(shape, torch.float32, scale=True).tensors
    args |= {"x": args["x"] + 1e4, "bias": torch.full_like(args["bias"], -1e4)}
    # folding the bias into W b would leave errors of 1e4 eps, 1e4 roundings
    hold(glow_step, glow_step_reference, Sample(args), floor=16)


@kinds
@pytest.mark.parametrize("shape", [(129, 10), (2, 7, 129), (2, 48, 5, 5)], ids=str)
def test_inverse_of_forward(backend, kind, shape):
    function, options = KINDS[kind]
    args = sample(shape, **options).tensors
    for last in (False, True) if len(shape) == 4 else (False,):
        x = args["x"].contiguous(memory_format=torch.channels_last) if last else args["x"]
        y, log_det = function(**{**args, "x": x})
        undo = {**args, "x": y, "weight": torch.linalg.inv(args["weight"])}
        back, inverse_log_det = function(**undo, inverse=True)
        # conditioned like the matrix, whose singular values lie between 0.2 and 2
        torch.testing.assert_close(back, x, rtol=0, atol=1e-12)
        assert torch.equal(inverse_log_det, -log_det)


def test_bad_input():
    for change, match in (
        ({"x": torch.ones(3)}, "x must have a batch axis"),
        ({"weight": torch.ones(3, 4)}, r"weight must have shape \(3, 3\)"),
    ):
        args = {
            "x": torch.ones(2, 3),
            "weight": torch.eye(3),
            "log_abs_det": torch.zeros(()),
            **change,
        }
        with pytest.raises(ValueError, match=match):
            invertible_linear(**args)
        with pytest.raises(ValueError, match=match):
            glow_step(**args, log_scale=torch.zeros(3), bias=torch.zeros(3))
