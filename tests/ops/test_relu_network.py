"""relu_network: values and derivatives of linear layers and ReLUs, sample by sample, at every SIMD level."""

import itertools
from functools import partial

import pytest
import torch
from laws import check_batched_gradients, normal

import pyflowkern
from pyflowkern.ops import relu_network, relu_network_reference

#: (inputs, widths of the layers, residual, activate_last, with a context)
FORMS = {
    "plain": (3, (6, 5, 4), False, True, True),
    "one hidden layer": (3, (127, 1), False, True, False),
    "residual": (4, (17, 17, 17, 17, 17, 9), True, True, True),
    "not activated": (2, (64, 64, 64, 33), True, False, False),
    "no blocks": (3, (8, 4), True, False, True),
    "wide": (130, (300, 257, 129), False, True, False),
}
forms = pytest.mark.parametrize("form", FORMS)
SAMPLES = [0, 1, 97, 1000]


def make(form, n, dtype=torch.float64, seed=0):
    size, widths, residual, activate_last, with_context = FORMS[form]
    sizes = list(itertools.pairwise((size, *widths)))
    weights = [
        normal(b, a, dtype=dtype, seed=seed + i) * (2 / a) ** 0.5 for i, (a, b) in enumerate(sizes)
    ]
    biases = [0.3 * normal(b, dtype=dtype, seed=seed + 50 + i) for i, (_, b) in enumerate(sizes)]
    context = normal(n, widths[0], dtype=dtype, seed=seed + 98) if with_context else None
    options = {"residual": residual, "activate_last": activate_last}
    return [normal(n, size, dtype=dtype, seed=seed + 99), context, weights, biases], options


def call(function, args, options):
    x, context, weights, biases = args
    return function(x, weights, biases, context=context, **options)


def leaves(args):
    x, context, weights, biases = args
    return [t for t in (x, context, *weights, *biases) if t is not None]


def doubled(args):
    return [
        None if a is None else [t.double() for t in a] if isinstance(a, list) else a.double()
        for a in args
    ]


def gradients(function, args, options):
    args = [
        None
        if a is None
        else [t.detach().requires_grad_() for t in a]
        if isinstance(a, list)
        else a.detach().requires_grad_()
        for a in args
    ]
    out = call(function, args, options)
    return torch.autograd.grad(
        out, leaves(args), torch.cos(torch.arange(out.numel())).view_as(out).to(out)
    )


@forms
@pytest.mark.parametrize("n", SAMPLES)
def test_value_and_gradients_are_those_of_the_reference(backend, form, n):
    """A sum of m terms in float32 is off by a few roundings of the whole: plain PyTorch's error, twice."""
    for dtype, floor in ((torch.float32, 3e-7), (torch.float64, 1e-15)):
        args, options = make(form, n, dtype)
        exact = [call(relu_network_reference, doubled(args), options)]
        exact += gradients(relu_network_reference, doubled(args), options)
        plain = [call(relu_network_reference, args, options)]
        plain += gradients(relu_network_reference, args, options)
        found = [call(relu_network, args, options), *gradients(relu_network, args, options)]
        for ours, theirs, true in zip(found, plain, exact, strict=True):
            assert ours.dtype == dtype
            assert ours.shape == true.shape
            if true.numel():
                scale = true.abs().max()
                error, allowed = (ours - true).abs().max(), 2 * (theirs - true).abs().max()
                # a ReLU within rounding of its edge may fall on either side in one of the two
                assert error <= allowed + (
                    floor * 64 * scale if dtype == torch.float64 else 32 * floor * scale
                )


@forms
def test_derivatives_of_second_order(backend, form):
    args, options = make(form, 4)
    tensors = [t.requires_grad_() for t in leaves(args)]
    count = len(args[2])

    def function(*flat):
        head = flat[: len(flat) - 2 * count]
        context = head[1] if len(head) > 1 else None
        return call(
            relu_network, [head[0], context, flat[-2 * count : -count], flat[-count:]], options
        )

    small = form not in ("wide", "one hidden layer", "not activated")
    assert torch.autograd.gradcheck(function, tensors, fast_mode=not small)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@forms
def test_samples_do_not_know_each_other(backend, form):
    args, options = make(form, 200, torch.float32)
    expected = call(relu_network, args, options)
    args[0][130, 0] = torch.nan
    args[0][7, 0] = torch.inf
    found = call(relu_network, args, options)
    assert found[130].isnan().any()
    others = torch.ones(200, dtype=torch.bool)
    others[[7, 130]] = False
    assert torch.equal(found[others], expected[others])


