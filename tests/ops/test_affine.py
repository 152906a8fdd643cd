"""affine and affine_coupling: every map, layout and split against float64, autograd and the Jacobian."""

import itertools

import pytest
import torch
from laws import jacobian_log_det, law, normal

from pyflowkern.core.codes import AffineFlag, ParamsLayout, ScaleKind
from pyflowkern.ops import (
    ScaleMap,
    affine,
    affine_coupling,
    affine_coupling_reference,
    affine_reference,
    channel_split_sizes,
    checkerboard_mask,
    scale_map,
)

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
MAPS = [
    "exp",
    "tanh",
    "atan",
    "sigmoid",
    "softplus",
    "softclip",
    "additive",
    ScaleMap("exp", gain=0.5, offset=-1e-10, eps=1e-10),  # torchflows
    ScaleMap("sigmoid", offset=2.0, eps=1e-3),  # nflows
    ScaleMap("sigmoid", offset=2.0, divide=True),  # normflows
    ScaleMap("sigmoid", offset=2.0, shift_first=True),  # glow-pytorch
    ScaleMap("softplus", eps=1e-3, max_scale=3.0),  # nflows, clamped
    ScaleMap("softplus", shift_first=True, divide=True),
    ScaleMap("tanh", clamp=1.9, gain=0.19),  # FrEIA, AllInOneBlock
    ScaleMap("atan", clamp=1.9, gain=1.9),  # FrEIA, GLOWCouplingBlock
]
LAYOUTS = [a + b for a in ("blocked", "interleaved", "feature_major") for b in ("", "_raw_first")]
SHAPES = [
    (3, 2),
    (1, 129),
    (127, 3),
    (4, 1000),
    (2, 3, 7),
    (2, 5, 3, 3),
    (2, 12, 8, 8),
    (0, 4, 2, 2),
]


def params_for(x, smap, layout, split, swap):
    n, c, *space = x.shape
    per = 1 if scale_map(smap).kind == "additive" else 2
    moved = channel_split_sizes(c, swap)[1] if isinstance(split, str) and split == "channel" else c
    shape = (n, moved, *space, per) if layout.startswith("feature") else (n, per * moved, *space)
    return normal(*shape, seed=1, dtype=x.dtype)


