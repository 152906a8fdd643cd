"""Flows as density estimators of sbi: its protocol without it, and its training where it is installed."""

import copy
import importlib.util
import pickle

import pytest
import torch
from laws import normal, randomize

from pyflowkern import flows
from pyflowkern.interop.sbi import FlowEstimator, density_estimator

small = {"transforms": 2, "hidden": 8}
with_sbi = pytest.mark.skipif(importlib.util.find_spec("sbi") is None, reason="sbi is not here")


def simulations(n=200, seed=0):
    """Parameters and observations of scales far from one."""
    theta = 3 * normal(n, 2, seed=seed, dtype=torch.float32) + 10
    return theta, 1000 * theta @ torch.ones(2, 3) + normal(n, 3, seed=seed + 1).float()


@pytest.fixture(params=[flows.MAF, flows.NSF, None], ids=["MAF", "NSF", "default"])
def estimator(request):
    torch.manual_seed(0)
    options = {} if request.param is None else small
    return density_estimator(request.param, **options)(*simulations())


def test_shapes_are_those_of_the_protocol(estimator):
    theta, x = simulations(30)
    assert (estimator.input_shape, estimator.condition_shape) == ((2,), (3,))
    loss = estimator.loss(theta, x)
    assert loss.shape == (30,)
    torch.testing.assert_close(estimator.log_prob(theta, x), -loss[None])
    grid = estimator.log_prob(theta.view(6, 5, 2), x[:5])
    assert grid.shape == (6, 5)
    for i in range(6):
        torch.testing.assert_close(grid[i], -estimator.loss(theta.view(6, 5, 2)[i], x[:5]))
    torch.testing.assert_close(
        estimator.log_prob(theta.view(6, 5, 2), x.view(6, 5, 3)).view(-1), -loss
    )
    one = estimator.log_prob(theta[:, None], x[:1])
    torch.testing.assert_close(one[:, 0], -estimator.loss(theta, x[:1].expand(30, 3)))
    assert estimator.log_prob(theta[None, :1], x[:4]).shape == (1, 4)
    assert estimator.sample((7, 3), x[:4]).shape == (7, 3, 4, 2)
    samples, log_prob = estimator.sample_and_log_prob((7,), x[:4])
    torch.testing.assert_close(estimator.log_prob(samples, x[:4]), log_prob, rtol=1e-4, atol=1e-4)
    latents = estimator.inverse_transform(theta.view(6, 5, 2), x[:5])
    torch.testing.assert_close(
        latents[0], estimator.net(theta[:5], estimator.embedding_net(x[:5]))[0]
    )


def test_simulations_are_standardized(estimator):
    theta, x = simulations()
    context = estimator.embedding_net(x)
    torch.testing.assert_close(context.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(context.std(0, correction=0), torch.ones(3), atol=1e-3, rtol=0)
    first = estimator.net.bijection[0]
    torch.testing.assert_close(first.mean, theta.mean(0))
    torch.testing.assert_close(first.std, theta.std(0, correction=0))


def test_a_density_is_learned():
    theta, x = simulations(500)
    torch.manual_seed(0)
    estimator = density_estimator(flows.MAF, **small)(theta, x)
    optimizer = torch.optim.Adam(estimator.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append(estimator.loss(theta, x).mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.5


def test_embeddings_are_trained_and_likelihoods_are_turned_round():
    theta, x = simulations()
    net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh())
    estimator = density_estimator(embedding_net=net, **small)(theta, x)
    assert estimator.net.context_features == 5
    randomize(estimator.net)  # a new flow is the identity whatever its context is
    estimator.loss(theta, x).sum().backward()
    assert net[0].weight.grad.any()
    turned = density_estimator(likelihood=True, **small)(theta, x)
    assert (turned.input_shape, turned.condition_shape) == ((3,), (2,))
    images = torch.randn(20, 1, 4, 4)
    seen = density_estimator(embedding_net=torch.nn.Conv2d(1, 2, 4), **small)(theta[:20], images)
    assert seen.condition_shape == (1, 4, 4)
    assert seen.net.context_features == 2
    assert seen.sample((3,), images[:2]).shape == (3, 2, 2)
    plain = density_estimator(z_score=False, **small)(theta, x)
    torch.testing.assert_close(plain.embedding_net(x), x)
    assert len(plain.net.bijection) == 2


def test_copies_and_files(estimator):
    theta, x = simulations(9)
    torch.manual_seed(0)
    for other in (copy.deepcopy(estimator), pickle.loads(pickle.dumps(estimator))):
        torch.testing.assert_close(other.loss(theta, x), estimator.loss(theta, x), rtol=0, atol=0)
    make = density_estimator(flows.MAF, **small)
    assert isinstance(pickle.loads(pickle.dumps(make))(theta, x), FlowEstimator)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"build": 3}, TypeError, "build must be a class of flows or a function, got int"),
        ({"embedding_net": len}, TypeError, "embedding_net must be a module"),
        ({"z_score": 1}, TypeError, "z_score must be True or False"),
        ({"likelihood": None}, TypeError, "likelihood must be True or False"),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        density_estimator(**options)


def test_wrong_arguments_later(estimator):
    theta, x = simulations(9)
    with pytest.raises(TypeError, match=r"build must return a flows.Flow, got Linear"):
        density_estimator(lambda d, context_features: torch.nn.Linear(d, 1))(theta, x)
    with pytest.raises(
        ValueError, match=r"condition must have shape \[\*batch, 3\], got \(9, 2\)"
    ):
        estimator.loss(theta, theta)


@with_sbi
@pytest.mark.parametrize("likelihood", [False, True])
def test_sbi_trains_it_and_samples(likelihood, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    from sbi.inference import NLE, NPE
    from sbi.neural_nets.estimators.base import ConditionalDensityEstimator
    from sbi.utils import BoxUniform

    torch.manual_seed(0)
    prior = BoxUniform(-2 * torch.ones(2), 2 * torch.ones(2))
    theta = prior.sample((1000,))
    x = theta @ torch.tensor([[1.0, 1.0, 0.0], [1.0, -1.0, 1.0]]) + 0.1 * torch.randn(1000, 3)
    # what a user writes, in one line
    inference = (NLE if likelihood else NPE)(
        prior, density_estimator(likelihood=likelihood, **small), show_progress_bars=False
    )
    trained = inference.append_simulations(theta, x).train(max_num_epochs=60, learning_rate=5e-3)
    assert isinstance(trained, FlowEstimator)
    assert isinstance(trained, ConditionalDensityEstimator)
    if likelihood:
        assert trained.log_prob(x[:5], theta[:5]).shape == (1, 5)
        return
    posterior = inference.build_posterior()
    truth = torch.tensor([0.5, -1.0])
    seen = truth @ torch.tensor([[1.0, 1.0, 0.0], [1.0, -1.0, 1.0]])
    samples = posterior.sample((500,), x=seen, show_progress_bars=False)
    assert samples.shape == (500, 2)
    # the posterior's deviation is about 0.06
    torch.testing.assert_close(samples.mean(0), truth, atol=0.15, rtol=0)
    assert posterior.log_prob(samples, x=seen).isfinite().all()
    again = pickle.loads(pickle.dumps(posterior))
    torch.testing.assert_close(
        again.log_prob(samples, x=seen), posterior.log_prob(samples, x=seen)
    )
