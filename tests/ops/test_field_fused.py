"""The one launch of a narrow field on CUDA, run on the host: every way against float64, and counted."""

import ctypes
from contextlib import contextmanager

import on_host
import pytest
import torch
from cases.field import layers, sample
from laws import Calls, hold, normal

from pyflowkern import nn
from pyflowkern.ops import field_divergence, field_divergence_reference
from pyflowkern.ops.field import ACTIVATIONS


@pytest.fixture
def host_kernels(cuda_on_host):
    """CUDA's kernels on the host, with so many bytes of shared memory; counts launches."""
    loaded = ctypes.CDLL(str(cuda_on_host))
    loaded.pfk_launches.restype = ctypes.c_int64

    @contextmanager
    def kernels(shared):
        counts, before = [], loaded.pfk_launches()
        loaded.pfk_limit_shared(ctypes.c_int64(shared))
        try:
            with on_host.kernels(cuda_on_host):
                yield counts
        finally:
            loaded.pfk_limit_shared(ctypes.c_int64(48 * 1024))
            counts.append(loaded.pfk_launches() - before)

    return kernels


#: Shared memory of a block of an H100; what holds one layer at a time; what holds none.
RESIDENT, STAGED, NONE = 227 << 10, 120 << 10, 0
NARROW = [(7,), (64, 60, 5), (128, 128, 43, 128), ()]


@pytest.mark.parametrize("shared", [RESIDENT, STAGED, NONE])
def test_a_narrow_field_is_one_launch(host_kernels, shared):
    for hidden in NARROW:
        x, parts = (
            normal(70, 5, dtype=torch.float32),
            layers((5, *hidden, 5), torch.float32, gates=True),
        )
        with host_kernels(shared) as counts:
            field_divergence(x, *parts, probe=torch.tensor(3), regularizers=True)
        assert counts == [1 if shared else len(hidden) + 2]


@pytest.mark.parametrize("time", ["concat", "concatsquash"])
def test_an_evaluation_at_a_time_is_two_launches(host_kernels, time):
    """Of FFJORD's fields: their parameters at the time, and velocity and divergence; no other op of torch computes."""
    field = nn.VectorFieldMLP(6, (60, 60, 60), time=time)
    x, t, seed = normal(70, 6, dtype=torch.float32), torch.tensor(0.3), torch.tensor(3)
    with torch.no_grad(), host_kernels(RESIDENT) as counts, Calls() as calls:
        field.velocity_and_divergence(t, x, probe=seed)
    assert counts == [2]
    assert calls.names == ["pyflowkern::field_time", "pyflowkern::field_divergence"]


@pytest.mark.parametrize("shared", [RESIDENT, STAGED, NONE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("hidden", NARROW, ids=str)
def test_narrow_fields_by_every_way(host_kernels, hidden, dtype, shared):
    """Values, and gradients from what was kept: tiles of several samples, tails, own parameters."""
    for i, (n, d, k) in enumerate(((3, 1, 1), (150, 6, 1), (37, 43, 2), (9, 5, 20))):
        for gates, own in ((False, False), (True, True)):
            options = {"activation": ACTIVATIONS[(i + gates) % 4], "regularizers": gates}
            options |= {"own": own, "gates": gates}
            seeded = sample(n, hidden, dtype, d, probe=torch.tensor(5), probes=k, **options)
            given = sample(n, hidden, dtype, d, probe=k, **options)
            with host_kernels(shared):
                for found in (seeded, given):
                    hold(field_divergence, field_divergence_reference, found, 16)


@pytest.mark.parametrize("hidden", NARROW, ids=str)
def test_bits_do_not_depend_on_the_tile(host_kernels, hidden):
    x, e = (normal(150, 6, seed=i, dtype=torch.float32) for i in (0, 1))
    parts = layers((6, *hidden, 6), torch.float32)
    with host_kernels(RESIDENT):
        found = field_divergence(x, *parts, probe=e)
        alone = field_divergence(x[77:78], *parts, probe=e[77:78])
    with host_kernels(STAGED):
        staged = field_divergence(x, *parts, probe=e)
    for a, b, c in zip(found, alone, staged, strict=True):
        assert torch.equal(a[77:78], b)
        assert torch.equal(a, c)
