"""Run every CUDA kernel, compiled for the host or on a GPU, on awkward shapes; a sanitizer watches.

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

from pyflowkern import _library, ops

VECTORS = [(3, 1), (5, 10), (2, 129)]
IMAGES = [(2, 3, 7), (3, 6, 4, 4), (2, 7, 5, 3)]


def layouts(shape, dtype):
    x = torch.randn(shape).to(dtype)
    yield x
    if x.dim() == 4:
        yield x.contiguous(memory_format=torch.channels_last)
    yield torch.randn(x.numel() + 1).to(dtype)[1:].view(shape)  # 16-byte packs are misaligned


def check(function, reference, *args, **options):
    """Forward and backward against the reference: the sanitizer judges memory, this the numbers."""
    results = []
    for f in (function, reference):
        leaves = [a.detach().requires_grad_() if a.is_floating_point() else a for a in args]
        outputs = f(*leaves, **options)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        wanted = [a for a in leaves if a.requires_grad]
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


def divergence():
    for n, dims in ((3, (2, 4, 8, 2)), (5, (3, 7, 3)), (1, (5, 33, 20, 5))):
        pairs = list(itertools.pairwise(dims))
        parameters = [torch.randn(b, a) / a**0.5 for a, b in pairs]
        parameters += [torch.randn(n, b) for _, b in pairs] + [torch.rand(b) for _, b in pairs]
        count = len(pairs)
        for options in (
            {"probe": torch.randn(2, n, dims[0]), "regularizers": True},
            {"probe": torch.tensor(1), "activation": "gelu"},
            {"method": "exact", "activation": "silu"},
        ):

            def field(function, x, *p, options=options, count=count):
                return function(x, p[:count], p[count : 2 * count], p[2 * count :], **options)

            check(
                partial(field, ops.field_divergence),
                partial(field, ops.field_divergence_reference),
                torch.randn(n, dims[0]),
                *parameters,
            )
        e = torch.randn(n, 40 * dims[0])
        check(ops.hutchinson_trace, lambda a, b: ops.hutchinson_trace_reference(a, b)[0], e, 2 * e)


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


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    families = [actnorm, affine, density, divergence, linear, matrix, preprocess]
    if sys.argv[1] == "cuda":
        torch.set_default_device("cuda")
        _library.require_kernels("cuda")
    with nullcontext() if sys.argv[1] == "cuda" else on_host.kernels(Path(sys.argv[1])):
        for family in families:
            if not sys.argv[2:] or family.__name__ in sys.argv[2:]:
                family()
                print(family.__name__, "done", flush=True)
