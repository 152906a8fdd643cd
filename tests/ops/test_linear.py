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


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": torch.ones(3)}, ValueError, "x must have a batch axis"),
        ({"x": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "x must be a floating-point"),
        ({"weight": torch.ones(3, 4)}, ValueError, r"weight must have shape \(3, 3\)"),
        ({"weight": torch.ones(3, 3, dtype=torch.int64)}, TypeError, "weight must be"),
        ({"weight": 1.0}, TypeError, "weight must be a torch.Tensor"),
        ({"log_abs_det": torch.ones(2)}, ValueError, r"log_abs_det must have shape \(\)"),
        ({"bias": torch.ones(2)}, ValueError, r"bias must have shape \(3,\)"),
        ({"log_scale": torch.ones(3, 1)}, ValueError, r"log_scale must have shape \(3,\)"),
        ({"bias": torch.ones(3, device="meta")}, ValueError, "one device"),
    ],
)
def test_bad_input(backend, change, error, match):
    args = {
        "x": torch.ones(2, 3),
        "log_scale": torch.zeros(3),
        "bias": torch.zeros(3),
        "weight": torch.eye(3),
        "log_abs_det": torch.tensor(0.0),
        **change,
    }
    with pytest.raises(error, match=match):
        glow_step(**args)
    if "log_scale" not in change:
        del args["log_scale"]
        with pytest.raises(error, match=match):
            invertible_linear(**args)
