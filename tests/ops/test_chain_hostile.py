"""Programs that Python did not check: kernels compare every number with the tensors, and never trust one."""

import pytest
import torch
from cases.chain import K, sample, value
from laws.angles import angle_flows
from laws.foreign import foreign_flows

from pyflowkern import _library, ops
from pyflowkern.ops import (
    ChainLayer,
    ChainNetwork,
    ChainProgram,
    ElementsStep,
    LUStep,
    PermuteStep,
)
from pyflowkern.ops.chain import _backward_op, _op, run_chain

ORDERED = ChainLayer(2, 1, rows=[1, 0])


def program_of(layers, context="none", features=2):
    net = ChainNetwork(layers, context=context)
    return ChainProgram(features, [ElementsStep("exp", [1], [0], net)], K)


def run(program, codes, inverse=False, features=2):
    _library.require_kernels("cpu")
    tensors = [value(w, i, torch.float64) for i, w in enumerate(program.tensors)]
    x = torch.zeros(3, features, dtype=torch.float64)
    context = torch.zeros(3, K, dtype=torch.float64) if program.context_features else None
    kept = program.blocks
    z, log_det, kept = _op(x, context, codes, program.numbers, tensors, kept, inverse)
    given = z, log_det, x, kept, context, codes, program.numbers, tensors
    _backward_op(*given, inverse, True, context is not None, True)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(
    ("layers", "context", "at", "number", "message"),
    [
        ([ORDERED], "none", -1, 1, "an order that has 1 twice"),
        ([ORDERED], "none", -1, 2, "index 2 of 2"),
        ([ORDERED], "none", -1, -1, "index -1 of 2"),
        ([ORDERED], "none", -3, 4 + 64, "flags must"),
        ([ORDERED], "none", -3, 4 + 32, "bias of a context that is not added"),
        ([ORDERED], "none", -3, 4 + 8, "a context of a layer that takes none"),
        ([ChainLayer(2, 1, columns=[0])], "none", -1, 2, "ends too early"),
        ([ORDERED], "add", -10, 4, "context must be from 0 to 3, got 4"),
        ([ORDERED], "joined", -10, 1, "tensor 0 has 2 axes"),
        ([ORDERED], "activated", -10, 1, "does not end with its tensors"),
        ([ORDERED], "add", -10, 3, "too few tensors"),
        ([ORDERED], "none", -10, 2, "tensor 0 has 2 axes"),
        ([ORDERED], "none", -9, 0, "a layer of 1 inputs for 2"),
        ([ORDERED], "none", -9, 99, "numbers that a program has not"),
        ([ORDERED], "none", -12, 8, "flags must"),
        ([ORDERED], "none", 5, 4, "flags must"),
        ([ORDERED], "none", 5, 2, "splines with linear tails alone are turned"),
        ([ORDERED], "none", 15, 2, "maps of 2 features for 1"),
        ([ORDERED], "none", 6, 0, "tensor 0 has 2 axes"),
    ],
)
def test_a_number_that_does_not_fit_is_refused(layers, context, at, number, message, inverse):
    program = program_of(layers, context)
    run(program, program.codes, inverse)
    codes = program.codes.clone()
    codes[at] = number
    with pytest.raises(RuntimeError, match=message):
        run(program, codes, inverse)


def test_a_context_needs_features():
    program = ChainProgram(2, [ElementsStep("exp", [1], [0], ChainNetwork([ORDERED]))])
    for context in (1, 2, 3):
        codes = program.codes.clone()
        codes[-10] = context
        with pytest.raises(RuntimeError, match="a context that is not there"):
            run(program, codes)


def test_triangles_of_no_size_that_fits():
    program = ChainProgram(2, [LUStep()])
    codes = program.codes.clone()
    codes[-1] = 1
    with pytest.raises(RuntimeError, match="numbers that a program has not"):
        run(program, codes)
    codes = torch.tensor([129, 0, 0, 1, *program.codes[-2:]], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="triangles of 129 features"):
        run(ChainProgram(129, [PermuteStep([*range(129)])]), codes, features=129)


@pytest.mark.parametrize("inverse", [False, True])
def test_a_program_for_other_data_costs_nothing(inverse):
    """Tables of as many numbers as it says would be too large."""
    program = program_of([ORDERED])
    codes = program.codes.clone()
    for features in (2**31 - 1, 3, 1, 0, -1):
        codes[0] = features
        with pytest.raises(RuntimeError, match=f"x of 2 features for {features}"):
            run(program, codes, inverse)


@pytest.mark.parametrize("inverse", [False, True])
def test_any_number_of_a_program_may_be_another(inverse):
    """It is refused, or read as another program; what lies around is left alone."""
    _library.require_kernels("cpu")
    refused = 0
    for features, steps in (*foreign_flows(), *angle_flows()):
        given = sample(3, features, steps, torch.float64, inverse=inverse)
        program, x, context = given.fixed["program"], given.tensors["x"], given.tensors["context"]
        tensors = [t.clone() for t in given.tensors["tensors"]]
        expected = run_chain(x, context, program, tensors, inverse)
        for i in range(len(program.codes)):
            for number in (-1, int(program.codes[i]) + 1, 2**31 - 1):
                codes = program.codes.clone()
                codes[i] = number
                try:
                    z, log_det, kept = _op(
                        x, context, codes, program.numbers, tensors, program.blocks, inverse
                    )
                except RuntimeError:
                    refused += 1
                    continue
                saved = z, log_det, x, kept, context, codes, program.numbers, tensors
                _, _, grads = _backward_op(*saved, inverse, True, context is not None, True)
                assert z.shape == x.shape
                assert [g.shape for g in grads] == [t.shape for t in tensors]
        torch.testing.assert_close(run_chain(x, context, program, tensors, inverse), expected)
        for t, before in zip(tensors, given.tensors["tensors"], strict=True):
            assert torch.equal(t, before)
    assert refused > 1000


def test_tensors_of_these_steps_are_named(backend):
    layers = [
        ChainLayer(3, 1),
        ChainLayer(3, 3, context="add", context_bias=True),
        ChainLayer(2, 3),
    ]
    joined = ElementsStep("exp", [1], [0], ChainNetwork(layers, context="joined"))
    active = ElementsStep("exp", [1], [0], ChainNetwork(layers[::2], context="activated"))
    program = ChainProgram(2, [joined, active, LUStep()], K)
    names = [w.name for w in program.tensors]
    assert [tuple(w.shape) for w in program.tensors] == [
        *[(3, 1 + K), (3,), (3, 3), (3,), (3, K), (3,), (2, 3), (2,)],
        *[(3, 1), (3,), (2, 3), (2,), (3, K), (3,)],
        *[(1,), (1,), (2,), (2,)],
    ]
    assert names[5] == "bias of the context of layers[1] of steps[0]"
    tensors = [value(w, i, torch.float32) for i, w in enumerate(program.tensors)]
    x, context = torch.zeros(4, 2), torch.zeros(4, K)
    ops.chain(x, program, tensors, context=context)
    for i in range(len(tensors)):
        given = list(tensors)
        given[i] = torch.zeros(7, 7) if tensors[i].dim() == 2 else torch.zeros(7)
        with pytest.raises(ValueError, match=rf"tensors\[{i}\], the {names[i][:8]}"):
            ops.chain(x, program, given, context=context)
