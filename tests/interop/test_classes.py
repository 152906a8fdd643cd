"""accelerate() without a model: instances that other code builds, from their first call on."""

import pytest
import torch
from nflows.transforms import (
    CompositeTransform,
    LULinear,
    RandomPermutation,
    ReversePermutation,
)
from torch.fx.experimental.proxy_tensor import make_fx

import pyflowkern
from pyflowkern.interop import _check, _classes, _patches
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


def test_no_look_belongs_to_what_is_recorded(x):
    _check._agreed.clear()
    traced, made, mine = LULinear(4), LULinear(4), LULinear(4)
    wanted = len(make_fx(lambda v: made(v)[0])(x).graph.nodes)
    with pyflowkern.accelerate():
        assert torch.jit.trace(traced, (x,), check_trace=False)(x)[0].shape == x.shape
        assert len(make_fx(lambda v: made(v)[0])(x).graph.nodes) == wanted
        torch.func.vmap(lambda v: mine(v[None])[0])(x)
        for each in (traced, made, mine):
            assert "forward" not in each.__dict__
            each(x)
            assert isinstance(each.__dict__["forward"], Door)


def test_first_calls_under_autocast_count(x):
    _check._agreed.clear()
    mine = LULinear(4)
    with pyflowkern.accelerate(), torch.autocast("cpu", dtype=torch.bfloat16):
        mine(x)
        assert isinstance(mine.__dict__["forward"], Door)


def test_who_waits_while_all_is_restored_looks_no_more():
    mine = LULinear(4)
    _classes._look(mine, pyflowkern.accelerate)
    assert "forward" not in mine.__dict__
    assert mine not in _classes._seen


def test_libraries_that_fail_to_be_imported_are_not_there(tmp_path, monkeypatch):
    (tmp_path / "broken_flows.py").write_text("raise RuntimeError('made for another numpy')")
    monkeypatch.syspath_prepend(tmp_path)
    assert _classes.is_installed("broken_flows")
    assert _classes._class_of("broken_flows.Flow") is None
    broken = _patches.Patch("broken_flows", "broken_flows", ("f",), "pyflowkern.interop.nflows")
    monkeypatch.setattr(_patches, "PATCHES", (broken,))
    assert _patches.patch_functions() == []
