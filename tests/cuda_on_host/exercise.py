"""Run every CUDA kernel, compiled for the host or on a GPU, on awkward shapes, under a sanitizer.

Called as ``python exercise.py LIBRARY [FAMILY ...]`` with the sanitizer's runtime preloaded, or with ``cuda`` in place
of the library under compute-sanitizer.
"""

import itertools
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import on_host
from cases import chain as flow

from pyflowkern import _library, nn, ops
from pyflowkern.ops.field_layer import activate_layer

VECTORS = [(3, 1), (5, 10), (2, 129)]
IMAGES = [(2, 3, 7), (3, 6, 4, 4), (2, 7, 5, 3)]


def layouts(shape, dtype):
    x = torch.randn(shape).to(dtype)
    yield x
    if x.dim() == 4:
        yield x.contiguous(memory_format=torch.channels_last)
    yield torch.randn(x.numel() + 1).to(dtype)[1:].view(shape)  # 16-byte packs are misaligned


def _leaf(a):
    floating = isinstance(a, torch.Tensor) and a.is_floating_point()
    return a.detach().requires_grad_() if floating else a


def check(function, reference, *args, **options):
    """Compare forward and backward with the reference; the sanitizer checks the memory accesses."""
    results = []
    for f in (function, reference):
        leaves = [_leaf(a) for a in args]
        outputs = f(*leaves, **options)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        wanted = [a for a in leaves if isinstance(a, torch.Tensor) and a.requires_grad]
        floats = [o for o in outputs if o.requires_grad]
        grads = torch.autograd.grad(
            [o.float().sum() for o in floats], wanted, materialize_grads=True
        )
        results.append([*outputs, *grads])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=3e-2, atol=3e-2, equal_nan=True)


def actnorm():
    for shape in VECTORS + IMAGES:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for x in layouts(shape, dtype):
                s, b = 0.1 * torch.randn(shape[1]), torch.randn(shape[1])
                for inverse in (False, True):
                    check(ops.actnorm, ops.actnorm_reference, x, s, b, inverse=inverse)
                ops.channel_moments(x)


def affine():
    for shape in VECTORS + IMAGES:
        for dtype in (torch.float32, torch.float16):
            for x in layouts(shape, dtype):
                u, t = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
                check(ops.affine, ops.affine_reference, x, u, t)
                if shape[1] % 2 == 0:
                    for kind in ("tanh", "sigmoid"):
                        options = {"scale_map": kind, "inverse": kind == "tanh"}
                        check(ops.affine_coupling, ops.affine_coupling_reference, x, u, **options)


def autoregressive():
    for n, features, residual, tau in (
        (1, 3, False, "affine"),
        (33, 5, True, "tanh"),
        (3, 9, True, ops.SplineMap(bins=3)),
        (2, 4, False, ops.SplineMap("quadratic", bins=5)),
        (3, 40, False, "exp"),
    ):
        outputs = 2 if isinstance(tau, str) else tau.params
        net = nn.MaskedMLP(features, outputs, (70, 70), residual=residual)
        shapes = [tuple(s.mask.shape) for s in net.plan.layers]
        weights = [torch.randn(shape) / (2 * shape[1] ** 0.5) for shape in shapes]
        biases = [torch.randn(n, shapes[0][0]), *(torch.randn(a) / 4 for a, _ in shapes[1:])]

        def inverse(function, z, *p, plan=net.plan, tau=tau):
            count = len(plan.layers)
            return function(z, p[:count], p[count:], plan, transform=tau)

        check(
            partial(inverse, ops.autoregressive_inverse),
            partial(inverse, ops.autoregressive_inverse_reference),
            torch.randn(n, features),
            *weights,
            *biases,
        )


def density():
    for shape in [*VECTORS, *IMAGES, (2, 4100)]:
        for x in layouts(shape, torch.float32):
            mean, log_std = torch.randn(shape[1:]), 0.1 * torch.randn(shape[1:])
            check(ops.normal_log_prob, ops.normal_log_prob_reference, x, mean, log_std)
            check(ops.normal_log_prob, ops.normal_log_prob_reference, x, x + 1, 0.1 * x)


