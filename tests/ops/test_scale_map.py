"""The parameterisations of other libraries, written as those libraries compute them, against ours.

Each row below names a layer, our options for it, and its formula ``(x, t, u) -> (y, log s)`` of the transformed
elements in plain PyTorch; the splits and the order of the parameters are theirs as well.
"""

import math

import pytest
import torch
from laws import normal
from torch import asinh, atan, exp, log, sigmoid, tanh
from torch.nn.functional import softplus

from pyflowkern.ops import ScaleMap, affine, affine_coupling, scale_map
from pyflowkern.ops.scale_map import PRESETS

C = 1.9  # a clamp that is nobody's default


def times(log_s):
    """``y = s x + t``, which all but two libraries use."""
    return lambda x, t, u: (exp(log_s(u)) * x + t, log_s(u))


def glow_pytorch(x, t, u):
    s = sigmoid(u + 2)
    return (x + t) * s, log(s)


def normflows_sigmoid(x, t, u):
    s = sigmoid(u + 2)
    return x / s + t, -log(s)


def all_in_one(x, t, u):
    """FrEIA scales the network's whole output by 0.1."""
    s = C * tanh(0.1 * u)
    return exp(s) * x + 0.1 * t, s


def torchflows(u):
    m = 1e-10
    return log(exp(math.log(1 - m) + u / 2) + m)


SIGMOID = ScaleMap("sigmoid", offset=2.0)
LAYERS = {
    "nflows AffineCouplingTransform": (
        ScaleMap("sigmoid", offset=2.0, eps=1e-3),
        "blocked",
        times(lambda u: log(sigmoid(u + 2) + 1e-3)),
    ),
    "nflows AffineCouplingTransform, general scales": (
        ScaleMap("softplus", eps=1e-3, max_scale=3.0),
        "blocked",
        times(lambda u: log((softplus(u) + 1e-3).clamp(0, 3))),
    ),
    "nflows MaskedAffineAutoregressiveTransform": (
        ScaleMap("softplus", eps=1e-3),
        "feature_major_raw_first",
        times(lambda u: log(softplus(u) + 1e-3)),
    ),
    "normflows AffineCoupling, exp": (ScaleMap("exp"), "interleaved", times(lambda u: u)),
    "normflows AffineCoupling, sigmoid": (
        ScaleMap("sigmoid", offset=2.0, divide=True),
        "interleaved",
        normflows_sigmoid,
    ),
    "normflows AffineCoupling, sigmoid_inv": (
        SIGMOID,
        "interleaved",
        times(lambda u: log(sigmoid(u + 2))),
    ),
    "normflows MaskedAffineAutoregressive": (
        ScaleMap("sigmoid", offset=2.0, eps=1e-3),
        "feature_major_raw_first",
        times(lambda u: log(sigmoid(u + 2) + 1e-3)),
    ),
    "zuko MonotonicAffineTransform": (
        scale_map("softclip"),
        "feature_major",
        times(lambda u: u / (1 + abs(u / math.log(1e-3)))),
    ),
    "FrEIA GLOWCouplingBlock, ATAN": (
        ScaleMap("atan", clamp=C, gain=C),
        "blocked_raw_first",
        times(lambda u: C * 0.636 * atan(u)),
    ),
    "FrEIA GLOWCouplingBlock, TANH": (
        ScaleMap("tanh", clamp=C, gain=C),
        "blocked_raw_first",
        times(lambda u: C * tanh(u)),
    ),
    "FrEIA GLOWCouplingBlock, SIGMOID": (
        ScaleMap("tanh", clamp=C, gain=C / 2),
        "blocked_raw_first",
        times(lambda u: C * 2 * (sigmoid(u) - 0.5)),
    ),
    "FrEIA AllInOneBlock": (
        ScaleMap("tanh", clamp=C, gain=0.1 * C, shift_gain=0.1),
        "blocked_raw_first",
        all_in_one,
    ),
    "torchflows AffineCoupling": (
        ScaleMap("exp", gain=0.5, offset=math.log(1 - 1e-10), eps=1e-10),
        "feature_major_raw_first",
        times(torchflows),
    ),
    "survae AffineCouplingBijection": (
        ScaleMap("exp"),
        "feature_major_raw_first",
        times(lambda u: u),
    ),
    "memcnn AffineAdapterSigmoid": (
        SIGMOID,
        "interleaved",
        times(lambda u: log(sigmoid(u + 2))),
    ),
    "glow-pytorch AffineCoupling": (
        ScaleMap("sigmoid", offset=2.0, shift_first=True),
        "blocked_raw_first",
        glow_pytorch,
    ),
    "bayesflow AffineTransform": (
        scale_map("softplus_asinh"),
        "feature_major_raw_first",
        times(lambda u: log(softplus(asinh(u) + math.log(math.e - 1)))),
    ),
    "softplus(4 tanh(u / 4) + log(e - 1))": (
        scale_map("softplus_tanh"),
        "blocked",
        times(lambda u: log(softplus(4 * tanh(u / 4) + math.log(math.e - 1)))),
    ),
    "3 sigmoid(u - log 2)": (
        ScaleMap("sigmoid", max_scale=3.0, offset=-math.log(2)),
        "blocked",
        times(lambda u: log(3 * sigmoid(u - math.log(2)))),
    ),
    "clamp tanh(u / clamp)": (
        ScaleMap("tanh", clamp=C),
        "blocked",
        times(lambda u: C * tanh(u / C)),
    ),
    "0.636 clamp atan(u / clamp)": (
        ScaleMap("atan", clamp=C),
        "blocked",
        times(lambda u: 0.636 * C * atan(u / C)),
    ),
}


