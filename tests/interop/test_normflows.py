"""Models of normflows: what runs in the place of their transforms gives what the library gives."""

import pytest
import torch
from laws.chains import calls
from laws.normflows_models import (
    CLOSE,
    IMAGES,
    VECTORS,
    context_of,
    data,
    derivatives,
    log_prob,
    pair,
)

__all__ = ["calls"]  # a fixture


@pytest.fixture(params=[*VECTORS, *IMAGES])
def name(request):
    return request.param


def test_log_densities_and_gradients_are_those_of_the_library(name):
    model, twin = pair(name)
    torch.testing.assert_close(
        derivatives(twin, data(twin)), derivatives(model, data(model)), **CLOSE
    )


def test_samples_are_drawn_alike(name):
    model, twin = pair(name)
    found = []
    for m in (model, twin):
        torch.manual_seed(5)
        found.append(m.sample(6, *context_of(m)))
    torch.testing.assert_close(*found, **CLOSE)


@pytest.mark.parametrize("name", VECTORS)
def test_other_methods_are_those_of_the_library(name):
    model, twin = pair(name)
    x = data(model)
    for method in (
        "forward",
        "inverse",
        "forward_and_log_det",
        "inverse_and_log_det",
        "forward_kld",
    ):
        given = [x, *context_of(model)]
        want = getattr(model, method)(*given)
        # log-dets of a model in float64 come in float32, as from the library
        torch.testing.assert_close(getattr(twin, method)(*given), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", VECTORS)
def test_a_flow_is_one_op(name, calls):
    _, twin = pair(name)
    x = data(twin)
    calls.clear()
    log_prob(twin, x)
    assert len(calls) == 1
    twin.sample(6, *context_of(twin))
    assert len(calls) == 2


def test_training_goes_as_without(name):
    losses = []
    for model in pair(name):
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        x = data(model)
        for _ in range(3):
            optimizer.zero_grad()
            loss = -log_prob(model, x).mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-8)
