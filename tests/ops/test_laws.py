"""Every op of tests/cases obeys every law, on the backends where a law can differ."""

import pytest
from cases import CASES
from laws import graph_checks as graphs
from laws import op_arguments as arguments
from laws import op_checks as laws

from pyflowkern import _library, ops

batched = pytest.mark.parametrize("case", [c for c in CASES if c.rows], ids=str)
public = pytest.mark.parametrize("case", [c for c in CASES if str(c) in ops.__all__], ids=str)
each = pytest.mark.parametrize("case", CASES, ids=str)
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
#: What does not depend on how a kernel computes runs on the kernels of this processor; what also tells of the reference
#: on both.
kernels = pytest.mark.parametrize("backend", ["cpu", CUDA], indirect=True)
both = pytest.mark.parametrize("backend", ["reference", "cpu", CUDA], indirect=True)
#: What a kernel does with a missing gradient is the same source at every SIMD level.
sources = pytest.mark.parametrize(
    "backend", ["reference", "cpu", "cuda_on_host", CUDA], indirect=True
)


@each
def test_values_and_gradients_against_float64(backend, case, request):
    """The reference is what kernels are compared with: of the op that runs it a few arguments tell enough.

    So they do where kernels of GPUs leave arguments to it.
    """
    name = request.node.callspec.params["backend"]
    for dtype in case.dtypes:
        few = [*case.drawn("small", dtype)] if name in ("reference", "cuda_on_host") else []
        many = [*case.drawn("samples", dtype)] if name != "reference" else []
        if name == "cuda_on_host":
            few = [sample for sample in few if case.by_reference(sample)]
            many = [sample for sample in many if not case.by_reference(sample)]
        for sample in (*few, *many):
            laws.check_errors(case, sample)


@each
@both
def test_derivatives_against_differences(backend, case):
    """Gradients of kernels meet float64 ones on every backend; formulas of second derivatives are Python on all."""
    laws.check_second_derivatives(case)


@each
@sources
def test_gradients_of_parts(backend, case):
    laws.check_gradients_of_parts(case)


@pytest.mark.parametrize("case", [c for c in CASES if c.log_det], ids=str)
@both
def test_log_det_is_that_of_the_jacobian(backend, case):
    laws.check_log_det_is_that_of_the_jacobian(case)


@pytest.mark.parametrize("layout", laws.LAYOUTS)
@each
def test_strides(backend, case, layout):
    laws.check_strides(case, layout)


@batched
def test_empty_and_single_batches(backend, case, request):
    name = request.node.callspec.params["backend"]

    def bits(sample):
        on_gpu = name.startswith("cuda")
        return (
            name != "reference" and not case.shares and not (on_gpu and case.by_reference(sample))
        )

    laws.check_empty_and_single_batches(case, bits)


@batched
def test_a_bad_sample_stays_alone(backend, case):
    laws.check_bad_samples(case)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.large and c.rows and not c.shares], ids=str
)
@kernels
def test_bits_do_not_depend_on_the_place_in_the_batch(backend, case):
    laws.check_place_in_the_batch(case)


@pytest.mark.parametrize("case", [c for c in CASES if c.large], ids=str)
@kernels
def test_bits_do_not_depend_on_threads_nor_on_the_run(backend, case):
    laws.check_determinism(case, (1, 2, 3, 1))


@each
@both
def test_autocast_changes_nothing(backend, case):
    laws.check_autocast(case, backend)


@each
@both
def test_function_transforms(backend, case):
    laws.check_function_transforms(case)


@each
@kernels
def test_every_number_is_written(backend, case):
    graphs.check_every_number_is_written(case)


@each
@kernels
def test_registration(backend, case):
    graphs.check_registration(case)


@each
@both
def test_compiles_into_one_graph(backend, case, request):
    if request.node.callspec.params["backend"] == "reference":  # long graphs of torch's own ops
        graphs.check_compiles(case, "eager", slice(1))
    else:
        graphs.check_compiles(case, "aot_eager", slice(1, 3))


@each
@kernels
def test_inductor_finds_the_strides_that_it_was_told(backend, case):
    """And the first sample, which the test above leaves to this one, compiles into one graph."""
    graphs.check_compiles(case, "inductor", slice(1), graphs.STRIDES)


@public
@both
def test_wrong_arguments_are_named(backend, case):
    arguments.check_arguments_are_named(case)
    arguments.check_other_dtypes_are_named(case)


@public
@kernels
def test_dtypes_may_be_mixed(backend, case):
    arguments.check_mixed_dtypes(case)


@each
@kernels
def test_no_dtype_is_read_as_another(backend, case):
    graphs.check_no_dtype_is_read_as_another(case)


# --- every op has a case -------------------------------------------------------------------------


#: Public names that are no ops on tensors: tests/ops/test_arguments.py calls them with wrong arguments.
HELPERS = {
    *("MaskedLayer", "MaskedPlan", "ScaleMap", "SplineMap", "scale_map"),
    *("channel_split_sizes", "checkerboard_mask", "draw_probe", "rademacher"),
    *(
        "ActNormStep",
        "ElementsStep",
        "LUStep",
        "LinearStep",
        "PLUStep",
        "PermuteStep",
        "ShiftStep",
    ),
    *("ChainLayer", "ChainNetwork", "ChainProgram"),
    "Sinkhorn",  # a result
}


def test_every_public_op_has_a_case():
    wanted = {n for n in ops.__all__ if not n.endswith("_reference")}
    assert wanted == {str(case) for case in CASES} & wanted | HELPERS


@kernels
def test_every_registered_op_runs_in_a_case(backend):
    seen = {func._opname for case in CASES for func, _ in graphs.recorded(case)}
    assert set(_library.OPS) == seen
