"""Every layer of tests/cases/nn.py obeys every law of a bijection, on the backends where a law can differ."""

import functools

import pytest
import torch
from cases.nn import LAYERS
from laws import module_checks as laws
from laws import normal
from laws.graph_checks import STRIDES
from torch.distributions import Independent, Normal, TransformedDistribution

from pyflowkern import flows, nn

every_layer = pytest.mark.parametrize("case", LAYERS, ids=str)
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
#: What kernels compute has the laws of ops on every backend; here it is seen once that layers use them as they should.
kernels = pytest.mark.parametrize("backend", ["cpu", CUDA], indirect=True)
#: With the C++ that it writes, which the flows of the same law have, too; of long graphs the strides alone.
INDUCTOR = {
    "glow step": None,
    **dict.fromkeys(("affine", "spline image", "autoregressive residual", "multi-scale"), STRIDES),
}
both = pytest.mark.parametrize("backend", ["reference", "cpu", CUDA], indirect=True)


@functools.cache
def first_of_their_classes():
    """Return the names of a case of each class."""
    cases = {type(case.build()): str(case) for case in reversed(LAYERS)}
    return {*cases.values()}


@every_layer
@both
def test_inverse_undoes_forward(backend, case):
    laws.check_the_inverse(case)


@every_layer
@both
def test_log_det_is_that_of_the_jacobian(backend, case):
    laws.check_the_log_det(case)


@every_layer
@kernels
def test_values_and_gradients_are_those_of_the_reference(backend, case):
    laws.check_reference(case)


@every_layer
@both
def test_a_bad_sample_stays_alone(backend, case):
    laws.check_bad_samples(case)


@every_layer
@kernels
def test_copies_compute_the_same(backend, case):
    laws.check_copies_and_meta(case)


@every_layer
@kernels
def test_every_parameter_has_a_gradient(backend, case):
    laws.check_every_parameter_learns(case)


@every_layer
@both
def test_empty_and_single_batches(backend, case):
    laws.check_empty_and_single_batches(case)


@every_layer
def test_shapes(case):
    laws.check_shapes(case)


@every_layer
@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types(backend, case, dtype):
    laws.check_half_types(case, dtype)


@every_layer
@kernels
def test_autocast(backend, case):
    laws.check_autocast(case)


@every_layer
@kernels
def test_compiles_into_one_graph(backend, case):
    """Each class once with what lies below: views, what is written in place, and its gradients in a graph."""
    laws.check_compiles(case, "aot_eager" if str(case) in first_of_their_classes() else "eager")


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in LAYERS if c.name in INDUCTOR], ids=str)
@kernels
def test_compiles_with_inductor(backend, case):
    laws.check_compiles(case, "inductor", INDUCTOR[case.name])


@every_layer
@kernels
def test_bits_depend_on_neither_threads_nor_the_run(backend, case):
    laws.check_determinism(case, (1, 2, 3))


@every_layer
@both
def test_function_transforms(backend, case):
    laws.check_function_transforms(case)


@every_layer
@kernels
@pytest.mark.parametrize("layout", laws.LAYOUTS)
def test_strides(backend, case, layout):
    laws.check_strides(case, layout)


@every_layer
def test_transform_is_a_torch_transform(case):
    laws.check_transform(case)


@every_layer
def test_wrong_arguments_are_named(case):
    laws.check_wrong_arguments(case)


def test_every_layer_has_a_case():
    public = {getattr(nn, name) for name in nn.__all__} | {flows.ContinuousBijection}
    wanted = {c for c in public if isinstance(c, type) and issubclass(c, nn.Bijection)}
    assert {type(case.build()) for case in LAYERS} == wanted - {nn.Bijection}


def test_transform_makes_a_density():
    layer, x = nn.InvertibleLinear(5).double(), normal(3, 5)
    base = Independent(Normal(torch.zeros(5).double(), torch.ones(5).double()), 1)
    density = TransformedDistribution(base, [layer.transform().inv])
    z, log_det = layer(x)
    torch.testing.assert_close(density.log_prob(x), base.log_prob(z) + log_det)
    assert density.rsample((4,)).shape == (4, 5)


def test_sequential_holds_bijections_only():
    with pytest.raises(TypeError, match=r"layers\[1\] must be a Bijection, got ReLU"):
        nn.Sequential(nn.Reverse(2), torch.nn.ReLU())
