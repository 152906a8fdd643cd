"""Whether buffers are still what steps followed from."""

import pytest
import torch

from pyflowkern.interop._watches import Holds


def holder(values):
    module = torch.nn.Module()
    module.register_buffer("mask", values)
    return module, Holds(module, "mask")


@pytest.mark.parametrize("size", [3, 300])
def test_values_hold_until_they_are_others(size):
    module, holds = holder(torch.ones(size))
    assert holds()
    module.mask = torch.ones(size)
    assert holds()
    module.mask[1] = 2
    assert not holds()
    assert not holds()  # however often it is asked
    module.mask[1] = 1
    assert holds()
    module.double()
    assert not holds()
    del module.mask
    assert not holds()


def test_what_is_written_without_a_trace_is_seen():
    for values in (torch.ones(40, 50), torch.ones(50, 40).t(), torch.ones(2000).bool()):
        module, holds = holder(values)
        module.mask.data.fill_(0)
        assert not holds()
        module.mask.data.fill_(1)
        assert holds()
        module.mask.data[7:8].zero_()
        assert not holds()
    module, holds = holder(torch.ones(0))
    assert holds()


def test_a_tensor_in_the_place_of_one_that_is_gone_is_another_one():
    module, holds = holder(torch.ones(300))
    for _ in range(50):
        module.mask = module.mask.clone()  # the memory of the one before is free now
        module.mask = torch.full((300,), 2.0)
        assert not holds()
        module.mask = torch.ones(300)
        assert holds()
    for _ in range(50):
        module.mask.data = torch.zeros(3)
        module.mask.data = torch.full((300,), 2.0)
        assert not holds()
        module.mask.data = torch.ones(300)
        assert holds()
