"""Flows compile into one graph and compute there what they compute in eager mode."""

import pytest
import torch
from laws import normal, randomize

from pyflowkern import flows


@pytest.mark.slow
def test_glow_trains_in_one_graph():
    """The first call holds the initialisation, the second call does not."""
    torch.manual_seed(0)
    flow = flows.Glow((1, 4, 4), levels=2, steps=1, hidden=4)
    eager = flows.Glow((1, 4, 4), levels=2, steps=1, hidden=4)
    eager.load_state_dict(flow.state_dict())
    log_prob = torch.compile(flow.log_prob, fullgraph=True, backend="aot_eager")
    x = normal(16, 1, 4, 4, dtype=torch.float32) * 3 + 5
    for _ in range(2):
        torch.testing.assert_close(log_prob(x), eager.log_prob(x))
    log_prob(x).sum().backward()
    eager.log_prob(x).sum().backward()
    for (name, p), q in zip(flow.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-3, rtol=1e-3, msg=name)


@pytest.mark.slow
def test_realnvp_log_prob_and_inverse_compile_with_inductor():
    flow = randomize(flows.RealNVP(3, steps=2, hidden=4, context_features=2)).eval()
    x, context = normal(5, 3, dtype=torch.float32), normal(5, 2, dtype=torch.float32)
    log_prob = torch.compile(flow.log_prob, fullgraph=True)
    torch.testing.assert_close(log_prob(x, context), flow.log_prob(x, context))
    inverse = torch.compile(flow.inverse, fullgraph=True)
    torch.testing.assert_close(inverse(x, context)[0], flow.inverse(x, context)[0])
