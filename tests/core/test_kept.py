"""What is kept is used only while the tensors that it came from hold the same numbers."""

import pytest
import torch

from pyflowkern import flows
from pyflowkern.core.kept import Kept

CHANGES = {
    "data": lambda t: t.data.add_(1.0),
    "one entry": lambda t: t.detach()[-1, -1:].add_(1.0),
    "the sign of zero": lambda t: t.data.neg_(),
    "transposed": lambda t: setattr(t, "data", t.data.t()),
    "smaller": lambda t: setattr(t, "data", t.data[:-1]),
    "other dtype": lambda t: setattr(t, "data", t.data.double()),
}


@pytest.mark.parametrize("memcmp", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", [3, 40])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_numbers_is_seen(size, change, transposed, memcmp, monkeypatch):
    if not memcmp:  # where C's function cannot be called
        monkeypatch.setattr("pyflowkern.core.kept._memcmp", None)
    numbers = torch.zeros(size, size) if change == "the sign of zero" else torch.randn(size, size)
    weight, kept = torch.nn.Parameter(numbers.t() if transposed else numbers), Kept()
    with torch.no_grad():
        first = kept.get((weight,), weight.sum, 1)
        assert kept.get((weight,), weight.sum, 1) is first
        CHANGES[change](weight)
        assert kept.get((weight,), lambda: "made anew") == "made anew"


def test_what_is_the_same_bit_by_bit_is_kept():
    """NaN as well, which differs from itself; and a 0-dimensional tensor, and an empty one."""
    tensors, kept = [torch.full((3,), torch.nan), torch.tensor(2.0), torch.zeros(0, 4)], Kept()
    first = kept.get(tensors, object)
    assert kept.get([t.clone() for t in tensors], object) is first


def test_samples_follow_weights_and_biases_that_are_written_unseen():
    flow = flows.MAF(3, transforms=1, hidden=[40, 40]).eval()
    z = torch.randn(5, 3)
    with torch.no_grad():
        flow.inverse(z)  # keeps what it packed
        for parameter in flow.parameters():
            parameter.data.add_(torch.randn_like(parameter) / 9)
            x = flow.inverse(z)[0]
            torch.testing.assert_close(flow(x)[0], z, atol=1e-4, rtol=1e-4)
