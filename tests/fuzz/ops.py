"""A random call of every public op: what it is given, and which arguments have the batch as their first axis."""

import itertools

import torch

from fuzz.call import Call
from fuzz.chain import chain
from fuzz.maps import scale_map, spline_map
from fuzz.transport import plan_draw, plan_product, sinkhorn
from pyflowkern import nn, ops


def split_of(draw, channels, space):
    kind = draw.choice(("channel", "checkerboard", "mask", "channel mask"))
    if kind == "channel":
        return kind
    if kind == "checkerboard" and space and len(space) <= 3:
        return kind
    shape = (channels, *space) if kind == "mask" else (channels,)
    return torch.rand(shape, generator=draw.generator) < draw.choice((0.0, 0.5, 1.0))


def transformed(draw, channels, split, swap):
    if isinstance(split, str):
        return ops.channel_split_sizes(channels, swap)[1] if split == "channel" else channels
    if split.dim() == 1 and draw.flag():
        return int((split ^ swap).sum())
    return channels


def affine(draw):
    n, shape = draw.size(), draw.space()
    shape = [draw.size(1, 33), *shape]
    smap = scale_map(draw)
    raw = (
        None if ops.scale_map(smap).kind == "additive" and draw.flag() else draw.tensor(n, *shape)
    )
    x, shift = draw.tensor(n, *shape), draw.tensor(n, *shape)
    given = {"x": x, "raw_scale": raw, "shift": shift, "scale_map": smap, "inverse": draw.flag()}
    return Call(ops.affine, given, ("x", "raw_scale", "shift"))


def affine_coupling(draw):
    n, c, space = draw.size(), draw.size(1, 33), draw.space()
    split = split_of(draw, c, space)
    swap, smap = draw.flag(), scale_map(draw)
    per = 1 if ops.scale_map(smap).kind == "additive" else 2
    layout = draw.choice(("blocked", "interleaved", "feature_major"))
    moved = transformed(draw, c, split, swap)
    shape = (n, moved, *space, per) if layout == "feature_major" else (n, per * moved, *space)
    given = {
        "x": draw.tensor(n, c, *space),
        "params": draw.tensor(*shape),
        "split": split,
        "swap": swap,
        "scale_map": smap,
        "params_layout": layout + draw.choice(("", "_raw_first")),
        "inverse": draw.flag(),
    }
    return Call(ops.affine_coupling, given, ("x", "params"))


def actnorm(draw):
    n, c, space = draw.size(), draw.size(1), draw.space()
    given = {"x": draw.tensor(n, c, *space), "log_scale": draw.tensor(c), "bias": draw.tensor(c)}
    return Call(ops.actnorm, given | {"inverse": draw.flag()}, ("x",))


def channel_moments(draw):
    x = draw.tensor(draw.size(), draw.size(1), *draw.space())
    return Call(ops.channel_moments, {"x": x})


def linear_weight(draw, c):
    return torch.eye(c, dtype=draw.dtype) + (0.2 / c**0.5) * torch.randn(
        c, c, generator=draw.generator
    ).to(draw.dtype)


def invertible_linear(draw):
    n, c, space = draw.size(), draw.size(1, 33), draw.space()
    given = {
        "x": draw.tensor(n, c, *space),
        "weight": linear_weight(draw, c),
        "log_abs_det": torch.tensor(0.5).to(draw.dtype),
        "bias": draw.tensor(c) if draw.flag() else None,
        "inverse": draw.flag(),
    }
    return Call(ops.invertible_linear, given, ("x",))


def glow_step(draw):
    n, c, space = draw.size(), draw.size(1, 33), draw.space()
    given = {
        "x": draw.tensor(n, c, *space),
        "log_scale": draw.tensor(c, scale=0.3),
        "bias": draw.tensor(c),
        "weight": linear_weight(draw, c),
        "log_abs_det": torch.tensor(0.5).to(draw.dtype),
        "inverse": draw.flag(),
    }
    return Call(ops.glow_step, given, ("x",))


def slogdet_inverse(draw):
    c = draw.size(1, 33)
    weight = linear_weight(draw, c)
    if draw.flag():
        weight = weight.expand(draw.size(), c, c)
    return Call(ops.slogdet_inverse, {"weight": weight})


