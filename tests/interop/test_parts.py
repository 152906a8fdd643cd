"""Parts of accelerated models that are exchanged, shared or put in, and networks that keep something."""

import copy
import functools
import math

import normflows as nf
import pytest
import torch
import zuko
from laws.chains import calls  # noqa: F401
from laws.draws import normal
from laws.nflows_models import D, spline
from nflows import distributions, flows, transforms
from nflows.nn import nets

import pyflowkern

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
K, N = 3, 7


def pair(*parts):
    """Return a composite of nflows, and an accelerated copy."""
    model = transforms.CompositeTransform(parts).double()
    twin = copy.deepcopy(model)
    assert pyflowkern.accelerate(twin).accelerated
    return model, twin


def agree(model, twin):
    x = 1.5 * normal(N, D)
    torch.testing.assert_close(twin(x), model(x), **CLOSE)


def test_an_inverse_of_another_transform_is_that_of_it():
    torch.manual_seed(0)
    model, twin = pair(
        transforms.InverseTransform(transforms.LULinear(D, identity_init=False)), spline()
    )
    agree(model, twin)
    other = transforms.LULinear(D, identity_init=False).double()
    for m in (model, twin):
        m._transforms[0]._transform = other
    agree(model, twin)
    pyflowkern.accelerate(other)
    agree(model, twin)


def test_what_is_put_where_nothing_was_counts():
    """nflows calls whatever lies under the name, which need be no module."""

    class Halving:
        def __call__(self, x, context):
            return x / 2, x.new_full((len(x),), -x.shape[1] * math.log(2))

    model, twin = pair(spline(), spline())
    agree(model, twin)
    for part in (Halving(), None):
        for m in (model, twin):
            m._transforms[0].unconditional_transform = part
        agree(model, twin)


def test_maps_of_any_size_may_stand_among_several_sizes(calls):  # noqa: F811
    affine = transforms.PointwiseAffineTransform(torch.tensor(0.5), torch.tensor(2.0))
    shared = [affine, transforms.IdentityTransform()]
    models = torch.nn.ModuleList(
        transforms.CompositeTransform([*shared, transforms.LULinear(size)]) for size in (3, 5)
    ).double()
    twins = copy.deepcopy(models)
    pyflowkern.accelerate(twins)
    calls.clear()
    for _ in range(2):
        for model, twin, size in zip(models, twins, (3, 5), strict=True):
            x = normal(N, size)
            torch.testing.assert_close(twin(x), model(x), **CLOSE)
    assert [len(program.steps) for program in calls] == [2] * 4  # the identity has none


@pytest.mark.parametrize("what", ["spectral norm", "hook"])
def test_a_network_that_was_called_is_not_called_again(what):
    """zuko computes the parameters of elements as it makes their transform."""
    torch.manual_seed(0)
    flow = zuko.flows.gaussianization.ElementWiseTransform(
        D, K, univariate=zuko.transforms.MonotonicRQSTransform, shapes=[(8,), (8,), (7,)]
    )
    seen = []
    flow.double().train()
    twin = copy.deepcopy(flow)
    for each in (flow, twin):
        if what == "hook":
            each.hyper[0].register_forward_hook(lambda *_: seen.append(1))
        else:
            torch.manual_seed(2)
            torch.nn.utils.parametrizations.spectral_norm(each.hyper[0])
    pyflowkern.accelerate(twin)
    x, c, found = 2 * normal(N, D), normal(N, K, seed=1), []
    for each in (flow, twin):
        seen.clear()
        found.append([[each(c).call_and_ladj(x) for _ in range(3)], len(seen)])
    torch.testing.assert_close(found[1], found[0], **CLOSE)


def given_context(**options):
    """Return a flow of nflows whose networks read a context."""
    net = functools.partial(nets.ResidualNet, hidden_features=8, context_features=K, **options)
    parts = [
        transforms.AffineCouplingTransform(mask, net) for mask in ([1, 0, 1, 0], [0, 1, 1, 0])
    ]
    return flows.Flow(transforms.CompositeTransform(parts), distributions.StandardNormal([4]))


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


def doubled(module, name):
    torch.nn.utils.parametrize.register_parametrization(module, name, Doubled())


def gate(flow):
    doubled(flow._transform._transforms[0].transform_net.blocks[1].context_layer, "weight")


def in_place(flow):
    flow._transform._transforms[0].transform_net.blocks[0].activation.inplace = True


def coupled_spline():
    spline = nf.flows.CoupledRationalQuadraticSpline(4, 1, 8)
    return nf.NormalizingFlow(
        nf.distributions.DiagGaussian(4), [spline, nf.flows.Permute(4), spline]
    )


def own_parameters(flow):
    doubled(flow.flows[0].prqct.unconditional_transform, "unnormalized_heights")


def plain_parameters(flow):
    cdf = flow.flows[0].prqct.unconditional_transform
    heights = cdf._parameters.pop("unnormalized_heights")
    cdf.unnormalized_heights = heights.detach() + torch.arange(heights.shape[-1])


def mixed():
    parts = [nf.flows.MaskedAffineAutoregressive(4, 8), nf.flows.InvertibleAffine(4)]
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(4), parts)


def standardized():
    flow = zuko.flows.MAF(4, transforms=1, hidden_features=(8,))
    affine = torch.distributions.transforms.AffineTransform
    first = zuko.lazy.UnconditionalTransform(affine, torch.ones(4), torch.full((4,), 2.0))
    return zuko.flows.Flow([first, flow.transform.transforms[0]], flow.base)


def scales(flow):
    doubled(flow.transform.transforms[0], "_1")


def diagonal(flow):
    flow.flows[1].eye.data.mul_(1.5)


def density(model, *given):
    made = model() if isinstance(model, zuko.flows.Flow) else model
    return made.log_prob(*given)


@pytest.mark.parametrize(
    ("build", "change", "context"),
    [
        (given_context, gate, K),
        (functools.partial(given_context, activation=torch.nn.ReLU()), in_place, K),
        (coupled_spline, own_parameters, 0),
        (coupled_spline, plain_parameters, 0),
        (mixed, diagonal, 0),
        (standardized, scales, 0),
    ],
)
def test_one_thing_that_is_changed_after_a_call_counts(build, change, context):
    torch.manual_seed(0)
    model = build().double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    twin = copy.deepcopy(model)
    assert pyflowkern.accelerate(twin).accelerated
    given = [normal(N, 4), *([normal(N, K, seed=1)] if context else [])]
    with torch.no_grad():
        before = density(model, *given)
        torch.testing.assert_close(density(twin, *given), before, **CLOSE)
        for each in (model, twin):
            change(each)
        after = density(model, *given)
        assert not torch.allclose(after, before)
        torch.testing.assert_close(density(twin, *given), after, **CLOSE)
