"""What a random call must obey; each rule raises ``Finding`` with what was wrong.

Rounding is the business of the laws (tests/laws); here a result is wrong where it is wrong by far more: ``SLACK``
times the error of plain PyTorch at that dtype, or of what some roundings of the inputs change, and a thousandth of
the largest entry in float32.
"""

import torch

from fuzz.call import Call
from pyflowkern import use_reference

SLACK = 100.0
#: Beyond it, products of two overflow float32 on one way through a formula and not on another.
LARGEST = 1e15
FLOOR = {torch.float32: 1e-3, torch.float64: 1e-9, torch.bfloat16: 0.3, torch.float16: 0.05}


class Finding(AssertionError):
    """A rule that does not hold."""


def tensors_of(value):
    """Return the floating-point tensors in a value, those of lists one by one."""
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in tensors_of(v)]
    return [value] if isinstance(value, torch.Tensor) and value.is_floating_point() else []


def mapped(value, function):
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(v, function) for v in value)
    return function(value) if tensors_of(value) else value


def with_leaves(arguments, dtype=None):
    """Return the arguments with fresh leaves of the same strides, that want gradients."""

    def leaf(t):
        t = t.detach() if dtype is None else t.detach().to(dtype)
        return t.requires_grad_()

    return {name: mapped(value, leaf) for name, value in arguments.items()}


def run(function, arguments, gradients=True):
    """Return the outputs, and the gradients of all floating-point arguments."""
    out = function(**arguments)
    outputs = list(out) if isinstance(out, tuple) else [out]
    wanted = [t for t in outputs if t.requires_grad]
    if not gradients or not wanted:
        return outputs, []
    # other weights for each output: where a value and its log-det have the same, large gradients cancel
    weights = [
        torch.cos(torch.arange(t.numel()).double() + 2 * k).view(t.shape)
        for k, t in enumerate(wanted)
    ]
    loss = sum((t.double() * w).sum() for t, w in zip(wanted, weights, strict=True))
    leaves = [t for value in arguments.values() for t in tensors_of(value)]
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    pairs = zip(leaves, found, strict=True)
    return outputs, [torch.zeros_like(t) if g is None else g for t, g in pairs]


def outcome(function, arguments, **options):
    """Return the results of a call, or the error of an argument; any other error is a finding."""
    try:
        return run(function, arguments, **options), None
    except (ValueError, TypeError) as error:
        return None, error
    except Exception as error:
        raise Finding(f"{type(error).__name__}: {error}") from error


def check_values(call, mode="plain"):
    """A kernel and the reference refuse the same, and agree with float64 wherever that is finite.

    At an edge (a knot, a kink) a gradient may be that of either side, and with numbers of 10^8 the last digit decides
    on which side of a knot one is: there, what is finite must be finite, and no more.
    """
    ours, refused = outcome(call.function, with_leaves(call.arguments))
    with use_reference():
        plain, plain_refused = outcome(call.function, with_leaves(call.arguments))
        exact, _ = outcome(call.function, with_leaves(call.arguments, torch.float64))
        nearby, _ = outcome(call.function, rounded(call.arguments))
    if (refused is None) != (plain_refused is None):
        raise Finding(f"kernel: {refused!r}; reference: {plain_refused!r}")
    if refused is not None or exact is None:
        return
    if nearby is None:
        return
    tame = all(t.isfinite().all() for t in (*plain[0], *exact[0], *plain[1], *exact[1]))
    large = [bool(t.abs().max() > LARGEST) for t in (*exact[0], *exact[1]) if t.numel()]
    if mode == "extreme" and any(large[: len(exact[0])]):
        return
    tame = tame and not any(large)
    for what in (0, 1) if tame else (0,):
        results = zip(ours[what], plain[what], exact[what], nearby[what], strict=True)
        for i, (a, b, c, d) in enumerate(results):
            name = f"{('output', 'gradient')[what]} {i}"
            if (a.shape, a.dtype) != (b.shape, b.dtype):
                raise Finding(f"{name}: {a.shape} {a.dtype}, reference {b.shape} {b.dtype}")
            smooth = mode in ("plain", "wide") or (mode == "edges" and what == 0)
            compare(name, (a, b, c, d), smooth)


def rounded(arguments):
    """Return the arguments in float64, off by some hundred roundings: what a backward-stable inverse may be off."""
    generator = torch.Generator().manual_seed(0)

    def off(t):
        step = 512 * torch.finfo(torch.float64 if t.dtype == torch.float64 else torch.float32).eps
        noise = torch.randn(t.shape, generator=generator, dtype=torch.float64)
        return t.double() * (1 + step * noise)

    return with_leaves({name: mapped(value, off) for name, value in arguments.items()})


