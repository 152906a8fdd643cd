"""The laws of layers and flows: each takes a case, and raises an AssertionError that says what broke."""

import math
from functools import partial

import pytest
import torch
from torch.func import functional_call, grad, vmap

from laws.bijections import check_copies, check_inverse, check_log_det
from laws.modules import directions, run
from laws.op_checks import LAYOUTS, TWO_FORMULAS, same
from pyflowkern import flows, nn, use_reference

#: Of one float64 quantity by two formulas, through several ops, each of which may differ by ``TWO_FORMULAS``.
SEVERAL_OPS = 10 * TWO_FORMULAS
#: Networks of torch's convolutions and products, which torch may sum in another order with another number of threads.
TORCH_SUMS = (torch.nn.modules.conv._ConvNd, nn.MaskedMLP, nn.VectorFieldConv)
#: Of float32 sums over some hundred samples in another order, through several layers.
REORDERED = 1e-3
HALF_ERROR = 0.05  # of networks of two or three layers in bfloat16, which has 8 bits


def check_the_inverse(case):
    check_inverse(*case.make(), atol=case.atol)


def check_the_log_det(case):
    check_log_det(*case.make(n=2), atol=max(case.atol, 1e-8))


def check_reference(case):
    """Kernels and plain PyTorch compute the same, gradients of every tensor among them."""
    module, x, context = case.make()
    for _, call, start in directions(module, x, context):
        found = run(call, start, context)
        with use_reference():
            expected = run(call, start, context)
        torch.testing.assert_close(found, expected, rtol=SEVERAL_OPS, atol=SEVERAL_OPS)


def check_bad_samples(case):
    """NaN or inf in a sample changes no bit of another, nor of its gradients; a sample of NaN is not finite."""
    module, x, context = case.make(n=5, dtype=torch.float32)
    given = 3 if context is None else 4  # results, and the gradients that belong to samples
    others = torch.arange(5) != 2
    for name, call, start in directions(module, x, context):
        good = run(call, start, context)[:given]
        for spoilt in range(given - 2):
            for poison, where in (
                (math.nan, slice(None)),
                (math.nan, -1),
                (math.inf, slice(None)),
            ):
                bad = [None if t is None else t.clone() for t in (start, context)]
                bad[spoilt][2].view(-1)[where] = poison
                found = run(call, *bad)[:given]
                what = f"{poison} in {(name, 'context')[spoilt]}"
                for a, b in zip(found, good, strict=True):
                    assert same(a[others], b[others]), what
                finite = all(t[2].isfinite().all() for t in found[:2])
                assert not (poison is math.nan and finite), what


def check_copies_and_meta(case):
    """Copies, pickles, and new ones that take the state compute the same, also those made without memory."""
    module, x, context = case.make()
    check_copies(module, case.build().double(), x, context)
    with torch.device("meta"):
        other = case.build().double().eval()
        assert all(t.is_meta for t in (*other.parameters(), *other.buffers()))
        inputs = [None if t is None else torch.empty_like(t, device="meta") for t in (x, context)]
        assert all(t.is_meta for t in other(*inputs))
    for _ in range(2):  # also if memory is allocated twice
        other.to_empty(device=x.device)
        spoil(other)
        other.load_state_dict(module.state_dict())
        assert_same_directions(other, module, x, context)


def spoil(module):
    """Memory of to_empty holds anything: what is not state is spoilt, but for masks."""
    for t in (*module.parameters(), *module.buffers()):
        if t.is_floating_point():
            t.detach().fill_(torch.nan)


def assert_same_directions(module, other, x, context):
    pairs = zip(directions(module, x, context), directions(other, x, context), strict=True)
    for (_, a, start), (_, b, same_start) in pairs:
        assert torch.equal(start, same_start)
        for found, expected in zip(a(start, context), b(start, context), strict=True):
            assert torch.equal(found, expected)


def check_every_parameter_learns(case):
    """In training mode, in both directions: a gradient, finite and somewhere not zero."""
    module, x, context = case.make(n=8)
    for _, call, start in directions(module.train(), x, context):
        module.zero_grad()
        y, log_det = call(start, context)
        loss = (y**3).sum() + (log_det**2).sum()
        if not loss.requires_grad:
            assert not list(module.parameters())
            continue
        loss.backward()
        for name, p in module.named_parameters():
            if name in case.idle or name.startswith(
                "base."
            ):  # of a flow's base: only log_prob has them
                continue
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name
            assert p.grad.any(), name