def check(x, params, **options):
    """Value and gradients against float64, within twice the error of plain PyTorch at that dtype."""
    law(
        lambda a, b: affine_coupling(a, b, **options),
        lambda a, b: affine_coupling_reference(a, b, **options),
        (x, params),
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("smap", MAPS, ids=str)
def test_every_scale_map(backend, smap, dtype):
    x = normal(2, 5, 3, 7, dtype=dtype)
    for inverse, save in itertools.product((False, True), ("input", "output")):
        if save == "output" and dtype in (torch.bfloat16, torch.float16):
            continue  # the output is rounded to 8 or 11 bits: what it gives back is not the input
        p = params_for(x, smap, "blocked", "channel", False)
        check(x, p, scale_map=smap, inverse=inverse, save=save)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("split", ["channel", "checkerboard", "mask"])
def test_every_layout(backend, layout, channels_last, split):
    for shape, swap, smap in itertools.product(
        [(2, 6, 8, 8), (3, 5, 3, 5)], (False, True), ("tanh", "additive")
    ):
        x = normal(*shape)
        where = normal(*shape[1:], seed=3) > 0 if split == "mask" else split
        p = params_for(x, smap, layout, where, swap)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
            p = p.contiguous(memory_format=torch.channels_last) if p.dim() == 4 else p
        options = {"split": where, "swap": swap, "scale_map": smap, "params_layout": layout}
        check(x, p, **options)


def test_kernels_keep_channels_last():
    x = normal(2, 6, 8, 8).contiguous(memory_format=torch.channels_last)
    for split in ("channel", "checkerboard"):
        y, _ = affine_coupling(x, params_for(x, "tanh", "blocked", split, False), split=split)
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_awkward_shapes(backend, shape, dtype):
    x = normal(*shape, dtype=dtype)
    for layout in ("blocked", "interleaved"):
        check(x, params_for(x, "tanh", layout, "channel", False), params_layout=layout)


def test_any_strides(backend):
    """Expanded, sliced, transposed and unaligned inputs give what their copies give."""
    base = normal(4, 7, 6, 5, dtype=torch.float32)
    inputs = [
        base[:, 1:5],
        base[:, :, 1::2],
        base.transpose(2, 3),
        base[:1].expand(3, 7, 6, 5),
        normal(4 * 7 * 6 * 5 + 1, dtype=torch.float32)[1:].view(4, 7, 6, 5),
    ]
    for x in inputs:
        p = params_for(x, "tanh", "blocked", "channel", False)
        wide = torch.cat([p, p], 1)[:, : p.shape[1]]
        for a, b in zip(affine_coupling(x, wide), affine_coupling(x.clone(), p), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_channel_mask_takes_parameters_of_the_transformed_alone(backend):
    x, mask = normal(3, 5), torch.tensor([True, False, True, True, False])
    for layout, swap in itertools.product(LAYOUTS, (False, True)):
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
    x = normal(3, 6, 5, 5)
    p = params_for(x, smap, "blocked", "channel", False)
    y, log_det = affine_coupling(x, p, scale_map=smap)
    back, minus = affine_coupling(y, p, scale_map=smap, inverse=True)
    torch.testing.assert_close(back, x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(minus, -log_det)


@pytest.mark.parametrize("smap", MAPS, ids=str)
def test_log_det_is_that_of_the_jacobian(backend, smap):
    x = normal(1, 3, 2, 2)
    p = params_for(x, smap, "blocked", "checkerboard", False)
    options = {"scale_map": smap, "split": "checkerboard"}
    _, log_det = affine_coupling(x, p, **options)
    expected = jacobian_log_det(lambda v: affine_coupling(v, p, **options)[0], x)
    torch.testing.assert_close(log_det, expected)


def test_affine_broadcasts_its_parameters(backend):
    x, u, t = normal(4, 3, 5), normal(3, 1, seed=1), normal(5, seed=2)
    law(affine, affine_reference, (x, u, t))
    law(
        lambda a, b: affine(a, None, b, scale_map="additive"),
        lambda a, b: (a + b, torch.zeros(4).double()),
        (x, t),
    )


def test_affine_computes_in_the_widest_dtype(backend):
    """As affine_coupling does: y has the dtype of x, the log-det that of the parameters."""
    x, u, t = normal(4, 50, dtype=torch.bfloat16), normal(4, 50, seed=1), normal(4, 50, seed=2)
    for dtype in (torch.float32, torch.float64):
        law(affine, affine_reference, (x, u.to(dtype), t.to(dtype)))
        y, log_det = affine(x, u.to(dtype), t.to(dtype))
        assert (y.dtype, log_det.dtype) == (torch.bfloat16, dtype)
        torch.testing.assert_close(log_det, u.to(dtype).sum(1))


@pytest.mark.parametrize("bad", [{"raw_scale": 0.0}, {"shift": 0}], ids=str)
def test_affine_wants_tensors(bad):
    x = torch.zeros(2, 3)
    with pytest.raises(TypeError, match="must be a torch"):
        affine(x, **({"raw_scale": x, "shift": x} | bad))


def test_affine_of_nothing(backend):
    x = torch.zeros(0, 3, requires_grad=True)
    for function in (affine, affine_reference):
        _, log_det = function(x, x, x)
        (grad,) = torch.autograd.grad(log_det.sum(), x, create_graph=True)
        assert log_det.shape == (0,)
        assert grad.shape == (0, 3)


def test_softplus_far_right_has_a_gradient(backend):
    u = torch.tensor([[88.0, 100.0, 1e4]], requires_grad=True)
    for function in (affine, affine_reference):
        _, log_det = function(torch.ones(1, 3), u, torch.zeros(1, 3), scale_map="softplus")
        (grad,) = torch.autograd.grad(log_det.sum(), u)
        torch.testing.assert_close(grad, 1 / u)  # of log(u + eps)


def test_gradgradcheck(backend):
    x, p = normal(2, 4, 3).requires_grad_(), normal(2, 4, 3, seed=1).requires_grad_()
    u = normal(2, 4, 3, seed=2).requires_grad_()
    for smap, inverse, save in itertools.product(MAPS[:7], (False, True), ("input", "output")):
        if smap == "additive":
            continue  # its log-det is constant

        def coupling(a, b, smap=smap, inverse=inverse, save=save):
            return affine_coupling(a, b, scale_map=smap, inverse=inverse, save=save)

        torch.autograd.gradcheck(coupling, (x, p))
        torch.autograd.gradgradcheck(coupling, (x, p))
    torch.autograd.gradgradcheck(lambda a, b, c: affine(a, b, c), (x, u, p))


def test_partial_derivatives_when_parameters_depend_on_the_input(backend):
    """Second derivatives through a coupling whose parameters a network computes from its passing half."""
    x = normal(2, 4).requires_grad_()
    weight = normal(4, 2, seed=1).requires_grad_()

    def layer(v, w):
        return affine_coupling(v, torch.tanh(v[:, :2] @ w.t()))

    torch.autograd.gradgradcheck(layer, (x, weight))


def test_bad_sample_stays_alone(backend):
    x = normal(3, 6, 4, 4, dtype=torch.float32)
    p = params_for(x, "tanh", "blocked", "channel", False)
    good = affine_coupling(x, p)
    for poison in (torch.nan, torch.inf):
        bad = p.clone()
        bad[1] = poison
        y, log_det = affine_coupling(x, bad)
        assert torch.equal(y[[0, 2]], good[0][[0, 2]])
        assert torch.equal(log_det[[0, 2]], good[1][[0, 2]])
        assert not torch.isfinite(y[1, 3:]).any()
        assert torch.equal(y[1, :3], x[1, :3])


def test_unused_parameters_cannot_do_harm(backend):
    x, mask = normal(2, 3, 4, 4), checkerboard_mask((3, 4, 4))
    p = params_for(x, "tanh", "blocked", "checkerboard", False)
    p = torch.where(torch.cat([mask, mask]), p, torch.nan).requires_grad_()
    x.requires_grad_()
    y, log_det = affine_coupling(x, p, split="checkerboard")
    gx, gp = torch.autograd.grad(y.sum() + log_det.sum(), (x, p))
    for t in (y, log_det, gx, gp):
        assert torch.isfinite(t).all()


def test_extreme_parameters_stay_finite(backend):
    x = normal(2, 4, dtype=torch.float32)
    for size, smap in itertools.product((1e2, 1e4, 1e30), ("tanh", "atan", "softclip")):
        p = size * params_for(x, smap, "blocked", "channel", False).requires_grad_()
        y, log_det = affine_coupling(x, p, scale_map=smap)
        (grad,) = torch.autograd.grad(y.sum() + log_det.sum(), p)
        for t in (log_det, grad[:, 2:]):
            assert torch.isfinite(t).all()


def test_same_bits_for_any_thread_count():
    x = normal(3, 8, 64, 64, dtype=torch.float32)
    p = params_for(x, "tanh", "blocked", "channel", False)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 1):
            torch.set_num_threads(n)
            a, b = x.clone().requires_grad_(), p.clone().requires_grad_()
            y, log_det = affine_coupling(a, b)
            results.append((y, log_det, *torch.autograd.grad(y.sum() + log_det.sum(), (a, b))))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other, strict=True))