def join(t, u, layout):
    """Lay shifts and raw scales out as the network of a library returns them."""
    a, b = (u, t) if layout.endswith("_raw_first") else (t, u)
    if layout.startswith("blocked"):
        return torch.cat([a, b], 1)
    stacked = torch.stack([a, b], 2 if layout.startswith("interleaved") else -1)
    return stacked.flatten(1, 2) if layout.startswith("interleaved") else stacked


def normal_on(device, *shape, seed=0):
    return normal(*shape, seed=seed).to(device)


def close(actual, expected):
    # float64 through two or three functions: some 1e-15 of the largest intermediate value
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_of_other_libraries(backend, layer):
    smap, layout, formula = LAYERS[layer]
    n, c, space = 3, 4, (5, 3)
    x = normal_on(backend, n, c, *space).requires_grad_()
    t = normal_on(backend, n, c // 2, *space, seed=1).requires_grad_()
    u = (
        4 * normal_on(backend, n, c // 2, *space, seed=2)
    ).requires_grad_()  # far enough out to be clamped

    first, second = x.chunk(2, 1)
    y, log_s = formula(second, t, u)
    expected = torch.cat([first, y], 1), log_s.flatten(1).sum(1)
    actual = affine_coupling(x, join(t, u, layout), scale_map=smap, params_layout=layout)
    close(actual, expected)

    w = normal_on(backend, *x.shape, seed=3)
    gradients = [
        torch.autograd.grad((out * w).sum() + (n * log_det).sum(), (x, t, u))
        for out, log_det in (actual, expected)
    ]
    close(*gradients)

    back = affine_coupling(
        expected[0].detach(),
        join(t, u, layout).detach(),
        scale_map=smap,
        params_layout=layout,
        inverse=True,
    )
    # x = (y - t) / s: the scales above reach e^-8 and e^+8
    torch.testing.assert_close(back[0], x.detach(), rtol=1e-11, atol=1e-11)
    close(back[1:], (-expected[1].detach(),))


@pytest.mark.parametrize("name", ["softplus_asinh", "softplus_tanh"])
def test_a_raw_scale_of_zero_is_the_scale_one(backend, name):
    x = normal_on(backend, 3, 4)
    close(affine(x, torch.zeros_like(x), torch.zeros_like(x), scale_map=name), (x, 0 * x[:, 0]))


@pytest.mark.parametrize(
    "smap",
    [
        *(scale_map(name) for name in PRESETS if name != "sigmoid"),
        ScaleMap("sigmoid", offset=2.0, eps=1e-3),
        ScaleMap("sigmoid", gain=2.0, max_scale=3.0, divide=True),
        ScaleMap("exp", gain=0.5, offset=1.0, eps=0.2),
        ScaleMap("tanh", gain=3.0, offset=0.7),
        ScaleMap("softplus_asinh", gain=2.0, eps=0.1),
        ScaleMap("softplus_tanh", gain=2.0, clamp=1.5, offset=1.0),
    ],
    ids=str,
)
def test_the_raw_scale_of_the_identity(smap):
    u = torch.tensor([smap.identity_raw()], dtype=torch.float64)
    close((smap.log_scale(u),), (torch.zeros_like(u),))


@pytest.mark.parametrize(
    "smap",
    [
        scale_map("sigmoid"),
        ScaleMap("sigmoid", max_scale=0.5),
        ScaleMap("softplus", max_scale=0.9),
        ScaleMap("softplus", eps=1.5),
        ScaleMap("softplus_tanh", clamp=0.1),
        ScaleMap("exp", gain=0.0, offset=1.0),
    ],
    ids=str,
)
def test_maps_that_are_never_one(smap):
    with pytest.raises(ValueError, match="must have a scale of 1 somewhere"):
        smap.identity_raw()


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_raw_scales_of_every_size(backend, name, dtype):
    """Also where their squares are infinite: the logarithm of the scale is as in plain PyTorch, and finite if it is."""
    size = 10.0 ** torch.arange(-40, 38.5, 0.5, dtype=torch.float64)
    u = torch.cat([-size, size]).to(dtype)[None].to(backend)
    exact = scale_map(name).log_scale(u.double())
    one = torch.zeros_like(u.T)
    _, found = affine(one, u.T.contiguous(), one, scale_map=name)
    # of two functions, relative, and of a logarithm near a scale of one
    error = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), exact[0], rtol=error, atol=error)
    assert exact.isfinite().all()


