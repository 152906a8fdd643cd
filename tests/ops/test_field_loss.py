"""field_loss: one pass for the squared error of a field and its gradients, against plain PyTorch."""

import pytest
import torch
from cases.field_loss import sample
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from pyflowkern import _library
from pyflowkern.ops.field_loss import _op, field_loss, field_loss_reference


def gradients(function, given, *, factor=1.0):
    leaves = [*given.tensors["weights"], *given.tensors["biases"], *given.tensors["rows"]]
    for t in leaves:
        t.requires_grad_()
    loss = function(**given.tensors, **given.fixed)
    return [loss.detach(), *torch.autograd.grad(factor * loss, leaves)]


def test_a_bad_sample_is_seen(backend):
    """A mean over samples is what it is."""
    for value in (torch.nan, torch.inf):
        given = sample("narrow", 40)
        given.fixed["x"][3, 0] = value
        ours, plain = (gradients(f, given) for f in (field_loss, field_loss_reference))
        assert [bool(t.isfinite().all()) for t in ours] == [
            bool(t.isfinite().all()) for t in plain
        ]


def test_the_gradient_of_the_loss_is_a_factor(backend):
    given = sample("whole vectors", 100)
    once, thrice = (gradients(field_loss, given, factor=f) for f in (1.0, 3.0))
    for a, b in zip(once[1:], thrice[1:], strict=True):
        torch.testing.assert_close(3 * a, b)


def test_a_second_backward_pass_gives_the_same(backend):
    """The first one gives the gradients away, and whoever has them may change them."""
    given = sample("context", 100, inputs=True)
    leaves = [t for v in given.tensors.values() for t in (v if isinstance(v, list) else [v])]
    for t in leaves:
        t.requires_grad_()
    loss = field_loss(**given.tensors, **given.fixed)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    copies = [t.clone() for t in first]
    for t in first:
        t.zero_()
    for a, b in zip(torch.autograd.grad(loss, leaves), copies, strict=True):
        assert torch.equal(a, b)


def test_gradients_of_the_factors_are_those_of_plain_pytorch():
    given = sample("narrow", 9, factors=True)
    found = []
    for function in (field_loss, field_loss_reference):
        factors = [given.fixed[name].clone().requires_grad_() for name in ("scale", "weight")]
        fixed = given.fixed | dict(zip(("scale", "weight"), factors, strict=True))
        found.append(torch.autograd.grad(function(**given.tensors, **fixed), factors))
    torch.testing.assert_close(*found)


def test_without_gradients_nothing_is_kept_and_the_loss_is_the_same(backend):
    given = sample("whole vectors", 300, torch.float32)
    with torch.no_grad():
        loss = field_loss(**given.tensors, **given.fixed)
    assert torch.equal(loss, gradients(field_loss, given)[0])


def test_as_many_operations_as_the_reference():
    """The kernel counts those of its gradients with the loss."""
    for inputs in (False, True):
        given = sample("whole vectors", 30, torch.float32, inputs=inputs)
        totals = []
        for function in (field_loss, field_loss_reference):
            leaves = [
                t for v in given.tensors.values() for t in (v if isinstance(v, list) else [v])
            ]
            for t in leaves:
                t.requires_grad_()
            with FlopCounterMode(display=False) as counter:
                function(**given.tensors, **given.fixed).backward()
            totals.append(counter.get_total_flops())
        assert totals[0] == totals[1]


def test_tensors_that_do_not_fit_are_an_error_of_the_kernel():
    _library.require_kernels("cpu")
    given = sample("narrow", 5, torch.float32, factors=True)
    names = ("x", "target", "joined", "scale", "weight")
    tensors = [given.fixed[name] for name in names]
    lists = [given.tensors[name] for name in ("weights", "biases", "rows")]
    kind = 4, False, False
    _op(*tensors, *lists, *kind)
    for i, name in enumerate(names[1:], 1):
        for wrong in (tensors[i].double(), tensors[i][:3]):
            with pytest.raises(RuntimeError, match=f"{name}|of another size"):
                _op(*tensors[:i], wrong, *tensors[i + 1 :], *lists, *kind)
    for i in range(3):
        for wrong in (lists[i][:1], lists[i][::-1], [t.double() for t in lists[i]]):
            with pytest.raises(RuntimeError, match="field_loss"):  # names what does not fit
                _op(*tensors, *lists[:i], wrong, *lists[i + 1 :], *kind)
    with pytest.raises(RuntimeError, match="activation"):
        _op(*tensors, *lists, 9, False, False)


def test_a_backward_pass_can_be_traced(backend):
    """Nothing asks a tensor without numbers for one."""
    given, other = sample("narrow", 4, torch.float32), sample("narrow", 5, torch.float32)
    tensors, fixed = given.tensors, given.fixed

    def of_weights(x):
        weights = [w.detach().requires_grad_() for w in tensors["weights"]]
        loss = field_loss(**tensors | {"weights": weights}, **fixed | {"x": x})
        return torch.autograd.grad(3 * loss, weights)

    x = other.fixed["x"][:4]
    torch.testing.assert_close(make_fx(of_weights)(fixed["x"])(x), of_weights(x))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(x)
        leaf = mode.from_tensor(tensors["weights"][0]).requires_grad_()
        loss = field_loss(
            **tensors | {"weights": [leaf, tensors["weights"][1]]}, **fixed | {"x": fake}
        )
    (found,) = torch.autograd.grad(loss, leaf)
    assert found.shape == leaf.shape


def test_sizes_that_no_memory_has_are_refused():
    """Tensors without numbers may say any size, of which products overflow."""
    _library.require_kernels("cpu")
    many, no = 2**62, torch.empty(0, 3)
    weights, biases, rows = [torch.zeros(4, 3)], [torch.zeros(4)], [torch.empty(0, 4)]
    given = no, torch.empty(0, 4), torch.empty(0, many), None, None, weights, biases, rows
    with pytest.raises(RuntimeError, match="too many columns"):
        _op(*given, 0, True, True)
    wide = [torch.empty(0, many)], [torch.empty(0)], []
    with pytest.raises(RuntimeError, match="too many columns"):
        _op(torch.empty(0, many), torch.empty(0, 0), None, None, None, *wide, 0, True, True)
    tall = [torch.empty(many, 0)], [torch.empty(0)], []
    with pytest.raises(RuntimeError, match="too many columns"):
        _op(torch.empty(1, 0), torch.empty(1, 0), None, None, None, *tall, 0, True, True)
