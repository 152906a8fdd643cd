"""FFJORD's multi-scale flow on images: log-determinants, both directions, latents, pixels."""

import pytest
import torch
from laws import (
    check_gradients,
    check_inverse,
    jacobian_log_det,
    normal,
)

from pyflowkern import flows, nn

TIGHT = {"divergence": "exact", "rtol": 1e-10, "atol": 1e-10}
COARSE = {"method": "rk4", "step_size": 0.5}


def small(shape=(1, 4, 4), **options):
    torch.manual_seed(0)
    options = {"hidden": (4,), "levels": 2, **TIGHT, **options}
    return flows.FFJORD(shape, **options).double()


def pixels(n, *shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("options", [{}, {"levels": 1}, {"levels": None, "conv": True}], ids=str)
def test_inverse_and_log_det(options):
    flow, x = small((1, 2, 4), **options), normal(2, 1, 2, 4)
    check_inverse(flow, x, atol=1e-7)  # solves with tolerance 1e-10
    expected = jacobian_log_det(lambda v: flow(v)[0], x)
    torch.testing.assert_close(flow(x)[1], expected, rtol=0, atol=1e-7)


def test_log_prob_is_the_normal_of_all_latents_and_the_log_determinant():
    flow, x = small(blocks=2), normal(3, 1, 4, 4)
    z, log_det = flow(x)
    latents = flow.split_latents(z)
    assert [tuple(part.shape) for part in latents] == [(3, 2, 2, 2), (3, 2, 2, 2)]
    standard = torch.distributions.Normal(0.0, 1.0)
    expected = sum(standard.log_prob(part).flatten(1).sum(1) for part in latents) + log_det
    torch.testing.assert_close(flow.log_prob(x), expected)
    terms = flow.terms(x)
    torch.testing.assert_close(terms.log_prob, expected, rtol=0, atol=1e-7)
    assert torch.equal(terms.standard_error, torch.zeros(3).double())


def test_the_architecture_is_that_of_ffjord():
    """Fields at each resolution, before and after the squeeze; half of the channels go on to the next."""
    flow = flows.FFJORD((3, 8, 8), hidden=(4,), levels=3, blocks=2, **COARSE)
    assert all(isinstance(block.field, nn.VectorFieldConv) for block in flow.blocks())
    channels = [block.field.channels for block in flow.blocks()]
    assert channels == [3, 3, 12, 12, 6, 6, 24, 24, 12, 12]
    assert {block.field.time for block in flow.blocks()} == {"concatsquash"}
    z, _ = flow(normal(1, 3, 8, 8, dtype=torch.float32))
    assert [tuple(p.shape[1:]) for p in flow.split_latents(z)] == [
        (6, 4, 4),
        (12, 2, 2),
        (12, 2, 2),
    ]


def test_flattened_events():
    flow = flows.FFJORD((1, 4, 4), hidden=(8,), **COARSE)
    assert [type(block.field) for block in flow.blocks()] == [nn.VectorFieldMLP]
    same = flows.FFJORD((1, 4, 4), hidden=(8,), conv=False, **COARSE)
    assert list(flow.state_dict()) == list(same.state_dict())


def test_pixels():
    torch.manual_seed(0)
    flow, x = flows.FFJORD((1, 4, 4), hidden=(4,), levels=2, bits=8, **COARSE), pixels(5, 1, 4, 4)
    terms = flow.terms(x)
    loss = flow.bits_per_dim(x).mean() + (terms.kinetic + terms.jacobian).mean()
    check_gradients(flow, loss)
    assert terms.log_prob.shape == (5,)
    assert flow.sample(3, quantized=True).dtype == torch.uint8
    assert flow.distribution().sample((2,)).shape == (2, 1, 4, 4)


def test_points_of_the_unit_interval_have_a_density():
    """bits/dim is that of the density plus 8 bits for the width of a level."""
    flow, x = small(bits=8), torch.rand(3, 1, 4, 4).double()
    nats = -flow.log_prob(x) / 16
    torch.testing.assert_close(flow.bits_per_dim(x), nats / torch.log(torch.tensor(2.0)) + 8)
    y, before = flow.preprocess(x)
    z, log_det = flow.bijection(y)
    torch.testing.assert_close(flow(x), (z, before + log_det))


def test_learns_stripes():
    """A loss in nats far below that of the normal to which the data was standardized."""
    torch.manual_seed(0)
    flow = flows.FFJORD((1, 4, 4), hidden=(16,), levels=2, method="rk4", step_size=0.5)
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)

    def data(n):
        return torch.randn(n, 1, 1, 4).expand(n, 1, 4, 4) + 0.3 * torch.randn(n, 1, 4, 4)

    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = -flow.log_prob(data(64)).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 4


def test_wrong_arguments():
    for error, message, call in (
        (ValueError, r"event_shape must be \(C, H, W\)", lambda: flows.FFJORD(4, levels=2)),
        (ValueError, r"event_shape must be \(C, H, W\)", lambda: flows.CNF((1, 4), conv=True)),
        (ValueError, "divisible by", lambda: flows.FFJORD((1, 6, 6), levels=3)),
        (ValueError, "levels", lambda: flows.FFJORD((1, 4, 4), levels=0)),
        (TypeError, "levels", lambda: flows.FFJORD((1, 4, 4), levels=1.5)),
        (ValueError, "conv=False", lambda: flows.FFJORD((1, 4, 4), levels=2, conv=False)),
        (ValueError, "conv must be", lambda: flows.FFJORD((1, 4, 4), conv="yes")),
    ):
        with pytest.raises(error, match=message):
            call()