def plu_matrix(draw):
    c = draw.size(1, 33)
    given = {
        "permutation": torch.randperm(c, generator=draw.generator),
        "lower": draw.tensor(c, c, scale=0.2 / c**0.5),
        "upper": draw.tensor(c, c, scale=0.2 / c**0.5),
        "log_diag": draw.tensor(c, scale=0.2),
        "sign": torch.ones(c, dtype=draw.dtype),
        "inverse": draw.flag(),
    }
    return Call(ops.plu_matrix, given)


def householder_matrix(draw):
    c = draw.size(1, 17)
    return Call(ops.householder_matrix, {"vectors": draw.tensor(c, c)})


def normal_log_prob(draw):
    n, shape = draw.size(), [draw.size(1), *draw.space()]
    mean = draw.choice((None, shape, (n, *shape)))
    std = None if mean is None else draw.choice((None, shape, (n, *shape)))
    given = {
        "z": draw.tensor(n, *shape),
        "mean": None if mean is None else draw.tensor(*mean),
        "log_std": None if std is None else draw.tensor(*std, scale=0.3),
        "log_det": draw.tensor(n).to(
            torch.float64 if draw.dtype == torch.float64 else torch.float32
        )
        if draw.flag()
        else None,
    }
    batched = ("z", "log_det", *(("mean",) if mean == (n, *shape) else ()))
    return Call(ops.normal_log_prob, given, batched)


def bits_per_dim(draw):
    given = {"log_prob": draw.tensor(draw.size()), "dims": draw.size(1)}
    return Call(ops.bits_per_dim, given, ("log_prob",))


def logit(draw):
    x = draw.tensor(draw.size(), *([draw.size(1), *draw.space()] if draw.flag() else []))
    inverse = draw.flag()
    x = x if inverse else x.double().sigmoid().to(draw.dtype)
    return Call(ops.logit, {"x": x, "alpha": draw.choice((0.0, 0.05)), "inverse": inverse}, ("x",))


def quantize(draw):
    y = draw.tensor(draw.size(), draw.size(1), *draw.space())
    given = {"y": y, "bits": draw.choice((1, 5, 8)), "alpha": draw.choice((None, 0.05))}
    return Call(ops.quantize, given, ("y",))


def dequantize(draw):
    shape = (draw.size(), draw.size(1), *draw.space())
    bits = draw.choice((5, 8))
    x = torch.randint(0, 2**bits, shape, generator=draw.generator, dtype=torch.uint8)
    given = {"x": x, "bits": bits, "alpha": draw.choice((None, 0.05)), "seed": draw.size()}
    return Call(ops.dequantize, given)


def spline(draw):
    n, shape, smap = draw.size(), [draw.size(0, 33), *draw.space()[:1]], spline_map(draw)
    x = draw.tensor(n, *shape)
    x = x.double().tanh().mul(smap.bound).to(draw.dtype) if smap.tails == "none" else x
    params = draw.tensor(n, *shape, smap.params)
    given = {"x": x, "params": params, "spline_map": smap}
    given |= {"inverse": draw.flag(), "elementwise": draw.flag()}
    return Call(ops.spline, given, ("x", "params"))


def rational_quadratic_spline(draw):
    n, shape, bins = draw.size(), [draw.size(0, 33)], draw.choice((2, 4, 8, 16))
    tails = draw.choice(("linear", "circular"))
    given = {
        "x": draw.tensor(n, *shape),
        "widths": draw.tensor(n, *shape, bins),
        "heights": draw.tensor(n, *shape, bins),
        "derivatives": draw.tensor(n, *shape, bins - (tails == "linear")),
        "bound": draw.choice((1.0, 3.0, 5.0)),
        "tails": tails,
        "inverse": draw.flag(),
        "elementwise": draw.flag(),
    }
    return Call(ops.rational_quadratic_spline, given, ("x", "widths", "heights", "derivatives"))


def spline_coupling(draw):
    n, c, space, smap = draw.size(), draw.size(2, 17), draw.space(), spline_map(draw)
    split = split_of(draw, c, space)
    swap = draw.flag()
    x = draw.tensor(n, c, *space)
    x = x.double().tanh().mul(smap.bound).to(draw.dtype) if smap.tails == "none" else x
    params = draw.tensor(n, transformed(draw, c, split, swap) * smap.params, *space)
    given = {"x": x, "params": params, "spline_map": smap, "split": split, "swap": swap}
    return Call(ops.spline_coupling, given | {"inverse": draw.flag()}, ("x", "params"))