def compare(name, results, smooth):
    if not results[0].is_floating_point():
        ours, exact = (results[i].to(torch.int64) for i in (0, 2))
        if ((ours - exact).abs() > 1).any():  # on the edge between two levels rounding decides
            raise Finding(f"{name} differs from the reference")
        return
    ours, (plain, exact, nearby) = results[0].detach(), (t.detach().double() for t in results[1:])
    sound = exact.isfinite() & plain.isfinite() & (exact.abs() < torch.finfo(ours.dtype).max / 1e4)
    if not sound.any():
        return
    if not ours[sound].isfinite().all():
        raise Finding(f"{name}: not finite where the reference is")
    if not smooth:
        return
    error = (ours.double() - exact)[sound].abs()
    usual = torch.stack(((plain - exact)[sound], (nearby - exact)[sound].nan_to_num(0.0))).abs()
    allowed = SLACK * (usual.max() + torch.finfo(ours.dtype).eps)
    allowed = allowed + FLOOR[ours.dtype] * exact[sound].abs().max()
    if error.max() > allowed:
        raise Finding(f"{name}: error {error.max():.3g}, allowed {allowed:.3g}")


def check_isolation(call, poison):
    """A sample of NaN or inf changes no bit of the others: neither their values nor their own gradients."""
    spoilt, target, bad = spoilt_by(call, poison)
    if target is None:
        return
    n = spoilt[target].shape[0]
    others = torch.arange(n) != bad
    good, refused = outcome(call.function, with_leaves(call.arguments))
    found, _ = outcome(call.function, with_leaves(spoilt))
    if refused is not None:
        return
    leaves = [name for name, value in call.arguments.items() for _ in tensors_of(value)]
    for a, b in zip(good[0], found[0], strict=True):
        if a.dim() and a.shape[0] == n and not same_bits(a[others], b[others]):
            raise Finding(f"{poison} in {target}[{bad}] changes other samples")
    for name, a, b in zip(leaves, good[1], found[1], strict=False):
        if name in named_of(call) and not same_bits(a[others], b[others]):
            raise Finding(f"{poison} in {target}[{bad}] changes the gradient of others' {name}")


def named_of(call):
    return [name for name in call.batched if tensors_of(call.arguments.get(name))]


def spoilt_by(call, poison):
    """Return the arguments with one sample spoilt, in which argument, and which; None where there are less than two."""
    named = named_of(call)
    n = call.arguments[named[0]].shape[0] if named else 0
    if n < 2:
        return call.arguments, None, 0
    bad = n // 2
    target = named[bad % len(named)]
    spoilt = copied(call.arguments[target])
    spoilt[bad] = poison
    return {**call.arguments, target: spoilt}, target, bad


def outcome_of(call, poison=None):
    """Return outputs and gradients of a call, or its error, with a spoilt sample if there is poison."""
    arguments = call.arguments if poison is None else spoilt_by(call, poison)[0]
    return outcome(call.function, with_leaves(arguments))


def copied(t):
    """Return a copy with the same strides: another layout may go another way through the code, and round otherwise."""
    storage = t.untyped_storage().clone()
    return torch.empty(0, dtype=t.dtype).set_(storage, t.storage_offset(), t.shape, t.stride())


def same_bits(a, b):
    return torch.equal(torch.nan_to_num(a, nan=7.0), torch.nan_to_num(b, nan=7.0)) and torch.equal(
        a.isnan(), b.isnan()
    )


def check_hostile(call, draw):
    """Something else in the place of one argument: ValueError, TypeError, or a result, as by the reference."""
    call, what = made_hostile(call, draw)
    found, refused = hostile_outcome(call, what)
    with use_reference():
        plain, plain_refused = hostile_outcome(call, what)
    if type(refused) is not type(plain_refused):
        raise Finding(f"{what}: kernel {refused!r}; reference {plain_refused!r}")
    if refused is None:
        for a, b in zip(found[0], plain[0], strict=True):
            if isinstance(a, torch.Tensor) and (a.shape, a.dtype) != (b.shape, b.dtype):
                raise Finding(f"{what}: {a.shape} {a.dtype}, reference {b.shape} {b.dtype}")


def made_hostile(call, draw):
    """Return the call with something else in the place of one argument, and what that is."""
    name = draw.choice(call.arguments)
    arguments = dict(call.arguments)
    if isinstance(arguments[name], list) and arguments[name] and draw.flag():
        arguments[name] = list(arguments[name])
        arguments[name][draw.random.randrange(len(arguments[name]))] = draw.hostile()
    else:
        arguments[name] = draw.hostile()
    return Call(call.function, arguments), f"{name}={str(arguments[name])[:60]!r}"


def hostile_outcome(call, what):
    """Return the results of a call or its error; a finding says what was passed."""
    try:
        return outcome(call.function, call.arguments, gradients=False)
    except Finding as finding:
        raise Finding(f"{what}: {finding}") from finding
