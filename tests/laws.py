"""The laws that bijections and flows obey, as functions; tests say what obeys them."""

import copy
import pickle

import torch
from torch.utils._python_dispatch import TorchDispatchMode

EPS64 = 1e-9  # of quantities of order one after some hundred float64 operations


def randomize(module, scale=0.3, seed=0):
    """Move every parameter from its start: no law shall hold because a layer is the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            fan = max(p.shape[-1], 1) ** 0.5 if p.dim() > 1 else 1.0
            p += scale / fan * torch.randn(p.shape, generator=generator).to(p.dtype)
    return module


def normal(*shape, seed=0, dtype=torch.float64):
    """Draw on the CPU, so that every backend gets the same numbers, for the default device."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return drawn.to(dtype).to(torch.get_default_device())


def jacobian_log_det(fn, x):
    """Return ``log |det d fn(x) / d x|`` of each sample, by autograd and an LU decomposition."""

    def log_det(sample):
        matrix = torch.autograd.functional.jacobian(lambda v: fn(v[None]).flatten(), sample)
        return torch.linalg.slogdet(matrix.flatten(1)).logabsdet

    return torch.stack([log_det(sample) for sample in x])


def check_inverse(bijection, x, context=None, atol=EPS64):
    """``f^-1(f(x)) = x``, and the two log-determinants are each other's negative."""
    z, log_det = bijection(x, context)
    back, inverse_log_det = bijection.inverse(z, context)
    assert back.shape == x.shape
    assert log_det.shape == inverse_log_det.shape == x.shape[:1]
    torch.testing.assert_close(back, x, atol=atol, rtol=0)
    torch.testing.assert_close(inverse_log_det, -log_det, atol=10 * atol, rtol=1e-6)


def check_log_det(bijection, x, context=None):
    """``log_det`` is the log-determinant of the Jacobian, in both directions."""
    row = None if context is None else context[:1]
    same = None if row is None else row.expand(len(x), -1)
    z, log_det = bijection(x, same)
    torch.testing.assert_close(
        log_det, jacobian_log_det(lambda v: bijection(v, row)[0], x), atol=1e-8, rtol=1e-8
    )
    _, inverse_log_det = bijection.inverse(z, same)
    expected = jacobian_log_det(lambda v: bijection.inverse(v, row)[0], z.detach())
    torch.testing.assert_close(inverse_log_det, expected, atol=1e-8, rtol=1e-8)


def check_samples_are_independent(bijection, x, context=None):
    """A sample of NaN changes nothing in the others, in both directions."""
    for direction in (bijection, bijection.inverse):
        start = x if direction is bijection else bijection(x, context)[0].detach()
        y, log_det = direction(start, context)
        bad = start.clone()
        bad[1] = torch.nan
        bad_y, bad_log_det = direction(bad, context)
        others = torch.arange(len(x)) != 1
        torch.testing.assert_close(bad_y[others], y[others])
        torch.testing.assert_close(bad_log_det[others], log_det[others])


def check_copies(module, fresh, x, context=None):
    """A deep copy, a pickle and a state_dict loaded into a fresh module compute the same."""
    expected = module(x, context)
    fresh.load_state_dict(module.state_dict())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), fresh):
        for a, b in zip(other.train(module.training)(x, context), expected, strict=True):
            assert torch.equal(a, b)


def check_gradients(module, loss):
    """Every parameter has a gradient, finite and somewhere not zero."""
    module.zero_grad()
    loss.backward()
    for name, p in module.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name
        assert p.grad.abs().max() > 0, name


def law(op, reference, inputs, floor=4.0):
    """Hold ``op`` to the error law: against float64, at most twice plain PyTorch's error at that dtype.

    Values and gradients alike; ``floor`` roundings of the largest entry are allowed on top, since an error of plain
    PyTorch may happen to be zero.  Half inputs count their gradients' storage rounding in both.
    """

    def run(function, tensors):
        leaves = [
            t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors
        ]
        y, log_det = function(*leaves)
        g = normal(*y.shape, seed=7).to(y.dtype), normal(*log_det.shape, seed=8).to(log_det.dtype)
        loss = (y.double() * g[0].double()).sum() + (log_det.double() * g[1].double()).sum()
        return [y.detach(), log_det.detach(), *torch.autograd.grad(loss, leaves)]

    ours, plain = run(op, inputs), run(reference, inputs)
    exact = run(reference, [t.double() for t in inputs])
    for i, (a, b, c) in enumerate(zip(ours, plain, exact, strict=True)):
        assert a.shape == c.shape
        if a.numel() == 0:
            continue
        assert a.dtype == b.dtype
        size = float(c.abs().max())
        if i == 1:  # a sum of terms of order one, which may cancel
            size = max(size, inputs[0][0].numel() ** 0.5)
        allowed = 2 * (b.double() - c).abs().max() + floor * torch.finfo(a.dtype).eps * size
        worst = (a.double() - c).abs().max()
        assert worst <= allowed, f"result {i}: error {worst:.3g}, allowed {allowed:.3g}"


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
    ways = normal(4, *y.shape, seed=3).to(y.dtype)
    options = {"retain_graph": True, "allow_unused": True}
    found = torch.autograd.grad(y, leaves, ways, is_grads_batched=True, **options)
    each = zip(*(torch.autograd.grad(y, leaves, way, **options) for way in ways), strict=True)
    for a, b in zip(found, each, strict=True):
        if a is None or b[0] is None:  # of what does not matter: none, or zeros
            assert all(t is None or not t.any() for t in (a, *b))
        else:
            torch.testing.assert_close(a, torch.stack(b), rtol=1e-10, atol=1e-10)
