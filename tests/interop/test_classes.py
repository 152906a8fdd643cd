"""accelerate() without a model: instances that other code builds, from their first call on."""

import pytest
import torch
from nflows.transforms import CompositeTransform, RandomPermutation, ReversePermutation

import pyflowkern
from pyflowkern.nn.links import Door


@pytest.fixture
def x():
    return torch.randn(5, 4)


def model():
    return CompositeTransform([RandomPermutation(4), ReversePermutation(4)])


def test_instances_are_equipped_at_their_first_call_and_get_their_methods_back(x):
    old, before = model(), CompositeTransform.forward
    want = old(x)
    with pyflowkern.accelerate():
        new = model()
        assert not isinstance(new.__dict__.get("forward"), Door)
        for each in (old, new):
            each(x)
            assert isinstance(each.__dict__["forward"], Door)
            for part in each._transforms:
                assert any(isinstance(v, Door) for v in part.__dict__.values())
        assert all(map(torch.equal, old(x), want))
    assert CompositeTransform.forward is before
    for each in (old, new):
        assert not any(isinstance(v, Door) for m in each.modules() for v in m.__dict__.values())
    assert all(map(torch.equal, old(x), want))


def test_a_second_call_changes_nothing_and_one_restore_undoes_both(x):
    before = CompositeTransform.inverse
    pyflowkern.accelerate()
    patched = CompositeTransform.inverse
    pyflowkern.accelerate()
    assert CompositeTransform.inverse is patched
    pyflowkern.restore()
    assert CompositeTransform.inverse is before
    pyflowkern.restore()  # nothing to undo


def test_subclasses_run_their_own_code(x):
    class Mine(CompositeTransform):
        def forward(self, inputs, context=None):
            outputs, log_det = super().forward(inputs, context)
            return 2 * outputs, log_det

    mine = Mine([ReversePermutation(4)])
    with pyflowkern.accelerate():
        assert torch.equal(mine(x)[0], 2 * x.flip(1))
        assert "forward" not in mine.__dict__


def test_a_model_restored_within_runs_itself_until_the_next_call(x):
    with pyflowkern.accelerate():
        mine = model()
        want = mine(x)
        pyflowkern.restore(mine)
        assert all(map(torch.equal, mine(x), want))


def test_strict_needs_a_model():
    with pytest.raises(ValueError, match="strict=True needs a model"):
        pyflowkern.accelerate(strict=True)


def test_replicas_of_data_parallel_run_the_library_itself(x):
    mine = model()
    pyflowkern.accelerate(mine)
    replica = mine._replicate_for_data_parallel()
    assert not any(isinstance(v, Door) for v in replica.__dict__.values())
    assert any(isinstance(v, Door) for v in mine.__dict__.values())
    assert all(map(torch.equal, replica.forward(x), mine(x)))
