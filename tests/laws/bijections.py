"""The laws of bijections: layers and flows."""

import copy
import pickle

import torch

from pyflowkern.testing import check_bijection

EPS64 = 1e-9  # of quantities of order one after some hundred float64 operations
JACOBIAN = 1e-8  # the LU decomposition of a Jacobian loses about one digit more than EPS64


def jacobian_log_det(fn, x):
    """Return ``log |det d fn(x) / d x|`` of each sample, by autograd and an LU decomposition."""

    def log_det(sample):
        matrix = torch.autograd.functional.jacobian(lambda v: fn(v[None]).flatten(), sample)
        return torch.linalg.slogdet(matrix.flatten(1)).logabsdet

    return torch.stack([log_det(sample) for sample in x])


def check_inverse(bijection, x, context=None, atol=EPS64):
    """``f^-1(f(x)) = x``, and the two log-determinants are each other's negative."""
    check_bijection(bijection, x, context, atol=atol, rtol=0, laws=["shapes", "inverse"])


def check_log_det(bijection, x, context=None, atol=JACOBIAN):
    """``log_det`` is the log-determinant of the Jacobian, in both directions."""
    check_bijection(bijection, x, context, atol=atol, rtol=JACOBIAN, laws=["log_det"])


def check_copies(module, fresh, x, context=None):
    """A deep copy, a pickle and a state_dict loaded into a fresh module compute the same."""
    expected = module(x, context)
    fresh.load_state_dict(module.state_dict())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), fresh):
        for a, b in zip(other.train(module.training)(x, context), expected, strict=True):
            assert torch.equal(a, b)


def check_gradients(module, loss):
    """Every parameter has a gradient, finite and somewhere not zero, but those of no number."""
    module.zero_grad()
    loss.backward()
    for name, p in module.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name
        assert p.grad.any() or not p.numel(), name
