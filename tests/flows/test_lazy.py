"""flow.lazy(): a module whose call with a context is a distribution."""

import copy
import pickle

import pytest
import torch
from laws import normal, randomize

from pyflowkern import flows


def lazy(context_features=3):
    flow = flows.MAF(2, transforms=2, hidden=8, context_features=context_features)
    return randomize(flow).double().lazy()


def test_densities_broadcast_as_those_of_torch():
    q, c, x = lazy(), normal(5, 3), normal(7, 5, 2, seed=1)
    log_prob = q(c).log_prob(x)
    for i in range(7):
        torch.testing.assert_close(log_prob[i], q.flow.log_prob(x[i], c))
    torch.testing.assert_close(q(c).log_prob(x[0, 0]), q.flow.log_prob(x[0, :1].expand(5, 2), c))
    torch.testing.assert_close(q(c[0]).log_prob(x[0]), q.flow.log_prob(x[0], c[0]))
    torch.testing.assert_close(q(c[:, None]).log_prob(x[:, 0]).T, q(c).log_prob(x[:, :1]))
    assert q(c[0]).log_prob(x[0, 0]).shape == ()
    assert lazy(0)().log_prob(x).shape == (7, 5)


def test_samples_have_gradients_and_shapes():
    q, c = lazy(), normal(5, 3).requires_grad_()
    d = q(c)
    assert (d.batch_shape, d.event_shape) == ((5,), (2,))
    x, log_prob = d.rsample_and_log_prob((4,))
    assert (x.shape, log_prob.shape) == ((4, 5, 2), (4, 5))
    torch.testing.assert_close(log_prob, d.log_prob(x))
    assert torch.autograd.grad(x.sum(), c)[0].any()
    assert not d.sample((4,)).requires_grad
    wide = q(c[:1]).expand((6, 1))
    assert wide.rsample((2,)).shape == (2, 6, 1, 2)


def test_the_transform_of_a_distribution_is_that_of_the_flow():
    q, c, x = lazy(), normal(5, 3), normal(4, 5, 2, seed=1)
    z = q(c).transform(x)
    for i in range(4):
        torch.testing.assert_close(z[i], q.flow(x[i], c)[0])
    torch.testing.assert_close(q(c).transform.inv(z), x)


def test_it_trains_copies_and_saves_as_the_flow():
    q = lazy()
    assert [*q.parameters()] == [*q.flow.parameters()]
    c, x = normal(5, 3), normal(5, 2)
    for other in (copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        torch.testing.assert_close(other(c).log_prob(x), q(c).log_prob(x))
    fresh = lazy()
    fresh.load_state_dict(q.state_dict())
    optimizer = torch.optim.Adam(q.parameters(), 1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(-q(c).log_prob(x).mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]


class PosteriorEstimator(torch.nn.Module):
    """As lampe writes it: a constructor of lazy distributions, called with (features, context features)."""

    def __init__(self, theta_dim, x_dim, build, **options):
        super().__init__()
        self.flow = build(theta_dim, x_dim, **options)

    def forward(self, theta, x):
        shape = torch.broadcast_shapes(theta.shape[:-1], x.shape[:-1])
        return self.flow(x.expand(*shape, -1)).log_prob(theta.expand(*shape, -1))


@pytest.mark.parametrize("kind", [flows.MAF, flows.NSF])
def test_builders_of_other_libraries_take_it(kind):
    def build(features, context_features, **options):
        return kind(features, context_features=context_features, **options).lazy()

    estimator = PosteriorEstimator(3, 4, build, transforms=2, hidden=(8, 8))
    theta, x = torch.randn(64, 3), torch.randn(64, 4)
    assert estimator(theta, x).shape == (64,)
    assert estimator(theta, x[0]).shape == (64,)
    assert estimator.flow(x[0]).sample((9,)).shape == (9, 3)


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"flow must be a flows.Flow, got Linear"):
        flows.LazyFlow(torch.nn.Linear(2, 2))
    q = lazy()
    for wrong, error in ((None, ValueError), (torch.zeros(2, 4), ValueError), ([1.0], TypeError)):
        with pytest.raises(error, match="context must"):
            q(wrong)
    with pytest.raises(ValueError, match="context_features=0"):
        lazy(0)(torch.zeros(3))
