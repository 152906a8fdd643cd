"""Inputs of tests, and what watches them."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def normal(*shape, seed=0, dtype=torch.float64):
    """Draw on the CPU, so that every backend gets the same numbers, for the default device."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return drawn.to(dtype).to(torch.get_default_device())


def unit(*shape, seed=0, dtype=torch.float64):
    """Draw between 0 and 1, likewise."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")
    return drawn.to(dtype).to(torch.get_default_device())


#: Of float64 sums of up to some thousand terms that are added in another order.
REORDERED = 1e-10


class Calls(TorchDispatchMode):
    """The names of the ops that run inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not torch.ops.aten.promote_types.default:  # which computes nothing
            self.names.append(func.name())
        return func(*args, **kwargs or {})


def check_batched_gradients(y, leaves):
    """Gradients for several cotangents at once are those for one after the other."""
    cotangents = normal(4, *y.shape, seed=3).to(y.dtype)
    options = {"retain_graph": True, "allow_unused": True}
    found = torch.autograd.grad(y, leaves, cotangents, is_grads_batched=True, **options)
    each = zip(*(torch.autograd.grad(y, leaves, c, **options) for c in cotangents), strict=True)
    for a, b in zip(found, each, strict=True):
        if a is None or b[0] is None:  # of what does not matter: none, or zeros
            assert all(t is None or not t.any() for t in (a, *b))
        else:
            torch.testing.assert_close(a, torch.stack(b), rtol=REORDERED, atol=REORDERED)
