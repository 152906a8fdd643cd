"""Entropic optimal transport of many points: sums over long rows, and the memory that they take."""

import fresh
import pytest
import torch
from cases.transport import clouds
from laws import normal

from pyflowkern import ops
from pyflowkern.ops import transport as module

on_cpu = pytest.mark.parametrize("backend", ["cpu"], indirect=True)


@on_cpu
@pytest.mark.parametrize("schedule", ["alternating", "symmetric"])
@pytest.mark.parametrize("d", [2, 5])
def test_long_rows_are_summed_in_double(backend, schedule, d):
    """A point and 200,000 others, whose kernel is kept: equal terms round alike, if in float32 alone."""
    y = 1e-3 * normal(1, 200_000, d)
    x, one = torch.zeros(1, 1, d).double(), torch.ones(1, 1).double()
    b = torch.full((1, 200_000), 1 / 200_000).double()
    options = {"epsilon": 1.0, "max_iterations": 3, "tolerance": 0.0, "schedule": schedule}
    single, double = (
        ops.sinkhorn(x.to(dtype), y.to(dtype), one, b, **options)
        for dtype in (torch.float32, torch.float64)
    )
    # a sum of 2048 / 16 terms a lane has a rounding of 64 half units of its last place at most
    assert float((single.f - double.f).abs().max()) < 64 * 2.0**-24
    assert float(single.error) < 64 * 2.0**-24


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-53])
def test_the_ends_draw_no_column_of_tiles_without_mass(backend, uniform):
    """The smallest and the largest uniform number, and no mass in the first and the last 300 columns."""
    columns = 5000
    b = torch.rand(1, columns, generator=torch.Generator().manual_seed(0)).double()
    b[:, :300] = b[:, -300:] = 0.0
    x, y = torch.zeros(1, 20, 1).double(), torch.zeros(1, columns, 1).double()
    zeros = {"f": normal(1, 20), "g": torch.zeros(1, columns).double()}
    a = torch.full((1, 20), 1 / 20).double()
    u = torch.full((1, 20), uniform, dtype=torch.float64)
    drawn = ops.plan_draw(x, y, a, b, **zeros, uniforms=u, epsilon=1.0)
    assert (b[0, drawn[0]] > 0).all()


MEMORY = """
import resource, torch
from pyflowkern import ops

n = 50_000
x, y = (torch.randn(1, n, 2, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
mass = torch.full((1, n), 1 / n, dtype=torch.float64)
small = [t[:, :100] for t in (x, y, mass, mass)]
ops.sinkhorn(*small, epsilon=0.5, max_iterations=1, tolerance=0.0)  # what a first call takes
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out = ops.sinkhorn(x, y, mass, mass, epsilon=0.5, max_iterations=1, tolerance=0.0)
ops.plan_draw(x[:, :1000], y, mass[:, :1000], mass, out.f[:, :1000], out.g, mass[:, :1000], epsilon=0.5)
assert bool(out.cost.isfinite())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_grows_with_the_points():
    """Two clouds of 50,000 points, whose matrix would take 10 GB, in a process of its own: nothing else had a peak."""
    done = fresh.run(MEMORY)
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) < 200_000  # KiB


@on_cpu
def test_a_backward_pass_goes_over_the_pairs_for_wanted_points_alone(backend, monkeypatch):
    calls, product = [], module._product
    monkeypatch.setattr(module, "_product", lambda *given: calls.append(1) or product(*given))
    for names, passes in ((("a", "b"), 0), (("x",), 1), (("y", "a"), 1), (("x", "y"), 2)):
        given = clouds(1, 9, 7, 2, torch.float64)
        leaves = {k: t.requires_grad_() if k in names else t for k, t in given.items()}
        ops.sinkhorn(**leaves, epsilon=0.3).cost.sum().backward()
        assert all((t.grad is not None) == (k in names) for k, t in leaves.items())
        assert len(calls) == passes
        calls.clear()


def test_under_vmap_iterations_cannot_depend_on_numbers():
    given = clouds(3, 5, 4, 2, torch.float64)
    mapped = {name: t[:, None] for name, t in given.items()}
    names, tensors = list(mapped), tuple(mapped.values())

    def cost(options):
        return torch.vmap(
            lambda *t: (
                ops.sinkhorn(
                    **dict(zip(names, t, strict=True)), epsilon=0.5, max_iterations=20, **options
                ).cost
            )
        )(*tensors)

    options = {"tolerance": 0.0}
    wanted = ops.sinkhorn(**given, epsilon=0.5, max_iterations=20, **options).cost
    torch.testing.assert_close(cost(options)[:, 0], wanted)
    for wrong in (
        {},
        options | {"epsilon_scaling": 0.5},
        options | {"schedule": "accelerated"},
    ):
        with pytest.raises(ValueError, match=r"tolerance must be 0, .* under vmap"):
            cost(wrong)