def field_divergence(draw):
    n, d = draw.size(), draw.size(1, 9)
    dims = [d, *(draw.size(1, 33) for _ in range(draw.choice((1, 1, 2, 3)))), d]
    pairs = list(itertools.pairwise(dims))
    method = draw.choice(("hutchinson", "exact"))
    probes = draw.choice((1, 2))
    given = {
        "x": draw.tensor(n, d),
        "weights": [draw.tensor(b, a, scale=a**-0.5) for a, b in pairs],
        "biases": [draw.tensor(*draw.choice(((b,), (n, b)))) for _, b in pairs],
        "gates": [draw.tensor(b) for _, b in pairs] if draw.flag() else None,
        "activation": draw.choice(("tanh", "softplus", "silu", "gelu", "elu", "relu")[:4]),
        "method": method,
        "regularizers": draw.flag(),
    }
    if method == "hutchinson":
        given["probe"] = draw.tensor(*((n, d) if probes == 1 else (probes, n, d)))
        given["probes"], given["per_probe"] = probes, draw.flag()
        if probes == 1 or n <= probes:  # the axis of probes must not look like that of samples
            given["per_probe"] = False
    given["x"], given["weights"] = given["x"].float(), [w.float() for w in given["weights"]]
    for name in ("biases", "gates"):
        given[name] = None if given[name] is None else [t.float() for t in given[name]]
    if "probe" in given:
        given["probe"] = given["probe"].float()
    return Call(ops.field_divergence, given, ("x",))


def field_loss(draw):
    """The op takes what was checked: the method of the field that calls it does so."""
    n, d, context = draw.size(), draw.size(1, 9), draw.choice((0, 0, 3))
    hidden = [draw.size(1, 65) for _ in range(draw.choice((0, 1, 3)))]
    options = draw.choice(("tanh", "softplus", "silu", "gelu")), draw.choice(("none", "concat"))
    dtype = torch.float64 if draw.dtype == torch.float64 else torch.float32
    field = nn.VectorFieldMLP(d, hidden, *options, context_features=context).to(dtype)
    with torch.no_grad():
        for p in field.parameters():
            p.copy_(draw.tensor(*p.shape, scale=p.shape[-1] ** -0.5))
    given = {
        "t": draw.tensor(n).to(dtype),
        "x": draw.tensor(n, d).to(dtype),
        "target": draw.tensor(n, d).to(dtype),
        "context": draw.tensor(n, context).to(dtype) if context else None,
    }
    return Call(field.squared_error, given)


def field_layer(draw):
    n, c, space, tangents = draw.size(), draw.size(1, 17), draw.space(), draw.choice((0, 1, 2))
    given = {
        "p": draw.tensor((1 + tangents) * n, c, *space),
        "bias": draw.tensor(*draw.choice(((c,), (n, c)))),
        "gate": draw.tensor(c) if draw.flag() else None,
        "tangents": tangents,
        "activation": draw.choice(("tanh", "softplus", "silu", "gelu")),
    }
    return Call(ops.field_layer, given)


def hutchinson_trace(draw):
    shape = (draw.size(), draw.size(1), *draw.space())
    given = {"e": draw.tensor(*shape), "je": draw.tensor(*shape), "with_norm": draw.flag()}
    return Call(ops.hutchinson_trace, given, ("e", "je"))


def relu_network(draw):
    n, inputs, residual = draw.size(), draw.size(1, 17), draw.flag()
    width = draw.size(1, 65)
    inner = [draw.size(1) for _ in range(draw.choice((1, 2)))]
    if residual:
        inner = [width] * (2 * draw.choice((0, 1, 2)) + 1)
    sizes = [inputs, *inner, draw.size(1)]
    dtype = torch.float64 if draw.dtype == torch.float64 else torch.float32
    pairs = list(itertools.pairwise(sizes))
    given = {
        "x": draw.tensor(n, inputs).to(dtype),
        "weights": [draw.tensor(b, a, scale=a**-0.5).to(dtype) for a, b in pairs],
        "biases": [draw.tensor(b).to(dtype) for _, b in pairs],
        "context": draw.tensor(n, sizes[1]).to(dtype) if draw.flag() else None,
        "residual": residual,
        "activate_last": draw.flag() if residual else True,
    }
    return Call(ops.relu_network, given, ("x", "context"))


