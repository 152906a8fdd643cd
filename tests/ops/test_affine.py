"""affine and affine_coupling: every map, layout and split against float64, autograd and the Jacobian."""

import itertools

import pytest
import torch
from cases.affine import MAPS, PARAMS, coupling
from laws import normal

from pyflowkern.ops import (
    ScaleMap,
    affine,
    affine_coupling,
    affine_coupling_reference,
    affine_reference,
    checkerboard_mask,
)


def test_kernels_keep_channels_last():
    x = normal(2, 6, 8, 8).contiguous(memory_format=torch.channels_last)
    for split in ("channel", "checkerboard"):
        y, _ = affine_coupling(x, coupling(x.shape, split=split).tensors["params"], split=split)
        assert y.is_contiguous(memory_format=torch.channels_last)


def test_channel_mask_takes_parameters_of_the_transformed_alone(backend):
    x, mask = normal(3, 5), torch.tensor([True, False, True, True, False])
    for layout, swap in itertools.product(PARAMS, (False, True)):
        size = int((mask ^ swap).sum())
        p = (
            normal(3, size, 2, seed=2)
            if layout.startswith("feature")
            else normal(3, 2 * size, seed=2)
        )
        options = {"split": mask, "swap": swap, "params_layout": layout}
        y, log_det = affine_coupling(x, p, **options)
        expected = affine_coupling_reference(x, p, **options)
        torch.testing.assert_close((y, log_det), expected)
        assert torch.equal(y[:, ~(mask ^ swap)], x[:, ~(mask ^ swap)])


@pytest.mark.parametrize("smap", MAPS, ids=str)
def test_inverse_undoes_forward(backend, smap):
    x, p = coupling((3, 6, 5, 5), smap=smap).tensors.values()
    y, log_det = affine_coupling(x, p, scale_map=smap)
    back, minus = affine_coupling(y, p, scale_map=smap, inverse=True)
    torch.testing.assert_close(back, x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(minus, -log_det)


def test_softplus_far_right_has_a_gradient(backend):
    u = torch.tensor([[88.0, 100.0, 1e4]], requires_grad=True)
    for function in (affine, affine_reference):
        _, log_det = function(torch.ones(1, 3), u, torch.zeros(1, 3), scale_map="softplus")
        (grad,) = torch.autograd.grad(log_det.sum(), u)
        torch.testing.assert_close(grad, 1 / u)  # of log(u + eps)


def test_unused_parameters_cannot_do_harm(backend):
    x, p = coupling((2, 3, 4, 4), split="checkerboard").tensors.values()
    mask = checkerboard_mask((3, 4, 4))
    p = torch.where(torch.cat([mask, mask]), p, torch.nan).requires_grad_()
    x.requires_grad_()
    y, log_det = affine_coupling(x, p, split="checkerboard")
    gx, gp = torch.autograd.grad(y.sum() + log_det.sum(), (x, p))
    for t in (y, log_det, gx, gp):
        assert torch.isfinite(t).all()


def test_extreme_parameters_stay_finite(backend):
    x = normal(2, 4, dtype=torch.float32)
    for size, smap in itertools.product((1e2, 1e4, 1e30), ("tanh", "atan", "softclip")):
        p = size * coupling((2, 4), torch.float32, smap).tensors["params"].requires_grad_()
        y, log_det = affine_coupling(x, p, scale_map=smap)
        (grad,) = torch.autograd.grad(y.sum() + log_det.sum(), p)
        for t in (log_det, grad[:, 2:]):
            assert torch.isfinite(t).all()


def test_save_output_keeps_no_input():
    x, p = normal(2, 4).requires_grad_(), normal(2, 4, seed=1).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.data_ptr()) or t, lambda t: t
    ):
        y, _ = affine_coupling(x, p, save="output")
    assert y.data_ptr() in kept
    assert x.data_ptr() not in kept


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(2, 4, dtype=torch.int64)}, TypeError, "x must be a floating-point"),
        ({"x": torch.zeros(4)}, ValueError, "batch axis"),
        ({"x": torch.zeros(2, 1)}, ValueError, "at least 2 channels"),
        ({"params": torch.zeros(2, 3)}, ValueError, r"params must have shape \(2, 4\)"),
        ({"params": torch.zeros(3, 4)}, ValueError, r"got \(3, 4\)"),
        ({"split": "rows"}, ValueError, "split must be"),
        ({"split": torch.ones(4)}, TypeError, "a boolean tensor"),
        ({"split": torch.ones(3, dtype=torch.bool)}, ValueError, r"\(4,\)"),
        ({"split": "checkerboard"}, ValueError, "checkerboard needs"),
        ({"scale_map": "cosine"}, ValueError, "scale_map must be"),
        ({"params_layout": "rows"}, ValueError, "params_layout must be"),
        ({"save": "nothing"}, ValueError, "save must be"),
    ],
)
def test_bad_arguments(change, error, words):
    arguments = {"x": torch.zeros(2, 4), "params": torch.zeros(2, 4)} | change
    with pytest.raises(error, match=words):
        affine_coupling(**arguments)


@pytest.mark.parametrize(
    "numbers",
    [
        {"clamp": 0.0},
        {"eps": -1.0},
        {"kind": "tanh", "eps": 0.1},
        {"kind": "tanh", "max_scale": 2.0},
    ],
)
def test_bad_scale_maps(numbers):
    with pytest.raises(ValueError, match=r"must be|belongs"):
        ScaleMap(**({"kind": "exp"} | numbers))
