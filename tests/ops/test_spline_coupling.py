"""spline_coupling: splits, layouts, and what torch asks of an op."""

import itertools

import pytest
import torch
from cases.spline import SPLITS, coupling
from laws import law, normal

from pyflowkern.ops import (
    SplineMap,
    checkerboard_mask,
    rational_quadratic_spline,
    spline,
    spline_coupling,
    spline_coupling_reference,
)

SMAP = SplineMap(bins=4)


def test_what_passes_is_untouched(backend):
    for split, swap in itertools.product(SPLITS, (False, True)):
        sample = coupling(split, (3, 6, 4, 4), swap, torch.float32)
        (x, p), where = sample.tensors.values(), sample.fixed["split"]
        y, log_det = spline_coupling(x, p, SMAP, split=where, swap=swap)
        mask = checkerboard_mask((6, 4, 4)) if split == "checkerboard" else where
        if split == "channel":
            mask = torch.arange(6) >= 3
        mask = (mask if mask.dim() == 3 else mask.view(-1, 1, 1)).expand(6, 4, 4) ^ swap
        assert torch.equal(y[:, ~mask], x[:, ~mask])
        assert not torch.equal(y[:, mask], x[:, mask])
        back, minus = spline_coupling(y, p, SMAP, split=where, swap=swap, inverse=True)
        torch.testing.assert_close(back, x, rtol=0, atol=1e-4)  # slopes as small as 1e-2
        torch.testing.assert_close(minus, -log_det, rtol=1e-3, atol=1e-3)


def test_full_mask_over_channels(backend):
    """Parameters for every channel, of which those that pass are not read."""
    x, mask = normal(3, 5), torch.tensor([True, False, True, True, False])
    p = normal(3, 5 * SMAP.params, seed=1)
    law(
        lambda a, b: spline_coupling(a, b, SMAP, split=mask),
        lambda a, b: spline_coupling_reference(a, b, SMAP, split=mask),
        (x, p),
    )
    compact = p.view(3, 5, -1)[:, mask].reshape(3, -1)
    for a, b in zip(
        spline_coupling(x, p, SMAP, split=mask),
        spline_coupling(x, compact, SMAP, split=mask),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("space", [(0,), (0, 2), (2, 0)])
def test_images_without_pixels_change_no_volume(backend, space):
    """Also where parameters are of the transformed channels alone."""
    mask = torch.tensor([True, False, True])
    for channels in (2, 3):
        x = torch.zeros(4, 3, *space, requires_grad=True)
        p = torch.zeros(4, channels * SMAP.params, *space, requires_grad=True)
        y, log_det = spline_coupling(x, p, SMAP, split=mask)
        assert y.shape == x.shape
        assert torch.equal(log_det, torch.zeros(4))
        (y.sum() + log_det.sum()).backward()
        assert x.grad.shape == x.shape
        assert p.grad.shape == p.shape


def test_unused_parameters_cannot_do_harm(backend):
    x, p = coupling("checkerboard", (2, 3, 4, 4), False).tensors.values()
    mask = checkerboard_mask((3, 4, 4))
    rows = p.view(2, 3, SMAP.params, 4, 4)
    p = torch.where(mask.unsqueeze(1), rows, torch.nan).view_as(p).requires_grad_()
    x.requires_grad_()
    y, log_det = spline_coupling(x, p, SMAP, split="checkerboard")
    gx, gp = torch.autograd.grad(y.sum() + log_det.sum(), (x, p))
    for t in (y, log_det, gx, gp):
        assert torch.isfinite(t).all()
    assert not gp.view(2, 3, SMAP.params, 4, 4).masked_select(~mask.unsqueeze(1)).any()


def test_coupling_is_the_spline_of_its_part(backend):
    x, p = coupling("channel", (4, 6), False, torch.float32).tensors.values()
    y, log_det = spline_coupling(x, p, SMAP)
    part, same = spline(x[:, 3:], p.view(4, 3, -1), SMAP)
    assert torch.equal(y[:, 3:], part)
    torch.testing.assert_close(log_det, same)


# --- what torch asks of an op -------------------------------------------------------------------------------


def test_memory_kept_is_that_of_the_inputs():
    x, p = normal(64, 8).requires_grad_(), normal(64, 8, SMAP.params).requires_grad_()
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.data_ptr(), t.nbytes) and t, lambda t: t
    ):
        spline(x, p, SMAP)
    assert sum(kept.values()) == x.nbytes + p.nbytes


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(2, 4, dtype=torch.int64)}, TypeError, "x must be a floating-point"),
        ({"x": torch.zeros(4)}, ValueError, "batch axis"),
        ({"params": torch.zeros(2, 21)}, ValueError, r"params must have shape \(2, 22\)"),
        ({"params": torch.zeros(2, 22).long()}, TypeError, "params must be a floating"),
        ({"spline_map": "rational_quadratic"}, TypeError, "must be a SplineMap, got str"),
        ({"split": "rows"}, ValueError, "split must be"),
        ({"split": torch.ones(4)}, TypeError, "a boolean tensor"),
        ({"split": torch.ones(4).bool()}, ValueError, r"params must have shape \(2, 44\)"),
    ],
)
def test_bad_arguments(change, error, words):
    arguments = {"x": torch.zeros(2, 4), "params": torch.zeros(2, 22), "spline_map": SMAP}
    with pytest.raises(error, match=words):
        spline_coupling(**(arguments | change))


def test_bad_shapes_of_parts():
    x, w, d = torch.zeros(2, 3), torch.zeros(2, 3, 4), torch.zeros(2, 3, 3)
    for parts, words in (
        ((w[:1], w, d), "widths must have the shape of x"),
        ((w, w[..., :3], d), r"heights must have shape \(2, 3, 4\)"),
        ((w, w, w), r"derivatives must have shape \(2, 3, 3\)"),
        ((torch.zeros(2, 3, 65), torch.zeros(2, 3, 65), d), "bins must be from 2 to 64"),
    ):
        with pytest.raises(ValueError, match=words):
            rational_quadratic_spline(x, *parts)
    with pytest.raises(ValueError, match="params must have shape"):
        spline(x, w, SMAP)
