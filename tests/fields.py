"""Vector fields for tests: their parameters, their gradients, and the law of their errors."""

import itertools

import torch
from laws import normal

from pyflowkern.ops import field_divergence, field_divergence_reference


def layers(dims, dtype=torch.float64, n=None, gates=False):
    """Weights, biases and gates of a field; parameters of each of ``n`` samples if given."""
    pairs = list(enumerate(itertools.pairwise(dims)))
    own = () if n is None else (n,)
    weights = [normal(b, a, seed=i, dtype=dtype) / a**0.5 for i, (a, b) in pairs]
    biases = [normal(*own, b, seed=50 + i, dtype=dtype) for i, (_, b) in pairs]
    found = [normal(*own, b, seed=90 + i, dtype=dtype).sigmoid() for i, (_, b) in pairs]
    return weights, biases, found if gates else []


def run(function, x, parts, **options):
    """Results of a field, and the gradients of everything for fixed output gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, *parts[0], *parts[1], *parts[2])]
    n = len(parts[0])
    w, b, g = leaves[1 : n + 1], leaves[n + 1 : 2 * n + 1], leaves[2 * n + 1 :]
    found = function(leaves[0], w, b, g or None, **options)
    grads = [normal(*t.shape, seed=7 + i).to(t.dtype) for i, t in enumerate(found)]
    gradients = torch.autograd.grad(found, leaves, grads)
    return [t.detach() for t in (*found, *gradients)]


def check(x, parts, **options):
    """The law of errors: at most twice plain PyTorch's, and 64 roundings of the largest entry."""
    exact_options = {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in options.items()
    }
    ours, plain = (
        run(f, x, parts, **options) for f in (field_divergence, field_divergence_reference)
    )
    exact = run(
        field_divergence_reference,
        x.double(),
        [[t.double() for t in part] for part in parts],
        **exact_options,
    )
    for i, (a, b, c) in enumerate(zip(ours, plain, exact, strict=True)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if a.numel() == 0:
            continue
        # sums of up to a thousand terms in another order: twice the square root of as many roundings
        floor = 64 * torch.finfo(a.dtype).eps * float(c.abs().max())
        allowed = 2 * (b.double() - c).abs().max() + floor
        worst = (a.double() - c).abs().max()
        assert worst <= allowed, f"result {i}: error {worst:.3g}, allowed {allowed:.3g}"