def linear():
    for shape in [*VECTORS[:2], *IMAGES, (2, 48, 5, 5), (3, 100)]:
        c = shape[1]
        weight = torch.eye(c) + 0.3 / c**0.5 * torch.randn(c, c)
        for dtype in (torch.float32, torch.bfloat16):
            for x in layouts(shape, dtype):
                args = (x, 0.1 * torch.randn(c), torch.randn(c), weight, torch.tensor(0.5))
                check(ops.glow_step, ops.glow_step_reference, *args)


def chain():
    """Every step and option, there and back; more rows of units than a product takes at a time; tasks of two tiles."""
    steps = [
        flow.coupling(ops.SplineMap(bins=3), 4, (6, 6, 6), context="add", residual=True),
        *(ops.PLUStep(), ops.ActNormStep(), ops.PermuteStep([2, 0, 3, 1]), ops.LinearStep()),
        *(ops.ShiftStep(9.0), ops.ElementsStep("softplus", [2, 1], layout="blocked")),
        flow.coupling("tanh", 4, swap=True, context="add", activation="gelu"),
    ]
    cubic = flow.autoregressive(ops.SplineMap("cubic", bins=3), [1, 3, 0, 2], (130, 7))
    masked = flow.autoregressive("exp", [3, 0, 2, 1])
    for n, some, inverse, base in (
        (33, steps, False, "normal"),
        (5, steps, True, "none"),
        (17, [cubic, masked], False, "none"),
        (2100, [masked], False, "none"),
    ):
        given = flow.sample(n, 4, some, torch.float32, base, inverse=inverse)
        fixed, tensors = given.fixed, given.tensors

        def run(function, x, context, *parameters, fixed=fixed):
            return flow.called(function)(x, parameters, context=context, **fixed)

        check(
            partial(run, ops.chain),
            partial(run, ops.chain_reference),
            tensors["x"],
            tensors["context"],
            *tensors["tensors"],
        )


def field():
    shapes = ((3, (2, 4, 8, 2)), (5, (3, 7, 3)), (1, (5, 33, 20, 5)))
    # more samples than a tile; layers too wide for the fused kernel
    shapes += (
        (100, (2, 12, 2)),
        (3, (3, 130, 20, 3)),
    )
    for n, dims in shapes:
        pairs = list(itertools.pairwise(dims))
        parameters = [torch.randn(b, a) / a**0.5 for a, b in pairs]
        parameters += [torch.randn(n, b) for _, b in pairs] + [torch.rand(b) for _, b in pairs]
        count = len(pairs)
        for options in (
            {"probe": torch.randn(2, n, dims[0]), "regularizers": True},
            {"probe": torch.tensor(1), "activation": "gelu"},
            {"method": "exact", "activation": "silu"},
        ):

            def run(function, x, *p, options=options, count=count):
                return function(x, p[:count], p[count : 2 * count], p[2 * count :], **options)

            check(
                partial(run, ops.field_divergence),
                partial(run, ops.field_divergence_reference),
                torch.randn(n, dims[0]),
                *parameters,
            )
        e = torch.randn(n, 40 * dims[0])
        check(ops.hutchinson_trace, lambda a, b: ops.hutchinson_trace_reference(a, b)[0], e, 2 * e)


def field_layer():
    for n, c, *space in ((3, 5, 4, 4), (2, 7, 5, 3), (4, 8), (1, 2, 3, 50)):
        for p in layouts((3 * n, c, *space), torch.float32):
            for bias, gate in (((c,), None), ((n, c), (c,)), ((1, c, *space), (n, c, *space))):
                given = (torch.randn(bias), None if gate is None else torch.rand(gate))
                options = {"tangents": 2, "activation": "silu" if gate else "softplus"}
                check(ops.field_layer, ops.field_layer_reference, p, *given, **options)
                with torch.no_grad():
                    mine = p.clone(memory_format=torch.preserve_format)
                    activate_layer(mine, *given, 2, options["activation"], in_place=True)
                activate_layer(
                    mine.requires_grad_() * 1, *given, 2, options["activation"], in_place=True
                ).square().sum().backward()


def matrix():
    for c in (1, 3, 17, 33):
        weight = torch.eye(c) + 0.3 / c**0.5 * torch.randn(5, c, c)
        check(ops.slogdet_inverse, ops.slogdet_inverse_reference, weight)
        factors = (weight[0], weight[1], 0.1 * torch.randn(c), torch.ones(c))
        for inverse in (False, True):
            check(
                ops.plu_matrix,
                ops.plu_matrix_reference,
                torch.randperm(c),
                *factors,
                inverse=inverse,
            )


