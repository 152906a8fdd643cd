"""Steps of a chain as the numbers that its kernels read, there and back."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from pyflowkern.core.codes import (
    ChainContext,
    ChainElementsFlag,
    ChainLayerFlag,
    ChainNetworkFlag,
    ChainStep,
    MaskedActivation,
    numbered,
)
from pyflowkern.ops.chain_network import ChainLayer, ChainNetwork
from pyflowkern.ops.chain_steps import (
    ActNormStep,
    ElementsStep,
    LinearStep,
    LUStep,
    PermuteStep,
    PLUStep,
    ShiftStep,
    Step,
)
from pyflowkern.ops.elements import ElementCode, ElementMap, element_code, element_of_code

__all__ = ["read_step", "write_step"]

_ACTIVATIONS = numbered(MaskedActivation)
_NAMES = list(_ACTIVATIONS)
_FIRST = numbered(ChainContext)
_MASKED, _COLUMNS, _ROWS, _ADDED, _GATED, _BIAS = (flag.value for flag in ChainLayerFlag)
_CENTRED, _TURNED = (flag.value for flag in ChainElementsFlag)
_RESIDUAL, _ACTIVATE_BLOCKS, _ACTIVATE_LAST = (flag.value for flag in ChainNetworkFlag)
#: In the place of where frequencies are.
_NO_ANGLES = -1
_CONTEXTS = {"none": 0, "add": _ADDED, "gate": _GATED}


def write_step(step: Step, program: list[int], numbers: list[float]) -> None:
    """Append a step to a program and its numbers."""
    if isinstance(step, PermuteStep):
        program += [ChainStep.PERMUTE.value, *step.order]
    elif isinstance(step, ActNormStep):
        program.append(ChainStep.ACTNORM.value)
    elif isinstance(step, LinearStep):
        program.append(ChainStep.LINEAR.value)
    elif isinstance(step, PLUStep):
        program.append(ChainStep.PLU.value)
    elif isinstance(step, ShiftStep):
        program += [ChainStep.SHIFT.value, len(numbers)]
        numbers.append(step.bound)
    elif isinstance(step, LUStep):
        program += [ChainStep.LU.value, len(numbers)]
        numbers.append(step.eps)
    else:
        _write_elements(step, program, numbers)


def _write_elements(step: ElementsStep, program: list[int], numbers: list[float]) -> None:
    net, groups, count = step.network, step.groups, len(step.moves)
    flags = _CENTRED * step.centred + _TURNED * step.turned
    program += [ChainStep.ELEMENTS.value, flags, len(groups)]
    for group in groups:
        code, per = element_code(group.transform), group.parameters
        program += [
            *(code.family, code.kind, code.tails, code.parameterization, code.bins, code.flags),
            *(len(numbers), len(code.numbers), group.features, per),
            *((per, 1) if step.layout == "feature_major" else (1, count)),
        ]
        numbers += code.numbers
    program += [len(step.reads), count]
    if net is None:
        program += [0, 0, 0, 0, _NO_ANGLES]
    else:
        flags = _RESIDUAL * net.residual
        flags += _ACTIVATE_BLOCKS * net.activate_blocks + _ACTIVATE_LAST * net.activate_last
        at = _NO_ANGLES if net.frequencies is None else len(numbers)
        numbers += net.frequencies or ()
        program += [len(net.layers), flags, _ACTIVATIONS[net.activation], _FIRST[net.context], at]
    program += [*step.reads, *step.moves]
    for layer in () if net is None else net.layers:
        flag = _MASKED * (layer.prefixes is not None)
        flag += _COLUMNS * (layer.columns is not None) + _ROWS * (layer.rows is not None)
        flag += _CONTEXTS[layer.context] + _BIAS * layer.context_bias
        program += [layer.outputs, layer.inputs, int(layer.bias), flag]
        program += [*(layer.prefixes or ()), *(layer.columns or ()), *(layer.rows or ())]


def read_step(features: int, program: Iterator[int], numbers: list[float]) -> Step:
    """Return the next step of a program."""
    kind = ChainStep(next(program))
    if kind == ChainStep.PERMUTE:
        return PermuteStep(tuple(islice(program, features)))
    if kind == ChainStep.SHIFT:
        return ShiftStep(numbers[next(program)])
    if kind == ChainStep.LU:
        return LUStep(numbers[next(program)])
    if kind == ChainStep.ELEMENTS:
        return _read_elements(program, numbers)
    if kind == ChainStep.ACTNORM:
        return ActNormStep()
    return LinearStep() if kind == ChainStep.LINEAR else PLUStep()


def _read_elements(program: Iterator[int], numbers: list[float]) -> ElementsStep:
    step_flags, groups = islice(program, 2)
    transforms: list[ElementMap] = []
    param_step = 1
    for _ in range(groups):
        family, kind, tails, parameterization, bins, flags, at, size = islice(program, 8)
        own = numbers[at : at + size]
        code = ElementCode(family, kind, tails, parameterization, bins, own, flags)
        count, _, _, param_step = islice(program, 4)
        transforms += [element_of_code(code)] * count
    reads, moves, depth, form, activation, context, at = islice(program, 7)
    frequencies = None if at == _NO_ANGLES else numbers[at : at + reads]
    features = tuple(islice(program, reads)), tuple(islice(program, moves))
    layers = []
    for _ in range(depth):
        outputs, inputs, bias, flag = islice(program, 4)
        prefixes = tuple(islice(program, outputs)) if flag & _MASKED else None
        columns = tuple(islice(program, inputs)) if flag & _COLUMNS else None
        rows = tuple(islice(program, outputs)) if flag & _ROWS else None
        how = "gate" if flag & _GATED else "add" if flag & _ADDED else "none"
        orders = prefixes, columns, rows
        layers.append(ChainLayer(outputs, inputs, bool(bias), *orders, how, bool(flag & _BIAS)))
    network = None
    if layers:
        network = ChainNetwork(
            tuple(layers),
            _NAMES[activation],
            bool(form & _RESIDUAL),
            bool(form & _ACTIVATE_LAST),
            list(_FIRST)[context],
            bool(form & _ACTIVATE_BLOCKS),
            frequencies,
        )
    layout = "feature_major" if param_step == 1 else "blocked"
    marks = bool(step_flags & _CENTRED), bool(step_flags & _TURNED)
    return ElementsStep(transforms, features[1], features[0], network, layout, *marks)