def test_autocast_keeps_a_float32_log_det(backend):
    x = normal(2, 4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, log_det = affine_coupling(x, normal(2, 4, dtype=torch.bfloat16))
    assert y.dtype == log_det.dtype == torch.float32
    assert affine_coupling(x.bfloat16(), x.bfloat16())[1].dtype == torch.float32


def test_save_output_keeps_no_input():
    x, p = normal(2, 4).requires_grad_(), normal(2, 4, seed=1).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.data_ptr()) or t, lambda t: t
    ):
        y, _ = affine_coupling(x, p, save="output")
    assert y.data_ptr() in kept
    assert x.data_ptr() not in kept


def test_opcheck():
    x, p, numbers = normal(2, 4, 3, 3), normal(2, 4, 3, 3, seed=1), scale_map("tanh").numbers
    ops = torch.ops.pyflowkern
    mask = checkerboard_mask((4, 3, 3))
    full = torch.cat([p, p], 1)
    x.requires_grad_()
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    tanh, inverse = ScaleKind.TANH.value, AffineFlag.INVERSE.value
    blocked, interleaved = ParamsLayout.BLOCKED.value, ParamsLayout.INTERLEAVED.value
    for args in (
        (x, p, None, blocked, tanh, numbers, 0),
        (x, p, None, interleaved, tanh, numbers, inverse),
        (x, full, mask, blocked, tanh, numbers, 0),
        (last, p, None, blocked, tanh, numbers, 0),
    ):
        torch.library.opcheck(ops.affine_coupling.default, args)
    x, u, t = (normal(2, 4, 3, seed=i).requires_grad_() for i in range(3))
    torch.library.opcheck(ops.affine.default, (x, u, t, ScaleKind.EXP.value, numbers, 0))
    torch.library.opcheck(ops.affine.default, (x, None, t, ScaleKind.ADDITIVE.value, numbers, 0))


@pytest.mark.slow
def test_compiles_whole():
    x, p = normal(2, 4, 3, 3, dtype=torch.float32), normal(2, 4, 3, 3, seed=1, dtype=torch.float32)

    def step(a, b):
        y, log_det = affine_coupling(a, b)
        z, more = affine_coupling(
            y, b, split="checkerboard", scale_map="additive", params_layout="blocked"
        )
        return z.sum() + (log_det + more).sum()

    compiled = torch.compile(step, fullgraph=True)
    grads = []
    for f in (step, compiled):
        a, b = x.clone().requires_grad_(), p.clone().requires_grad_()
        grads.append(torch.autograd.grad(f(a, b), (a, b)))
    torch.testing.assert_close(grads[0], grads[1])


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
