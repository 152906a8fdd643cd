"""``check_bijection`` lets right bijections of any library pass, and says what is wrong with wrong ones."""

import math
import re

import pytest
import torch
from laws import normal, randomize
from torch.distributions import AffineTransform

from pyflowkern import flows, nn
from pyflowkern.testing import LAWS, BijectionError, check_bijection

X = normal(4, 3)
CONTEXT = normal(4, 2, seed=1)


def coupling(context_features=0):
    layer = nn.AffineCoupling(
        3, lambda i, o: nn.MLP(i, o, hidden=8, context_features=context_features)
    )
    return randomize(layer).double()


class Scale(torch.nn.Module):
    """z = scale x, with room for one mistake."""

    def __init__(self):
        super().__init__()
        self.log_scale = torch.nn.Parameter(torch.tensor([0.5, -0.25, 1.0], dtype=torch.float64))

    def forward(self, x, context=None):
        return self.scaled(x, self.log_scale)

    def inverse(self, z, context=None):
        return self.scaled(z, -self.log_scale)

    def scaled(self, x, log_scale):
        return x * log_scale.exp(), log_scale.sum().expand(len(x))


class OneNumber(Scale):
    def scaled(self, x, log_scale):
        return x * log_scale.exp(), log_scale.sum()


class NoInverse(Scale):
    def inverse(self, z, context=None):
        return self.scaled(z, self.log_scale)


class HalfLogDet(Scale):
    def scaled(self, x, log_scale):
        return x * log_scale.exp(), log_scale.sum().expand(len(x)) / 2


class Detached(Scale):
    def forward(self, x, context=None):
        return self.scaled(x, self.log_scale.detach())


class MeanOfBatch(Scale):
    def scaled(self, x, log_scale):
        return x * log_scale.exp(), log_scale.sum() + 0 * x.sum() + 1e-3 * (len(x) - 4) * x[:, 0]


class FirstSample(Scale):
    def scaled(self, x, log_scale):
        return x * log_scale.exp(), log_scale.sum() * torch.ones_like(x[0, 0]).expand(len(x))


class Random(Scale):
    def scaled(self, x, log_scale):
        return x * log_scale.exp() + 1e-14 * torch.rand_like(x), log_scale.sum().expand(len(x))


class Double(Scale):
    def scaled(self, x, log_scale):
        z, log_det = super().scaled(x, log_scale)
        return z, log_det.double()


class ValueAlone(Scale):
    def scaled(self, x, log_scale):
        return x * log_scale.exp()


class Column(Scale):
    def scaled(self, x, log_scale):
        return x * log_scale.exp(), log_scale.sum().expand(len(x), 1)


class InPlace(Scale):
    def scaled(self, x, log_scale):
        return x.mul_(log_scale.detach().exp()), log_scale.sum().expand(len(x))


def pair(scale):
    """Return both directions of ``z = scale x`` as functions."""
    log_det = 3 * math.log(scale)
    return (
        lambda x, context: (scale * x, x.new_full(x.shape[:1], log_det)),
        lambda z, context: (z / scale, z.new_full(z.shape[:1], -log_det)),
    )


@pytest.mark.parametrize(
    "bijection",
    [
        pytest.param(coupling(), id="layer"),
        pytest.param(randomize(flows.NSF(3, steps=2, hidden=8)).double().eval(), id="flow"),
        pytest.param(Scale(), id="module"),
        pytest.param(pair(2.0), id="functions"),
        pytest.param(coupling().transform(), id="transform"),
        pytest.param(AffineTransform(1.0, -2.0), id="elementwise transform"),
    ],
)
def test_right_bijections_pass(bijection):
    assert check_bijection(bijection, X)


def test_a_context_is_checked_too():
    assert check_bijection(coupling(2), X, CONTEXT)


def test_layers_of_other_libraries_pass():
    transforms = pytest.importorskip("nflows.transforms")
    normflows = pytest.importorskip("normflows")
    made = transforms.MaskedAffineAutoregressiveTransform(3, 8, context_features=2)
    assert check_bijection(made.double(), X, CONTEXT)
    block = normflows.flows.AffineCouplingBlock(normflows.nets.MLP([1, 8, 2]))
    assert check_bijection(block.double(), X[:, :2].clone())


class Reversed(Scale):
    """In FrEIA's manner: one method for both directions, tuples of tensors, contexts as ``c``."""

    def forward(self, x, c=(), rev=False, jac=True):
        (given,), (context,) = x, c
        z, log_det = self.scaled(given, -self.log_scale if rev else self.log_scale)
        shift = context.sum(1, keepdim=True)
        return (z - shift * self.log_scale.neg().exp() if rev else z + shift,), log_det


