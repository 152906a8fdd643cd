"""Inputs of tests, and what watches them."""

import itertools

import torch
from torch.utils._python_dispatch import TorchDispatchMode

#: Shapes without elements: no samples, no features, no pixels.
EMPTY = [(0, 3), (3, 0), (0, 0), (2, 3, 0), (2, 0, 3), (0, 2, 3, 3), (2, 3, 2, 0), (2, 0, 2, 2)]


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


def few_elements():
    """Yield shapes, masks and whether to swap them, that couple nothing, everything, or one element."""
    for shape in ((4, 3), (4, 3, 5), (2, 3, 2, 2)):
        for event, swap in itertools.product((shape[1:], shape[1:2]), (False, True)):
            nothing = torch.zeros(event, dtype=torch.bool)
            one = nothing.clone()
            one.view(-1)[0] = True
            yield from ((shape, mask, swap) for mask in (nothing, ~nothing, one))
    for shape, swap in itertools.product(((2, 2, 0), (0, 2), (0, 3, 2, 2), (2, 3, 0, 2)), (0, 1)):
        yield shape, "channel", bool(swap)
        yield (3, 2, 1, 1), "checkerboard", bool(swap)


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