def conv_network(draw):
    n, inputs, residual = draw.size(), draw.size(1, 17), draw.flag()
    height, width = draw.size(1, 17), draw.size(1, 17)
    hidden = draw.size(1, 33)
    inner = [hidden] * (2 * draw.choice((0, 1)) + 1 if residual else draw.choice((1, 2)))
    sizes = [inputs, *inner, draw.size(1, 17)]
    dtype = torch.float64 if draw.dtype == torch.float64 else torch.float32
    layers = [(a, b, draw.choice((1, 3))) for a, b in itertools.pairwise(sizes)]
    x = draw.tensor(n, inputs, height, width).to(dtype)
    given = {
        "x": x.contiguous(memory_format=torch.channels_last) if draw.flag() else x,
        "weights": [
            draw.tensor(b, a, k, k, scale=(a * k * k) ** -0.5).to(dtype) for a, b, k in layers
        ],
        "biases": [draw.tensor(b).to(dtype) for b in sizes[1:]],
        "context": draw.tensor(n, hidden).to(dtype) if draw.flag() else None,
        "residual": residual,
        "activate_last": draw.flag() if residual else True,
    }
    return Call(ops.conv_network, given, ("x", "context"))


def autoregressive_inverse(draw):
    n, d, hidden = draw.size(), draw.size(1, 9), draw.size(1, 33)
    smap = draw.choice(("affine", "spline"))
    # gradients of a sample go by the scale itself: log-scales beyond 88 have none in float32
    kind = draw.choice(
        ("tanh", "softclip", *(("exp", "softplus") if draw.mode == "plain" else ()))
    )
    element = ops.SplineMap(bins=4) if smap == "spline" else kind
    per = element.params if smap == "spline" else 2
    net = nn.MaskedMLP(d, per, (hidden,))
    dtype = torch.float64 if draw.dtype == torch.float64 else torch.float32
    layers = [m for m in net.modules() if isinstance(m, torch.nn.Linear)]
    given = {
        "z": draw.tensor(n, d).to(dtype),
        "weights": [draw.tensor(*m.weight.shape, scale=0.3).to(dtype) for m in layers],
        "biases": [draw.tensor(*m.bias.shape, scale=0.3).to(dtype) for m in layers],
        "plan": net.plan,
        "transform": element,
    }
    return Call(ops.autoregressive_inverse, given, ("z",))


def rk_combine(draw):
    shape, stages = (draw.size(), draw.size(1)), draw.choice((1, 3, 7))
    weights = [draw.choice((0.0, draw.number(-2, 2))) for _ in range(stages)]
    given = {"y": draw.tensor(*shape), "slopes": draw.tensor(stages, *shape), "weights": weights}
    dtype = torch.float64 if draw.dtype == torch.float64 else torch.float32
    given["y"], given["slopes"] = given["y"].to(dtype), given["slopes"].to(dtype)
    return Call(ops.rk_combine, given | {"step": draw.number(-1, 1)}, ("y",))


def euler_maruyama(draw):
    shape, drifts = (draw.size(), draw.size(1), *draw.space()[:1]), draw.choice((1, 2))
    given = {name: draw.tensor(*shape) for name in ("x", "drift", "other")[: 1 + drifts]}
    batched = tuple(given)
    given |= {"step": draw.number(-1, 1), "sigma": draw.choice((0.0, draw.number(0, 2)))}
    given |= {"index": draw.size(), "seed": draw.size()}
    return Call(ops.euler_maruyama, given, batched)


def add_noise(draw):
    x = draw.tensor(draw.size(), draw.size(1), *draw.space()[:1])
    given = {"x": x, "scale": draw.number(-2, 2), "index": draw.size(), "seed": draw.size()}
    return Call(ops.add_noise, given, ("x",))


def rk_error(draw):
    given = rk_combine(draw).arguments
    given["y1"] = given["y"] + 0.1
    return Call(ops.rk_error, given | {"rtol": 1e-3, "atol": 1e-3})


CALLS = {
    f.__name__: f
    for f in (
        actnorm, add_noise, affine, affine_coupling, autoregressive_inverse, bits_per_dim, chain,
        channel_moments, conv_network, dequantize, euler_maruyama, field_divergence, field_layer, field_loss, glow_step,
        householder_matrix, hutchinson_trace, invertible_linear, logit, normal_log_prob, plan_draw,
        plan_product, plu_matrix, quantize, rational_quadratic_spline, relu_network, rk_combine,
        rk_error, sinkhorn, slogdet_inverse, spline, spline_coupling,
    )
}  # fmt: skip
