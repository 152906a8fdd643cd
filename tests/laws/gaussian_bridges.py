"""Bridges whose networks are the exact fields of Gaussian ones."""

import torch

from pyflowkern import transport

F64 = torch.float64
ONE = torch.eye(2, dtype=F64)


class Field(torch.nn.Module):
    """A function of time and points as a network; its scalar is a parameter, for a dtype."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.unused = torch.nn.Parameter(torch.zeros((), dtype=F64))

    def forward(self, t, x):
        return self.function(t.flatten() if t.dim() else t, x)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def oracle(sigma=1.0):
    return transport.gaussian_bridge(-ONE[0] / 10, ONE, ONE[0] / 10, ONE, sigma=sigma)


def with_fields(method, first, second, **options):
    fields = iter((Field(first), Field(second)))
    return transport.SchrodingerBridge(2, method=method, network=lambda d: next(fields), **options)


def exact(method, path, **options):
    """Return a bridge whose networks are those of a Gaussian path."""
    if method == "sf2m":
        pair = path.probability_flow, lambda t, x: path.sigma**2 / 2 * path.score(t, x)
    else:
        pair = path.drift, path.backward_drift
    return with_fields(method, *pair, sigma=path.sigma, **options)


def normal(n, mean, cov, seed):
    noise = torch.randn(n, 2, generator=generator(seed), dtype=F64)
    return mean + noise @ torch.linalg.cholesky(cov).mT