@forms
def test_results_do_not_depend_on_threads_nor_on_the_run(form):
    args, options = make(form, 1000, torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            results.append(
                [call(relu_network, args, options), *gradients(relu_network, args, options)]
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_more_samples_than_a_wave_of_the_backward_pass(backend):
    args, options = make("residual", 20_000, torch.float32)
    exact = gradients(relu_network_reference, doubled(args), options)
    plain = gradients(relu_network_reference, args, options)
    for ours, theirs, true in zip(
        gradients(relu_network, args, options), plain, exact, strict=True
    ):
        scale = true.abs().max()
        assert (ours - true).abs().max() <= 2 * (theirs - true).abs().max() + 1e-6 * scale


@forms
def test_inputs_of_any_layout(backend, form):
    args, options = make(form, 33)
    expected = call(relu_network, args, options)
    strided = torch.stack((args[0], args[0]), 2)[..., 0]
    turned = [w.t().contiguous().t() for w in args[2]]
    found = call(relu_network, [strided, args[1], turned, args[3]], options)
    torch.testing.assert_close(found, expected)


def test_opcheck():
    (x, context, weights, biases), options = make("residual", 5)
    flags = options["residual"], options["activate_last"]
    op = torch.ops.pyflowkern.relu_network.default
    for t in (x, context, *weights, *biases):
        t.requires_grad_()
    torch.library.opcheck(op, (x, context, weights, biases, *flags, True))
    with torch.no_grad():
        out, kept = op(x, context, weights, biases, *flags, True)
    plain = [w.detach() for w in weights]
    torch.library.opcheck(
        torch.ops.pyflowkern.relu_network_backward.default,
        (out, x.detach(), plain, kept, *flags, True, True),
    )


def test_compiles_without_a_break():
    args, options = make("residual", 33, torch.float32)
    compiled = torch.compile(partial(call, relu_network), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(args, options), call(relu_network, args, options))


class Exported(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(3, 127), torch.nn.Linear(127, 2)

    def forward(self, x):
        layers = self.first, self.last
        return relu_network(x, [y.weight for y in layers], [y.bias for y in layers])


def test_a_graph_exported_without_gradients_still_has_them():
    module, x = Exported(), normal(200, 3, dtype=torch.float32, seed=1).requires_grad_()
    with torch.no_grad():
        exported = torch.export.export(module, (x,)).module()
    (found,) = torch.autograd.grad(exported(x).sum(), x)
    (want,) = torch.autograd.grad(module(x).sum(), x)
    torch.testing.assert_close(found, want)


def test_the_reference_can_be_asked_for():
    args, options = make("plain", 5)
    with pyflowkern.use_reference():
        expected = call(relu_network, args, options)
    assert torch.equal(expected, call(relu_network_reference, args, options))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda a: a.__setitem__(0, a[0].int()), TypeError, "x must be a floating-point"),
        (lambda a: a.__setitem__(0, a[0][0]), ValueError, r"x must have shape \[N, in\]"),
        (lambda a: a[2].pop(), ValueError, "one entry for each"),
        (lambda a: a[2].__setitem__(1, a[2][1].t()), ValueError, r"weights\[1\] must have shape"),
        (lambda a: a[3].__setitem__(0, a[3][0][:2]), ValueError, r"biases\[0\] must have shape"),
        (lambda a: a[3].__setitem__(2, a[3][2].float()), TypeError, r"biases\[2\] must have the"),
        (lambda a: a.__setitem__(1, a[1][:2]), ValueError, "context must have shape"),
        (lambda a: a.__setitem__(1, a[1].float()), TypeError, "context must have the dtype"),
    ],
)
def test_wrong_arguments_are_named(change, error, text):
    args, options = make("plain", 5)
    change(args)
    with pytest.raises(error, match=text):
        call(relu_network, args, options)


def test_wrong_forms_are_named():
    args, _ = make("plain", 5)
    with pytest.raises(ValueError, match="pairs of layers"):
        call(relu_network, args, {"residual": True})
    with pytest.raises(ValueError, match="activate_last=False"):
        call(relu_network, args, {"activate_last": False})


@forms
def test_batched_gradients_are_those_one_by_one(backend, form):
    args, options = make(form, 3)
    for t in leaves(args):
        t.requires_grad_()
    check_batched_gradients(call(relu_network, args, options), leaves(args))
