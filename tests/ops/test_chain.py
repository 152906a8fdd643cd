"""Chains of transforms: their programs, there and back, and what is refused."""

import copy
import pickle

import pytest
import torch
from cases.chain import (
    K,
    autoregressive,
    coupling,
    gated_steps,
    network,
    sample,
    value,
    whole_flows,
)
from cases.spline import every_map
from laws import normal
from laws.foreign import foreign_flows

from pyflowkern import _library, ops
from pyflowkern.core.activations import ACTIVATIONS
from pyflowkern.ops import (
    ActNormStep,
    ChainLayer,
    ChainNetwork,
    ChainProgram,
    ElementsStep,
    LinearStep,
    PermuteStep,
    PLUStep,
    ScaleMap,
    ShiftStep,
    SplineMap,
)
from pyflowkern.ops._chain_reference import run_steps
from pyflowkern.ops.chain import run_chain

MAPS = [
    *every_map(3),
    *(ScaleMap(kind, gain=0.5, shift_first=True) for kind in ("exp", "tanh", "atan", "additive")),
    ScaleMap("sigmoid", offset=2.0, eps=1e-3, divide=True),
    ScaleMap("softplus", max_scale=7.0),
    ScaleMap("softclip", clamp=3.0),
]


def programs():
    """Programs with every step and option."""
    for features, steps in whole_flows():
        yield ChainProgram(features, steps, K, "normal")
    for transform in MAPS:
        yield ChainProgram(5, [coupling(transform, 5), ElementsStep(transform, [3])])
        yield ChainProgram(4, [autoregressive(transform, [1, 3, 0, 2])])
    for activation in ACTIVATIONS:
        steps = [
            coupling("exp", 3, (4,) * 3, residual=True, activation=activation, context="add"),
            autoregressive("exp", [2, 0, 1], (4,) * 3, residual=True, activate_last=False),
        ]
        yield ChainProgram(3, steps, K)
    yield ChainProgram(3, [*gated_steps(context="add")], K)
    for features, steps in foreign_flows():
        yield ChainProgram(features, steps, K)
    yield ChainProgram(1, [])
    yield ChainProgram(2, [PermuteStep([1, 0]), ActNormStep(), LinearStep(), PLUStep()])
    yield ChainProgram(2, [ShiftStep(1.5), ShiftStep(0.5)], base="normal")


def test_programs_come_back_from_their_numbers():
    for program in programs():
        again = ChainProgram.of(program.codes, program.numbers)
        assert again == program
        assert torch.equal(again.codes, program.codes)
        assert torch.equal(again.numbers, program.numbers)
        for copied in (copy.deepcopy(program), pickle.loads(pickle.dumps(program))):
            assert copied == program
            assert hash(copied) == hash(program)
            assert copied.tensors == program.tensors


def test_programs_lie_on_the_host_whatever_the_defaults_are():
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            program = ChainProgram(2, [ShiftStep(1.5)])
    finally:
        torch.set_default_dtype(torch.float32)
    assert program.codes.dtype == torch.int32
    assert program.codes.tolist() == [2, 0, 0, 1, 4, 0]
    assert program.numbers.dtype == torch.float64
    assert program.numbers.tolist() == [1.5]


def test_the_first_numbers_of_elements():
    """As csrc/chain reads them, one after the other."""
    step = coupling("tanh", 4, (5,), context="add")
    program = ChainProgram(4, [step], K)
    head = [4, K, 0, 1, 5]
    own = [0, 1, 0, 1, 0, 0, 0, 0, 0, 6, 2, 2, 1, 2, 2, 2, 2, 2 + 4, 1, 1, -1]
    assert program.codes.tolist() == [*head, *own, 0, 1, 2, 3, 5, 2, 1, 0, 4, 5, 1, 0]
    assert program.numbers.tolist() == ScaleMap("tanh").numbers
    masked = ChainProgram(2, [autoregressive("tanh", [1, 0], (2,))])
    layers = [2, 2, 1, 1 + 2, 1, 1, 1, 0, 4, 2, 1, 1 + 4, 0, 0, 2, 2, 2, 3, 0, 1]
    assert masked.codes.tolist()[-len(layers) - 4 :] == [1, 0, 1, 0, *layers]


