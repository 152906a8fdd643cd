"""Samples: generators, temperatures, contexts, interpolation, and the torch distribution."""

import pytest
import torch
from laws import normal, randomize

from pyflowkern import flows


def vector_flow(context_features=0, build=flows.Glow):
    torch.manual_seed(0)
    flow = build(3, steps=2, hidden=8, context_features=context_features)
    return randomize(flow).double().eval()


def image_flow(bits=None):
    torch.manual_seed(0)
    return randomize(flows.Glow((1, 4, 4), levels=2, steps=1, hidden=4, bits=bits)).eval()


def seed(value):
    return torch.Generator().manual_seed(value)


@pytest.mark.parametrize("training", [False, True])
def test_a_generator_decides_the_samples(training):
    flow = image_flow().train(training)
    first, again = (flow.sample(4, generator=seed(1)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, flow.sample(4, generator=seed(2)))
    assert first.shape == (4, 1, 4, 4)
    state = torch.get_rng_state()
    flow.sample(4, generator=seed(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_train_and_eval_mode_draw_the_same_samples():
    flow = vector_flow()
    expected = flow.sample(4, generator=seed(1))
    torch.testing.assert_close(flow.train().sample(4, generator=seed(1)), expected)


def test_temperature_scales_the_latents():
    flow = vector_flow()
    cold, _ = flow(flow.sample(5, temperature=0.3, generator=seed(1)))
    warm, _ = flow(flow.sample(5, generator=seed(1)))
    torch.testing.assert_close(cold, 0.3 * warm)
    mode = flow.sample(5, temperature=0.0)
    torch.testing.assert_close(mode, mode[:1].expand(5, 3))


def test_samples_come_with_their_density():
    flow = vector_flow()
    for temperature in (1.0, 0.5):
        x, log_prob = flow.sample_and_log_prob(6, temperature=temperature, generator=seed(1))
        torch.testing.assert_close(log_prob, flow.log_prob(x))
        expected = flow.sample(6, temperature=temperature, generator=seed(1))
        torch.testing.assert_close(x, expected)
    assert x.requires_grad
    assert not flow.sample(2).requires_grad


def test_one_context_serves_all_samples():
    flow = vector_flow(context_features=2)
    context = normal(1, 2)
    expected = flow.sample(4, context.expand(4, 2), generator=seed(1))
    for one in (context, context[0]):
        assert torch.equal(flow.sample(4, one, generator=seed(1)), expected)
    assert not torch.equal(flow.sample(4, context + 1, generator=seed(1)), expected)


def test_pixels_are_in_the_unit_interval_or_uint8():
    flow = image_flow(bits=5)
    x = flow.sample(16, generator=seed(1))
    assert x.dtype == torch.float32
    assert 0 <= x.min() < x.max() <= 1
    pixels = flow.sample(16, generator=seed(1), quantized=True)
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels, (x * 32).floor().clamp(0, 31).to(torch.uint8))


@pytest.mark.parametrize("context_features", [0, 2])
def test_interpolation_goes_from_one_end_to_the_other(context_features):
    flow = vector_flow(context_features)
    context = normal(4, 2) if context_features else None
    x0, x1 = normal(4, 3), normal(4, 3, seed=1)
    path = flow.interpolate(x0, x1, 5, context)
    assert path.shape == (5, 4, 3)
    torch.testing.assert_close(path[0], x0)
    torch.testing.assert_close(path[-1], x1)
    latents = [flow(x, context)[0] for x in path]
    torch.testing.assert_close(latents[2], (latents[0] + latents[4]) / 2)


# --- torch.distributions ---


@pytest.mark.parametrize("build", [flows.Glow, flows.RealNVP])
def test_the_distribution_is_the_flow(build):
    flow = vector_flow(build=build)
    d = flow.distribution()
    assert isinstance(d, torch.distributions.Distribution)
    assert (d.batch_shape, d.event_shape) == (torch.Size(), torch.Size([3]))
    x = d.sample((2, 5))
    assert x.shape == (2, 5, 3)
    assert not x.requires_grad
    torch.testing.assert_close(d.log_prob(x).flatten(), flow.log_prob(x.flatten(0, 1)))
    assert d.rsample((4,)).requires_grad
    assert d.sample().shape == (3,)
    assert d.log_prob(d.sample()).shape == ()
    assert d.expand((7,)).sample((2,)).shape == (2, 7, 3)


def test_the_context_of_a_distribution_is_its_batch():
    flow = vector_flow(context_features=2)
    context = normal(4, 2)
    d = flow.distribution(context)
    assert d.batch_shape == (4,)
    x = d.sample((5,))
    assert x.shape == (5, 4, 3)
    for i in range(5):
        torch.testing.assert_close(d.log_prob(x)[i], flow.log_prob(x[i], context))
    torch.testing.assert_close(d.log_prob(x[0, 0]), flow.log_prob(x[0, :1].expand(4, 3), context))
    assert d.expand((6, 4)).sample().shape == (6, 4, 3)


def test_kl_divergence_by_samples_is_not_negative():
    p, q = vector_flow(), randomize(vector_flow(), seed=5)
    x, log_p = p.sample_and_log_prob(2000, generator=seed(0))
    assert (log_p - q.log_prob(x)).mean() > 0


def test_the_support_says_what_x_may_be():
    assert bool(vector_flow().distribution().support.check(normal(3)))
    pixels = image_flow(bits=8).distribution()
    assert pixels.support.check(pixels.sample((16,))).all()
    support = pixels.support
    assert not bool(support.check(torch.full((1, 4, 4), 2.0)))


def test_the_base_is_an_independent_normal():
    base = flows.StandardNormal(3)
    d = base.distribution()
    assert isinstance(d, torch.distributions.Independent)
    z = normal(5, 3, dtype=torch.float32)
    torch.testing.assert_close(d.log_prob(z), base.log_prob(z))


def test_a_flow_takes_another_base():
    class Wide(torch.nn.Module):
        def log_prob(self, z):
            return torch.distributions.Normal(0.0, 2.0).log_prob(z).sum(1)

        def sample(self, n, *, temperature=1.0, generator=None):
            return 2 * temperature * torch.randn(n, 3, generator=generator, dtype=torch.float64)

    flow = flows.Flow(vector_flow().bijection, (3,), base=Wide()).double()
    x, log_prob = flow.sample_and_log_prob(4)
    torch.testing.assert_close(log_prob, flow.log_prob(x))
    assert flow.distribution().sample((2,)).shape == (2, 3)