def check_empty_and_single_batches(case):
    """No sample is a batch too, and a sample alone has the values that it has among others."""
    module, x, context = case.make()
    for _, call, start in directions(module, x, context):
        whole = run(call, start, context)
        rows = 3 if context is None else 4
        for few in (slice(0, 0), slice(1, 2)):
            found = run(call, start[few], None if context is None else context[few])
            for i, (a, b) in enumerate(zip(found, whole, strict=True)):
                assert a.dtype == b.dtype
                if i < rows:
                    assert a.shape == b[few].shape
                if i < 2:
                    torch.testing.assert_close(a, b[few])
                assert few.stop or not a.any(), "no sample, and yet a gradient"
    module.train()(x[:0], None if context is None else context[:0])


def check_shapes(case):
    module, x, context = case.make()
    z, log_det = module(x, context)
    back, minus = module.inverse(z, context)
    assert log_det.shape == minus.shape == x.shape[:1]
    assert back.shape == x.shape
    assert module.output_shape(tuple(x.shape[1:])) == z.shape[1:]
    assert module.input_shape(tuple(z.shape[1:])) == x.shape[1:]


def check_half_types(case, dtype):
    """The result has the dtype of the input, the log-determinant is float32; gradients may overflow, but are no NaN."""
    module, x, context = case.make(dtype=dtype)
    for _, call, start in directions(module, x, context):
        y, log_det, *gradients = run(call, start, context)
        assert (y.dtype, log_det.dtype) == (dtype, torch.float32)
        assert y.isfinite().all()
        assert log_det.isfinite().all()
        assert not any(g.isnan().any() or g.dtype != dtype for g in gradients)


def check_autocast(case):
    """Under autocast dtypes stay, and values are those of float32 but for networks in half types."""
    module, x, context = case.make(dtype=torch.float32)
    for _, call, start in directions(module, x, context):
        expected = run(call, start, context)
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast(x.device.type, dtype):
                found = run(call, start, context)
            assert all(a.dtype == b.dtype for a, b in zip(found, expected, strict=True))
            assert all(t.isfinite().all() for t in found)
            if not hasattr(
                module, "log_prob"
            ):  # through many layers errors grow without such a bound
                bound = HALF_ERROR * x[0].numel()
                torch.testing.assert_close(found[1], expected[1], atol=bound, rtol=HALF_ERROR)


def check_compiles(case, compiler, options=None):
    """Both directions compile into one graph, with the same values and gradients; or the error says why not.

    Of a flow the gradients are those of the density: its layers have the law in both directions.
    """
    module, x, context = case.make()
    for solves in (m for m in module.modules() if isinstance(m, flows.ContinuousBijection)):
        solves.solver = {"method": "euler", "step_size": 0.5}  # a graph holds every evaluation
    leaves = [t.detach().requires_grad_() for t in (x, module(x, context)[0])]
    wanted = [*leaves, *module.parameters()]

    def both(x, z):
        if not hasattr(module, "log_prob"):
            return [*module(x, context), *module.inverse(z, context)]
        density = module.log_prob(x, context)
        with torch.no_grad():
            return [density, *module.inverse(z, context)]

    whole = partial(torch.compile, fullgraph=True, backend=compiler, options=options)
    compiled = whole(both)
    if case.no_graph:
        inverse = whole(lambda z: module.inverse(z, context))
        for f, given in ((compiled, leaves), (inverse, leaves[1:])):
            with pytest.raises(torch._dynamo.exc.Unsupported, match=case.no_graph):
                f(*given)
        return
    results = []
    for f in (both, compiled):
        values = f(*leaves)
        loss = sum((t.cos() * t).sum() for t in values)
        options = {"allow_unused": True, "materialize_grads": True}
        results.append([*values, *torch.autograd.grad(loss, wanted, **options)])
    torch.testing.assert_close(*results, rtol=SEVERAL_OPS, atol=SEVERAL_OPS)


def check_determinism(case, threads):
    """The same bits of results and gradients each time, for any number of threads but for sums of torch's."""
    n = 120 if case.ode else 300  # some tasks for each thread; an ODE is many evaluations of them
    module, x, context = case.make(n, torch.float32)
    torch_sums = any(isinstance(m, TORCH_SUMS) for m in module.modules())
    before = torch.get_num_threads()
    for _, call, start in directions(module, x, context):
        try:
            found = []
            for n in threads:
                torch.set_num_threads(n)
                found.append(run(call, start, context))
        finally:
            torch.set_num_threads(before)
        for n, again in zip(threads, found, strict=True):
            if torch_sums and n != threads[0]:
                torch.testing.assert_close(again, found[0], rtol=REORDERED, atol=REORDERED)
                continue
            for i, (a, b) in enumerate(zip(again, found[0], strict=True)):
                assert torch.equal(a, b), f"result {i} with {n} threads"