def test_kept_blocks_are_the_inputs_of_steps_that_compute():
    steps = [PermuteStep([1, 0]), ActNormStep(), PermuteStep([1, 0]), LinearStep()]
    assert ChainProgram(2, steps).blocks == 3


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: PermuteStep([0, 0]), ValueError, "order must be a permutation"),
        (lambda: PermuteStep([0, 1.5]), TypeError, r"order\[1\] must be an int"),
        (lambda: ShiftStep(0.0), ValueError, "bound must be positive"),
        (lambda: ShiftStep("1"), TypeError, "bound must be a number"),
        (lambda: ChainLayer(2, -1), ValueError, "inputs must be at least 0"),
        (lambda: ChainLayer(2, 3, bias=1), TypeError, "bias must be True or False"),
        (lambda: ChainLayer(2, 3, prefixes=[2, 1]), ValueError, "prefixes must be 2 ascending"),
        (lambda: ChainLayer(2, 3, prefixes=[2, 4]), ValueError, "from 0 to 3"),
        (lambda: ChainNetwork([]), ValueError, "layers must be one at least"),
        (lambda: ChainNetwork([3]), TypeError, r"layers\[0\] must be a ChainLayer, got int"),
        (
            lambda: ChainNetwork([ChainLayer(2, 3), ChainLayer(2, 3)]),
            ValueError,
            r"layers\[1\] must read the 2 units",
        ),
        (
            lambda: ChainNetwork([ChainLayer(2, 3)] * 1, activation="swish"),
            ValueError,
            "activation must be one of identity, relu",
        ),
        (lambda: ChainLayer(2, 3, context="glu"), ValueError, "context must be one of"),
        (
            lambda: ChainNetwork([ChainLayer(2, 3, context="gate"), ChainLayer(2, 2)]),
            ValueError,
            r"layers\[0\] must have context='none'",
        ),
        (
            lambda: ChainProgram(3, list(gated_steps())),
            ValueError,
            "context_features must be positive",
        ),
        (lambda: network(2, (3, 4), 2, residual=True), ValueError, "blocks are pairs"),
        (lambda: network(2, (3, 4, 3), 2, residual=True), ValueError, "must have the 3 units"),
        (lambda: network(2, (3,), 2, activate_last=False), ValueError, "activate_last=False"),
        (lambda: ElementsStep("tanh", []), ValueError, "moves must name a feature"),
        (lambda: ElementsStep("tanh", [0, 0]), ValueError, "moves must name each feature once"),
        (lambda: ElementsStep("no such", [0]), ValueError, "transform must be"),
        (lambda: ElementsStep("tanh", [0], [1]), ValueError, "reads must be empty without"),
        (lambda: ElementsStep("tanh", [0], [1], 3), TypeError, "network must be a ChainNetwork"),
        (
            lambda: ElementsStep("tanh", [0], [1], network(2, (3,), 2)),
            ValueError,
            r"network must map 1 numbers to 2, got \(2, 2\)",
        ),
        (lambda: ElementsStep("tanh", [0], layout="rows"), ValueError, "layout must be one of"),
        (lambda: ChainProgram(0, []), ValueError, "features must be at least 1"),
        (lambda: ChainProgram(2, [3]), TypeError, r"steps\[0\] must be a step"),
        (lambda: ChainProgram(2, [], base="uniform"), ValueError, "base must be one of"),
        (lambda: ChainProgram(3, [PermuteStep([1, 0])]), ValueError, r"steps\[0\] must order 3"),
        (lambda: ChainProgram(129, [PLUStep()]), ValueError, "must be a LinearStep"),
        (lambda: ChainProgram(2, [coupling("exp", 3)]), ValueError, "name features below 2"),
        (
            lambda: ChainProgram(3, [coupling("exp", 3, context="add")]),
            ValueError,
            "context_features must be positive",
        ),
    ],
)
def test_what_is_no_program_is_refused(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_networks_that_see_what_they_move_are_refused():
    """Their log-determinant would not be the sum over elements."""
    with pytest.raises(ValueError, match="parameters of feature 0 without this and later ones"):
        ElementsStep("tanh", [0], [0], network(1, (3,), 2))
    with pytest.raises(ValueError, match="parameters of feature 2 without"):
        ElementsStep("tanh", [0, 2], [1, 2], network(2, (3,), 4))
    last = ChainLayer(4, 2, prefixes=[0, 0, 1, 2])
    for prefixes, fits in (([0, 1], True), ([0, 2], False)):
        net = ChainNetwork([ChainLayer(2, 2, prefixes=prefixes), last])
        if fits:
            ElementsStep("tanh", [0, 1], [0, 1], net)
        else:
            with pytest.raises(ValueError, match="parameters of feature 1 without"):
                ElementsStep("tanh", [0, 1], [0, 1], net)
    blocked = ChainNetwork([ChainLayer(4, 2, prefixes=[0, 1, 1, 1])])
    with pytest.raises(ValueError, match="parameters of feature 0 without"):
        ElementsStep("tanh", [0, 1], [0, 1], blocked, layout="blocked")
    # through the sum of a residual block, too: the first unit sees nothing, its block everything
    layers = [
        ChainLayer(2, 2, prefixes=[0, 1]),
        ChainLayer(2, 2, prefixes=[2, 2]),
        ChainLayer(2, 2, prefixes=[1, 1]),
        ChainLayer(4, 2, prefixes=[1, 1, 1, 1]),
    ]
    with pytest.raises(ValueError, match="parameters of feature 0 without"):
        ElementsStep("tanh", [0, 1], [0, 1], ChainNetwork(layers, residual=True))


def test_wrong_tensors_are_named(backend):
    program = ChainProgram(3, [ActNormStep(), PLUStep()])
    tensors = [value(w, i, torch.float32) for i, w in enumerate(program.tensors)]
    x = torch.zeros(4, 3)
    ops.chain(x, program, tensors)
    for i, bad, error, message in (
        (0, torch.zeros(2), ValueError, r"tensors\[0\], the log_scale of steps\[0\], must have"),
        (3, torch.zeros(3, 4), ValueError, r"tensors\[3\], the lower of steps\[1\]"),
        (2, torch.zeros(3), TypeError, r"tensors\[2\], the permutation .* int64 tensor"),
        (1, torch.zeros(3, dtype=torch.float64), TypeError, r"tensors\[1\].* dtype of x"),
    ):
        given = [bad if k == i else t for k, t in enumerate(tensors)]
        with pytest.raises(error, match=message):
            ops.chain(x, program, given)
    with pytest.raises(ValueError, match=r"context must be None, got \(4, 2\)"):
        ops.chain(x, program, tensors, context=torch.zeros(4, 2))
    with pytest.raises(TypeError, match=r"program must be a ChainProgram, got list"):
        ops.chain(x, [], tensors)


def test_a_base_adds_its_density(backend):
    given = sample(7, 4, [coupling(SplineMap(bins=3), 4), ActNormStep()], torch.float32)
    tensors, x = given.tensors["tensors"], given.tensors["x"]
    plain, with_base = (
        ops.chain(x, ChainProgram(4, given.fixed["program"].steps, base=base), tensors)
        for base in ("none", "normal")
    )
    torch.testing.assert_close(with_base[0], plain[0])
    torch.testing.assert_close(with_base[1], plain[1] + ops.normal_log_prob(plain[0]))


@pytest.mark.parametrize("inverse", [False, True])
def test_masked_weights_do_not_count(backend, inverse):
    """Neither their values nor NaN in them, and their gradients are zero."""
    given = sample(6, 4, [autoregressive("tanh", [1, 3, 0, 2], (5, 8))])
    program, x = given.fixed["program"], given.tensors["x"]
    tensors = given.tensors["tensors"]
    expected = ops.chain(x, program, tensors, inverse=inverse)
    net, spoilt, masks = program.steps[0].network, list(tensors), []
    for k, layer in enumerate(net.layers):
        mask = torch.arange(layer.inputs) < torch.tensor(layer.prefixes)[:, None]
        if layer.columns:
            mask = mask[:, torch.argsort(torch.tensor([1, 3, 0, 2]))]
        if layer.rows:
            mask = mask.view(4, 2, -1)[torch.argsort(torch.tensor([1, 3, 0, 2]))].flatten(0, 1)
        masks.append(mask)
        spoilt[2 * k] = torch.where(mask, tensors[2 * k], torch.nan).requires_grad_()
    found = ops.chain(x, program, spoilt, inverse=inverse)
    torch.testing.assert_close(found, expected)
    weights = spoilt[::2]
    grads = torch.autograd.grad((found[0] ** 2).sum() + found[1].sum(), weights)
    for mask, g in zip(masks, grads, strict=True):
        assert (g[~mask] == 0).all()
        assert (g[mask] != 0).any()


def test_gates_are_gated_linear_units(backend):
    """As in the residual blocks of Durkan et al. (2019)."""
    step = next(gated_steps(context="add"))
    given = sample(20, 3, [step], torch.float64)
    program, x, context = given.fixed["program"], given.tensors["x"], given.tensors["context"]
    tensors = given.tensors["tensors"]
    left, linear = iter(tensors), torch.nn.functional.linear
    h = linear(x[:, list(step.reads)], next(left), next(left)) + linear(context, tensors[-1])
    for _ in range(2):
        inner = linear(torch.nn.functional.silu(h), next(left), next(left))
        inner = linear(torch.nn.functional.silu(inner), next(left), next(left))
        gate = linear(context, next(left), next(left))
        h = h + torch.nn.functional.glu(torch.cat([inner, gate], 1), 1)
    shift, raw = linear(h, next(left), next(left)).chunk(2, 1)
    moved, log_det = ops.affine(x[:, list(step.moves)], raw, shift, scale_map="tanh")
    z, found = ops.chain(x, program, tensors, context=context)
    torch.testing.assert_close(z[:, list(step.moves)], moved)
    torch.testing.assert_close(found, log_det)


def test_an_autoregressive_step_is_undone(backend):
    """By one op, whatever lies between such steps; NaN in one sample stays there."""
    steps = [
        autoregressive(SplineMap(bins=4), [4, 0, 3, 1, 2], (30, 20), context="add"),
        PermuteStep([2, 4, 0, 1, 3]),
        autoregressive("tanh", [0, 1, 2, 3, 4], (13,) * 5, residual=True, activation="silu"),
        coupling(SplineMap(bins=4), 5),
    ]
    given = sample(300, 5, steps)
    program, tensors = given.fixed["program"], given.tensors["tensors"]
    x, context = given.tensors["x"], given.tensors["context"]
    z, log_det = ops.chain(x, program, tensors, context=context)
    found, back = ops.chain(z, program, tensors, context=context, inverse=True)
    torch.testing.assert_close(found, x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(back, -log_det, rtol=1e-8, atol=1e-8)
    z[7] = torch.nan
    spoilt, _ = ops.chain(z, program, tensors, context=context, inverse=True)
    others = torch.arange(300) != 7
    assert torch.equal(spoilt[others], found[others])
    assert spoilt[7].isnan().all()


def test_kernels_refuse_networks_that_see_what_they_have_to_find():
    """A program that Python did not check; the forward pass has no use for the order."""
    _library.require_kernels("cpu")
    step = autoregressive("tanh", [0, 1], (2,))
    program = ChainProgram(2, [step])
    tensors = [value(w, i, torch.float64) for i, w in enumerate(program.tensors)]
    last = program.codes[-4:]  # how many units the outputs read
    assert last.tolist() == [0, 0, 2, 2]
    last[:] = 2
    with pytest.raises(RuntimeError, match="depend on it or on later ones"):
        run_chain(normal(3, 2), None, program, tensors, True)


def test_frozen_tensors_and_permutations_get_no_gradient(backend):
    given = sample(6, 4, [PLUStep(), coupling("tanh", 4)])
    program = given.fixed["program"]
    tensors = [value(w, i, torch.float64) for i, w in enumerate(program.tensors)]
    x = normal(6, 4).requires_grad_()
    (alone,) = torch.autograd.grad(ops.chain(x, program, tensors)[1].sum(), x)
    for t in tensors[1:]:
        t.requires_grad_()
    _, log_det = ops.chain(x, program, tensors)
    log_det.sum().backward()
    torch.testing.assert_close(x.grad, alone)
    assert tensors[0].grad is None
    assert tensors[4].grad is None or not tensors[4].grad.any()
    assert all(t.grad is not None for t in (*tensors[1:4], *tensors[5:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_saved_permutations_are_rounded(dtype):
    """Layers save them as floating-point numbers, of which averages are off by a rounding."""
    _library.require_kernels("cpu")
    program = ChainProgram(4, [PLUStep(), coupling("tanh", 4)])
    tensors = [value(w, i, torch.float64) for i, w in enumerate(program.tensors)]
    x, order = normal(6, 4), torch.tensor([2, 0, 3, 1])
    tensors[0] = order
    expected = ops.chain(x, program, tensors)
    off = 1e-6 * torch.tensor([1, -1, -1, 1]) if dtype.is_floating_point else 0
    saved = order.to(dtype) + off
    for run in (run_chain, run_steps):
        found = run(x, None, program, [saved, *tensors[1:]])
        torch.testing.assert_close(found, expected)
    for bad in (saved + 3, saved - 2):
        with pytest.raises(RuntimeError, match="permutation must hold indices from 0 to 3"):
            run_chain(x, None, program, [bad, *tensors[1:]])


@pytest.mark.parametrize("base", ["none", "normal"])
def test_what_is_kept_is_the_input_of_each_transform(base):
    """Data, inputs of steps and latent, of N D numbers each; no activation of a network."""
    _library.require_kernels("cpu")
    n, d = 64, 6
    steps = [autoregressive("softclip", [*range(d)], (50, 50)) for _ in range(5)]
    program = ChainProgram(d, [*steps, PermuteStep([*range(d)][::-1]), ActNormStep()], base=base)
    tensors = [value(w, i, torch.float32).requires_grad_() for i, w in enumerate(program.tensors)]
    kept = {}

    def keep(t):
        if t.is_floating_point() and not any(t is p for p in tensors):
            kept[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        ops.chain(normal(n, d, dtype=torch.float32), program, tensors)
    assert sum(kept.values()) <= (len(steps) + 3) * n * d + program.numbers.numel()