@pytest.mark.parametrize("layer", [name for name in LAYERS if "utoregressive" in name])
def test_autoregressive_layers_need_no_copy_of_their_parameters(backend, layer):
    smap, _, formula = LAYERS[layer]
    x, params = normal_on(backend, 4, 7), normal_on(backend, 4, 7, 2, seed=1)
    y, log_s = formula(x, params[..., 1], params[..., 0])
    close(affine(x, params[..., 0], params[..., 1], scale_map=smap), (y, log_s.sum(1)))


def test_actnorm_that_shifts_first_and_divides(backend):
    """``(x - loc) / exp(log_scale)``, as FrEIA and survae have it."""
    x, loc, log_scale = (
        normal_on(backend, 3, 4, 5),
        normal_on(backend, 4, 1, seed=1),
        normal_on(backend, 4, 1, seed=2),
    )
    smap = ScaleMap("exp", shift_first=True, divide=True)
    expected = (x - loc) / exp(log_scale), (-5 * log_scale.sum()).expand(3)
    close(affine(x, log_scale, -loc, scale_map=smap), expected)


def test_gin_is_exp_of_centred_scales(backend):
    """FrEIA's GIN couples the elements of a sample, so the centring stays outside: no fused map has it."""
    x, t, u = (
        normal_on(backend, 3, 4),
        normal_on(backend, 3, 2, seed=1),
        normal_on(backend, 3, 2, seed=2),
    )
    s = C * 0.636 * atan(u)
    s = s - s.mean(1, keepdim=True)
    y, log_det = affine_coupling(x, torch.cat([t, s], 1), scale_map="exp")
    close(
        (y, log_det), (torch.cat([x[:, :2], exp(s) * x[:, 2:] + t], 1), torch.zeros_like(s[:, 0]))
    )


def transformed(split, event):
    """Return where a library transforms, by its own indexing."""
    where = torch.zeros(event, dtype=torch.bool)
    channels = event[0]
    if split == "chunk":  # survae, glow-pytorch, FrEIA AllInOneBlock, normflows "channel"
        where.chunk(2)[1].fill_(True)
    elif split == "chunk, flipped":  # normflows "channel_inv"
        where.chunk(2)[0].fill_(True)
    elif split == "round":  # FrEIA, its second half
        where[round(0.5 * channels) :] = True
    elif split == "round, flipped":  # FrEIA, its first half
        where[: round(0.5 * channels)] = True
    else:  # normflows: the parity counts the channel, too, and the even places are transformed
        parity = sum(torch.meshgrid(*(torch.arange(k) for k in event), indexing="ij")) % 2
        where = parity == (1 if split.endswith("inv") else 0)
    return where


@pytest.mark.parametrize(
    "split",
    ["chunk", "chunk, flipped", "round", "round, flipped", "checkerboard", "checkerboard_inv"],
)
@pytest.mark.parametrize("channels", [4, 5])
def test_splits_of_other_libraries(backend, split, channels):
    event = (channels, 4, 4)
    where = transformed(split, event).to(backend)
    x, t, u = (normal_on(backend, 2, *event, seed=i) for i in range(3))
    expected = torch.where(where, exp(tanh(u)) * x + t, x)
    log_det = torch.where(where, tanh(u), 0).flatten(1).sum(1)
    smap = ScaleMap("tanh", clamp=1.0)
    full = torch.cat([t, u], 1)
    close(affine_coupling(x, full, split=where, scale_map=smap), (expected, log_det))
    close(affine_coupling(x, full, split=~where, swap=True, scale_map=smap), (expected, log_det))
    if split.startswith("chunk"):
        index = where[:, 0, 0]
        params = torch.cat([t[:, index], u[:, index]], 1)
        actual = affine_coupling(x, params, swap=split.endswith("flipped"), scale_map=smap)
        close(actual, (expected, log_det))