def test_modules_in_the_manner_of_freia_pass():
    assert check_bijection(Reversed(), X, CONTEXT)


@pytest.mark.parametrize(
    ("bijection", "law", "words"),
    [
        (OneNumber(), "shapes", r"forward: log_det must have shape \(4,\), got \(\)"),
        (NoInverse(), "inverse", r"f\^-1\(f\(x\)\) is not x: .* in place of .* \(sample \d\)"),
        (HalfLogDet(), "log_det", r"forward: not that of the Jacobian: 0.625 in place of 1.25"),
        (Detached(), "gradients", r"forward: log_scale has no gradient, central differences say"),
        (MeanOfBatch(), "single", r"forward: log_det of a sample alone"),
        (FirstSample(), "empty", r"raised IndexError"),
        (MeanOfBatch(), "isolation", r"forward: nan in sample 2 changes the log_det of others"),
        (Random(), "determinism", r"forward: the value is another in a second call"),
        (Double(), "dtypes", r"forward: the log_det of float32 is torch.float64"),
    ],
)
def test_each_law_finds_its_fault(bijection, law, words):
    with pytest.raises(BijectionError, match=rf"{type(bijection).__name__} breaks \d of 9 laws"):
        check_bijection(bijection, X)
    with pytest.raises(BijectionError, match=f"breaks 1 of 1 laws\n  {law}: {words}"):
        check_bijection(bijection, X, laws=[law])
    assert not check_bijection(bijection, X, laws=[law], raise_exception=False)


@pytest.mark.parametrize(
    ("bijection", "words"),
    [
        (
            ValueAlone(),
            "raised TypeError: wants two results, the value and its log_det, got Tensor",
        ),
        (
            (lambda x, context: (x, x[:, 0], x), lambda z, context: z),
            "raised TypeError: wants two results, the value and its log_det, got 3 of them",
        ),
        (Column(), "forward: log_det must have shape (4,), got (4, 1)"),
        (InPlace(), "forward: writes into its argument"),
    ],
)
def test_results_of_a_wrong_form_are_all_that_is_said(bijection, words):
    x = X.clone()
    words = f"breaks 1 of 9 laws, the others were not looked at\n  shapes: {words}"
    with pytest.raises(BijectionError, match=re.escape(words) + "$"):
        check_bijection(bijection, x)
    assert torch.equal(x, X)  # whoever writes into it


def test_an_iterator_of_laws_is_not_used_up_before_they_are_checked():
    with pytest.raises(BijectionError, match="breaks 1 of 1 laws\n  determinism"):
        check_bijection(Random(), X, laws=iter(["determinism"]))


def test_gradients_are_checked_where_none_are_recorded():
    with torch.no_grad():
        assert check_bijection(coupling(), X, laws=["gradients"])


def test_every_law_has_a_fault_above():
    marks = test_each_law_finds_its_fault.pytestmark
    assert {case[1] for case in marks[0].args[1]} == set(LAWS)


def test_parameters_are_put_back_bit_by_bit():
    layer = coupling()
    before = [p.clone() for p in layer.parameters()]
    check_bijection(layer, X)
    for p, kept in zip(layer.parameters(), before, strict=True):
        assert torch.equal(p, kept)
        assert p.grad is None


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"x": X.float()}, ValueError, "x must be float64, got torch.float32"),
        ({"x": X[:1]}, ValueError, "x must have at least two samples"),
        ({"x": X.numpy()}, TypeError, "x must be a tensor, got ndarray"),
        ({"x": X / 0}, ValueError, "x must be finite"),
        ({"context": CONTEXT[:2]}, ValueError, "context must have 4 rows"),
        ({"laws": ["inverses"]}, ValueError, "laws must be some of shapes, inverse,"),
        ({"laws": "inverse"}, ValueError, "laws must be some of"),
        ({"laws": []}, ValueError, "laws must be some of"),  # no law would hold of anything
        ({"laws": iter(["inverses"])}, ValueError, "laws must be some of"),
        (
            {"bijection": torch.nn.Linear(3, 3)},
            TypeError,
            "bijection must be a module with forward",
        ),
        (
            {"bijection": torch.exp},
            TypeError,
            "bijection must be .*, got builtin_function_or_method",
        ),
        ({"raise_exception": 1}, TypeError, "raise_exception must be True or False"),
        ({"atol": "1"}, TypeError, "atol must be a number"),
    ],
)
def test_wrong_arguments_are_refused(given, error, words):
    with pytest.raises(error, match=words.replace("(", re.escape("("))):
        check_bijection(**{"bijection": Scale(), "x": X, **given})