def check_function_transforms(case):
    """``vmap`` over samples is the batch, and the sum of gradients of each sample its gradient."""
    module, x, context = case.make()
    if case.no_transforms:
        with pytest.raises(RuntimeError, match=case.no_transforms):
            grad(lambda z: module.inverse(z, context)[0].sum())(module(x, context)[0].detach())
        return
    for _, call, start in directions(module, x, context):
        params = dict(call.named_parameters())
        axes = (None, 0, None if context is None else 0)
        expected = call(start, context)
        found = vmap(lambda *given, call=call: one_sample(call, *given), axes)(
            params, start, context
        )
        torch.testing.assert_close(found, [*expected])
        if params:
            each = vmap(grad(lambda *given, call=call: loss_of_sample(call, *given)), axes)
            each = each(params, start, context)
            total = (expected[0] ** 3).sum() + expected[1].sum()
            options = {"allow_unused": True, "materialize_grads": True}
            wanted = torch.autograd.grad(total, list(params.values()), **options)
            sums = [each[name].sum(0) for name in params]
            torch.testing.assert_close(sums, [*wanted], rtol=SEVERAL_OPS, atol=SEVERAL_OPS)


def one_sample(call, params, x, context):
    given = (x[None], None if context is None else context[None])
    return [t[0] for t in functional_call(call, params, given)]


def loss_of_sample(call, params, x, context):
    y, log_det = one_sample(call, params, x, context)
    return (y**3).sum() + log_det


def check_strides(case, layout):
    """Results and gradients do not depend on the strides of input and context."""
    module, x, context = case.make()
    change = LAYOUTS[layout]
    for _, call, start in directions(module, x, context):
        tensors = [start] if context is None else [start, context]
        if layout == "one for all":
            tensors = [change(t).clone() for t in tensors]
        moved = [change(t) for t in tensors]
        found, expected = run(call, *[*moved, None][:2]), run(call, *[*tensors, None][:2])
        torch.testing.assert_close(found, expected, rtol=SEVERAL_OPS, atol=SEVERAL_OPS)


def check_transform(case):
    """The transform of torch is the module, over any leading axes."""
    module, x, context = case.make(n=6)
    options = {} if hasattr(module, "log_prob") else {"event_dim": x.dim() - 1}
    given = None if context is None else context.view(2, 3, -1)
    transform = module.transform(given, cache_size=1, **options)
    batched = x.view(2, 3, *x.shape[1:])
    y = transform(batched)
    z, log_det = module(x, context)
    torch.testing.assert_close(y.flatten(0, 1), z)
    torch.testing.assert_close(transform.log_abs_det_jacobian(batched, y).flatten(), log_det)
    torch.testing.assert_close(transform.inv(y), batched, atol=100 * case.atol, rtol=1e-7)
    assert transform.forward_shape(batched.shape) == y.shape
    assert transform.inverse_shape(y.shape) == batched.shape


def check_wrong_arguments(case):
    """Inputs and contexts of a wrong kind, dtype or shape are refused by their names."""
    module, x, context = case.make(dtype=torch.float32)
    for name, call, start in directions(module, x, context):
        if isinstance(module, nn.Inverse):  # whose x is the z of the layer that names it
            name = "[xz]"
        for wrong in (start.tolist(), "x", start.long(), start.to(torch.complex64)):
            refuses(TypeError, name, call, wrong, context)
        refuses(ValueError, name, call, start.flatten()[0], context)
        if any(hasattr(module, known) for known in ("channels", "features", "event_shape")):
            refuses(ValueError, name, call, torch.cat((start, start[:, :1]), 1), context)
        if context is None:
            continue
        for wrong in (context.tolist(), context.long()):
            refuses(TypeError, "context", call, start, wrong)
        for wrong in (None, context[:, 1:], context[1:], context[None]):
            refuses(ValueError, "context", call, start, wrong)


def refuses(error, name, call, *given):
    """The call is refused by an error that names the argument."""
    with pytest.raises(error, match=rf"\b{name}\b"):
        call(*given)