def preprocess():
    for shape in VECTORS + IMAGES:
        x = torch.randint(0, 256, shape, dtype=torch.uint8)
        y, _ = ops.dequantize(x, alpha=0.05, seed=1)
        assert torch.equal(ops.quantize(y, alpha=0.05), x)
        for z in layouts(shape, torch.float32):
            check(ops.logit, ops.logit_reference, z.sigmoid(), alpha=0.05)
            check(ops.logit, ops.logit_reference, z, alpha=0.05, inverse=True)


def diffusion():
    for shape in [*VECTORS, (2, 4100), (1, 1023)]:
        for dtype in (torch.float32, torch.float64):
            for x in layouts(shape, dtype):
                options = {"index": 2, "seed": 7}
                drifts = [torch.randn(shape).to(dtype) for _ in range(2)]
                step, plain = ops.euler_maruyama, ops.euler_maruyama_reference
                check(step, plain, x, drifts[0], -0.3, 0.7, **options)
                check(
                    lambda *t, f=step: f(*t[:2], 0.3, 0.7, other=t[2], index=2, seed=7),
                    lambda *t, f=plain: f(*t[:2], 0.3, 0.7, other=t[2], index=2, seed=7),
                    x,
                    *drifts,
                )
                check(ops.add_noise, ops.add_noise_reference, x, 1.5, **options)


def runge_kutta():
    weights, allowed = (0.5, 0.0, -0.25), {"rtol": 0.1, "atol": 0.1}
    for shape in [*VECTORS, (2, 4100), (3, 8192)]:
        for dtype in (torch.float32, torch.float64):
            for y in layouts(shape, dtype):
                slopes = torch.randn(4, *shape).to(dtype)
                for step in (0.3, torch.rand(shape[0])):
                    check(ops.rk_combine, ops.rk_combine_reference, y, slopes, weights, step)
                    for sizes in ([], [1], [shape[1] // 4, shape[1] // 2]):
                        args, more = (y, y + 1, slopes, weights, step), {**allowed, "sizes": sizes}
                        norm = ops.rk_error(*args, **more)
                        torch.testing.assert_close(
                            norm, ops.rk_error_reference(*args, **more), rtol=1e-4, atol=1e-4
                        )


def spline():
    maps = [
        ops.SplineMap(bins=b, tails=t) for b, t in ((2, "affine"), (8, "linear"), (64, "none"))
    ]
    maps += [ops.SplineMap(kind, bins=5) for kind in ("linear", "quadratic", "cubic")]
    maps += [ops.SplineMap(bins=7, parameterization=p) for p in ("softclip", "domain")]
    for smap in maps:
        for shape in [*VECTORS[:2], IMAGES[0]]:
            for x in layouts(shape, torch.float32):
                x = x.sigmoid() if smap.tails == "none" else x
                params = torch.randn(*shape, smap.params)
                for inverse in (False, True):
                    options = {"spline_map": smap, "inverse": inverse}
                    check(ops.spline, ops.spline_reference, x, params, **options)
    smap = ops.SplineMap(bins=4)
    for shape in [(5, 10), (3, 6, 4, 4)]:
        for dtype in (torch.float32, torch.bfloat16):
            for x in layouts(shape, dtype):
                params = torch.randn(shape[0], shape[1] // 2 * smap.params, *shape[2:]).to(dtype)
                args = (x, params, smap)
                check(ops.spline_coupling, ops.spline_coupling_reference, *args)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    families = [
        actnorm,
        affine,
        autoregressive,
        chain,
        density,
        diffusion,
        field,
        field_layer,
        linear,
        matrix,
        preprocess,
        runge_kutta,
        spline,
    ]
    if sys.argv[1] == "cuda":
        torch.set_default_device("cuda")
        _library.require_kernels("cuda")
    with nullcontext() if sys.argv[1] == "cuda" else on_host.kernels(Path(sys.argv[1])):
        for family in families:
            if not sys.argv[2:] or family.__name__ in sys.argv[2:]:
                family()
                print(family.__name__, "done", flush=True)
