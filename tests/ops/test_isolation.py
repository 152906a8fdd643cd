"""A sample never changes another, to the bit: which of two formulas runs must not depend on the batch."""

import itertools

import pytest
import torch
from laws import normal

from pyflowkern import ops
from pyflowkern.ops import SplineMap

#: What a bad or an extreme sample holds.
BAD = (torch.nan, torch.inf, -torch.inf, 0.0, 1.0, 1e30, 1e-40, 100.0, 5.0)


def results(function, tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    found = function(*leaves)
    outputs = list(found) if isinstance(found, tuple) else [found]
    cotangents = [normal(*y.shape, seed=7).to(y.dtype) for y in outputs]
    grads = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)
    return [t.detach() for t in (*outputs, *grads) if t is not None]


def check(function, *tensors, shared=()):
    """Change one sample of each of ``tensors`` and compare the results of all others bit by bit."""
    n = len(tensors[0])
    others = torch.arange(n) != n // 2
    expected = results(function, [*tensors, *shared])
    for value, which in itertools.product(BAD, range(len(tensors))):
        changed = [t.clone() for t in tensors]
        changed[which][n // 2] = value
        found = results(function, [*changed, *shared])
        for a, b in zip(found, expected, strict=True):
            if a.dim() and a.shape[0] == n and not any(a.shape == t.shape for t in shared):
                assert torch.equal(a[others], b[others]), (value, which)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("inverse", [False, True])
def test_elementwise_ops(backend, inverse, dtype):
    for n, d in ((400, 3), (7, 17)):
        x, u, t = (normal(n, d, seed=i, dtype=dtype) for i in range(3))
        for alpha in (0.0, 0.05):
            check(lambda v, a=alpha: ops.logit(v, alpha=a, inverse=inverse), x.sigmoid())
        for name in ("exp", "tanh", "sigmoid", "softplus"):
            check(lambda *v, m=name: ops.affine(*v, scale_map=m, inverse=inverse), x, u, t)
        check(ops.normal_log_prob, x, u, t)
        check(lambda *v: ops.actnorm(*v, inverse=inverse), x, shared=(u[0], t[0]))


@pytest.mark.parametrize("kind", ["rational_quadratic", "linear", "quadratic", "cubic"])
@pytest.mark.parametrize("inverse", [False, True])
def test_splines(backend, kind, inverse):
    smap = SplineMap(kind, bins=8)
    x, p = normal(40, 3, dtype=torch.float32), normal(40, 3, smap.params, dtype=torch.float32)
    check(lambda *v: ops.spline(*v, smap, inverse=inverse), x, p)


def test_networks_and_fields(backend):
    sizes = (3, 60, 60, 3)
    x = normal(40, 3, dtype=torch.float32)
    weights = [normal(b, a, seed=a) / a**0.5 for a, b in itertools.pairwise(sizes)]
    biases = [normal(b, seed=b) for b in sizes[1:]]
    shared = [t.float() for t in (*weights, *biases)]
    check(lambda v, *p: ops.relu_network(v, p[:3], p[3:]), x, shared=shared)
    for activation in ("tanh", "softplus", "silu", "gelu"):
        check(
            lambda v, e, *p, a=activation: ops.field_divergence(
                v, p[:3], p[3:], probe=e, activation=a
            ),
            x,
            normal(40, 3, seed=5, dtype=torch.float32),
            shared=shared,
        )
