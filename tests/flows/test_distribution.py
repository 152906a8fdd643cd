"""A flow as a distribution and a transform of torch: shapes, classes, validation, equality."""

import pytest
import torch
from laws import normal, randomize
from torch.distributions import Distribution

from pyflowkern import flows, nn


def make(context_features=0, **options):
    flow = flows.MAF(3, transforms=2, hidden=8, context_features=context_features, **options)
    return randomize(flow).double().eval()


@pytest.fixture
def contexts():
    return normal(4, 2)


def test_samples_and_their_densities_come_from_one_pass(contexts, monkeypatch):
    flow = make(2)
    d = flow.distribution(contexts)
    passes = []
    inverse = flow.bijection.inverse
    monkeypatch.setattr(flow.bijection, "inverse", lambda *a: passes.append(1) or inverse(*a))
    x, log_prob = d.rsample_and_log_prob((5,))
    assert len(passes) == 1
    assert (x.shape, log_prob.shape) == ((5, 4, 3), (5, 4))
    assert x.requires_grad
    assert log_prob.requires_grad
    torch.testing.assert_close(log_prob, d.log_prob(x))
    one = make().distribution().rsample_and_log_prob()
    assert [t.shape for t in one] == [(3,), ()]


def test_an_expanded_distribution_keeps_its_class(contexts):
    class Named(flows.FlowDistribution):
        def __init__(self, flow, context, name):
            super().__init__(flow, context, validate_args=False)
            self.name = name

    d = Named(make(2), contexts, "posterior").expand((6, 4))
    assert isinstance(d, Named)
    assert d.name == "posterior"
    assert d.batch_shape == (6, 4)
    assert d.sample((2,)).shape == (2, 6, 4, 3)
    assert d.expand((2, 6, 4)).batch_shape == (2, 6, 4)


def test_shapes_that_do_not_fit_are_refused(contexts):
    flow = make(2)
    d = flow.distribution(contexts)
    for shape in ((3,), (), (4, 1), (4, 6)):
        with pytest.raises(ValueError, match=r"\(4,\) must broadcast to the batch shape"):
            d.expand(shape)
        with pytest.raises(ValueError, match=r"\(4,\) must broadcast to the batch shape"):
            flows.FlowDistribution(flow, contexts, torch.Size(shape))
    plain = make().distribution().expand((5,))
    with pytest.raises(ValueError, match=r"\(5,\) must broadcast"):
        plain.expand((6,))
    assert plain.expand((2, 5)).sample().shape == (2, 5, 3)
    assert flows.FlowDistribution(flow, contexts, (6, 4)).sample().shape == (6, 4, 3)


def test_validation_follows_the_default_of_torch():
    flow = make()
    nan = torch.full((2, 3), torch.nan, dtype=torch.float64)
    before = Distribution._validate_args
    try:
        for default in (True, False):
            Distribution.set_default_validate_args(default)
            for d in (flow.distribution(), flows.FlowDistribution(flow)):
                for each in (d, d.expand((2,))):
                    if default:
                        with pytest.raises(ValueError, match="to be within the support"):
                            each.log_prob(nan)
                    else:
                        assert each.log_prob(nan).isnan().all()
        for own in (True, False):  # an explicit argument wins, in expanded copies, too
            Distribution.set_default_validate_args(not own)
            assert flow.distribution(validate_args=own).expand((2,))._validate_args is own
    finally:
        Distribution.set_default_validate_args(before)


def test_a_transform_equals_itself(contexts):
    flow, other, conditional = make(), make(), make(2)
    assert flow.transform() == flow.transform()
    assert flow.transform() == flow.transform().with_cache()
    assert flow.transform().inv == flow.transform().inv
    assert flow.transform() != other.transform()
    assert flow.transform() != flow.transform().inv
    assert flow.transform() != 3
    assert conditional.transform(contexts) == conditional.transform(contexts)
    assert conditional.transform(contexts) != conditional.transform(contexts + 1)
    layer = nn.ActNorm(3)
    assert layer.transform() == layer.transform()
    assert layer.transform() != layer.transform(event_dim=2)


def test_samples_with_gradients_need_no_distribution(contexts):
    flow = make(2)
    x = flow.rsample(4, contexts, generator=torch.Generator().manual_seed(1))
    assert x.requires_grad
    expected = flow.sample(4, contexts, generator=torch.Generator().manual_seed(1))
    assert torch.equal(x, expected)
