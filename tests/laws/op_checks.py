"""The laws of ops: each takes a case, and raises an AssertionError that tells the sample."""

import math

import torch
from torch.utils import _pytree as pytree

from laws.bijections import jacobian_log_det
from laws.draws import normal
from laws.ops import hold, results, run

#: Of the same float64 quantity by two formulas, some hundred operations each: a kernel's and autograd's, or the two
#: sides of an inner product.  Rounding errors, enlarged by ill-conditioned samples, take some of the 16 digits.
TWO_FORMULAS = 1e-9


def check_errors(case, sample, layout=None):
    """Values and gradients are as close to float64 as the case says."""
    hold(case.op, case.reference, sample, case.floor, layout, case.conditioned)


def check_second_derivatives(case):
    """Derivatives are those of differences, the first and the second; those that may go on are those that may not."""
    for sample in case.small(torch.float64):
        function, leaves = of_leaves(case.op, sample)
        smooth = [i for i, t in enumerate(function(*leaves)) if t.requires_grad]
        if smooth:
            once, again = (_gradients(function, leaves, smooth, graph) for graph in (False, True))
            torch.testing.assert_close(again, once, rtol=TWO_FORMULAS, atol=TWO_FORMULAS)
            if case.reentrant:
                torch.autograd.gradcheck(function, leaves, fast_mode=True)
            torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def check_gradients_of_parts(case):
    """Gradients of one result alone, and those of one argument alone, are those of plain PyTorch."""
    for sample in case.small(torch.float64):
        (ours, leaves), (plain, _) = (of_leaves(f, sample) for f in (case.op, case.reference))
        smooth = [i for i, t in enumerate(ours(*leaves)) if t.requires_grad]
        parts = [([i], None) for i in smooth] + [(smooth, j) for j in range(len(leaves)) if smooth]
        for wanted, j in parts:
            given = [t if j in (None, k) else t.detach() for k, t in enumerate(leaves)]
            pairs = zip(
                _gradients(ours, given, wanted), _gradients(plain, given, wanted), strict=True
            )
            for a, b in pairs:
                torch.testing.assert_close(a, b, rtol=TWO_FORMULAS, atol=TWO_FORMULAS)


def _gradients(function, given, wanted, create_graph=False):
    """Return those of some results, by all that require one; zeros where nothing depends on them."""
    found = function(*given)
    smooth = [i for i in wanted if found[i].requires_grad]
    leaves = [t for t in given if t.requires_grad]
    return torch.autograd.grad(
        [found[i] for i in smooth] + [t.sum() for t in leaves],
        leaves,
        [normal(*found[i].shape, seed=i) for i in smooth] + [torch.zeros(())] * len(leaves),
        create_graph=create_graph,
    )


def of_leaves(function, sample):
    """Return a function of the differentiated tensors alone, and these, which require gradients."""
    flat, spec = pytree.tree_flatten(sample.tensors)
    places = [
        i for i, t in enumerate(flat) if isinstance(t, torch.Tensor) and t.is_floating_point()
    ]

    def of_leaves(*leaves):
        given = list(flat)
        for i, t in zip(places, leaves, strict=True):
            given[i] = t
        found = results(function(**pytree.tree_unflatten(given, spec), **sample.fixed))
        return tuple(t for t in found if t.is_floating_point())

    return of_leaves, [flat[i].detach().clone().requires_grad_() for i in places]


def check_log_det_is_that_of_the_jacobian(case):
    for sample in case.small(torch.float64):
        first = next(iter(sample.tensors))
        for i in range(case.batch(sample).n):
            one = case.part(sample, slice(i, i + 1))

            def function(v, one=one, first=first):
                return case.op(**{**one.tensors, first: v}, **one.fixed)

            x = one.tensors[first].detach()
            _, log_det = function(x)
            if log_det.shape == x.shape and x.dim() > 1:  # a term for each element
                log_det = log_det.flatten(1).sum(1)
            torch.testing.assert_close(
                log_det,
                jacobian_log_det(lambda v, f=function: f(v)[0], x),
                rtol=TWO_FORMULAS,
                atol=TWO_FORMULAS,
            )


LAYOUTS = {
    "every second number": lambda t: torch.stack((t, t), -1)[..., 0],
    "not on 16 bytes": lambda t: torch.cat((t.flatten()[:1], t.flatten()))[-t.numel() :].view(
        t.shape
    ),
    "axes in another order": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "channels last": lambda t: (
        t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
    ),
    "one for all": lambda t: t[:1].expand(t.shape) if t.dim() > 1 and len(t) else t,
}


def check_strides(case, layout):
    """Whatever the strides, the same law of errors."""
    change = LAYOUTS[layout]
    for sample in case.drawn("small", torch.float32):
        tensors = pytree.tree_leaves((sample.tensors, sample.fixed))
        if any(isinstance(t, torch.Tensor) and t.numel() for t in tensors):

            def moved(t):
                return change(t) if t.dim() and t.numel() else t

            if layout != "one for all":  # the same values
                check_errors(case, sample, moved)
            elif case.spreads:
                if layout not in sample.known:
                    sample.known[layout] = sample.map(moved)
                check_errors(case, sample.known[layout])


def check_empty_and_single_batches(case, bits):
    """No sample is a batch too, and a sample alone has the bits that it has among others, or nearly.

    ``bits(sample)`` says for which arguments.
    """
    for sample in case.small(torch.float32):
        batch = case.batch(sample)
        if batch is None:
            continue
        whole, count, cotangents = run(case.op, sample)
        for few in (slice(0, 0), slice(0, 1) if case.placed else slice(1, 2)):
            part = case.part(sample, few)
            given = {i: batch.part(g, few) for i, g in cotangents.items()}
            found, _, _ = run(case.op, part, cotangents=given)
            for a, b in zip(found[:count], whole[:count], strict=True):
                wanted = batch.part(b, few)
                assert a.shape == wanted.shape, str(part)
                if bits(sample):
                    assert same(a, wanted), str(part)
                torch.testing.assert_close(a, wanted)
            for a, like in zip(found[count:], whole[count:], strict=True):
                assert a.dtype == like.dtype
                assert not a.any() or few.stop, "no sample, and yet a gradient"


def check_place_in_the_batch(case):
    """A part of a batch has the bits that it has in the whole."""
    for sample in case.large():
        batch = case.batch(sample)
        if batch is None:
            continue
        n = batch.n
        parts = slice(0, 1), slice(n // 3, n // 3 + 7), slice(n // 2, n)
        whole = results(case.op(**sample.tensors, **sample.fixed))
        for few in (slice(0, 1), slice(0, n // 3)) if case.placed else parts:
            part = case.part(sample, few)
            for a, b in zip(results(case.op(**part.tensors, **part.fixed)), whole, strict=True):
                assert same(a, batch.part(b, few)), f"samples {few} ({sample})"


def same(a, b):
    """Whether two tensors have the same bits, any NaN for any NaN."""
    return torch.equal(torch.nan_to_num(a, nan=1.25e3), torch.nan_to_num(b, nan=1.25e3)) and (
        torch.equal(a.isnan(), b.isnan())
    )


#: What a bad sample holds, and where: numbers that are not finite, and those for which another formula may run.
POISON = (
    *[(math.nan, ...), (math.nan, -1), (math.inf, ...), (-math.inf, 0)],
    *[(0.0, ...), (1.0, ...), (1e30, ...), (1e-40, ...), (100.0, ...), (5.0, ...)],
)


def check_bad_samples(case):
    """A sample of any numbers changes no bit of another, nor of its gradients; what comes of NaN is not finite."""
    for sample in (*case.small(torch.float32), *(case.large() if case.large else ())):
        batch = case.batch(sample)
        if batch is None or batch.n < 3:
            continue
        good, count, cotangents = run(case.op, sample)
        for (name, place), poisons in _poisoned(case, sample, batch):
            spoilt = sample.map(lambda t: t)
            given = spoilt.tensors if name in spoilt.tensors else spoilt.fixed
            leaves, spec = pytree.tree_flatten(given[name])
            leaves[place] = leaves[place].detach().clone()
            rows = batch.view(leaves[place], case.rows[name])
            others = torch.ones(batch.n, dtype=torch.bool)
            for at, poison, where in poisons:
                rows[at][where if where is ... else (where,) * rows[at].dim()] = poison
                others[at] = False
            given[name] = pytree.tree_unflatten(leaves, spec)
            found, _, _ = run(case.op, spoilt, cotangents=cotangents)
            what = f"{poisons} in {name} ({sample})"
            for a, b in zip(found[:count], good[:count], strict=True):
                assert same(batch.part(a, others), batch.part(b, others)), what
            for at, poison, where in poisons:
                if math.isnan(poison) and (where is ... or name == next(iter(case.rows))):
                    own = [batch.part(a, slice(at, at + 1)) for a in found[:count]]
                    assert (
                        not all(a.isfinite().all() for a in own) or not own[0].is_floating_point()
                    ), what
            for i, key in enumerate(_names(sample)):
                a, b = found[count + i], good[count + i]
                if key in case.rows and batch.view(a, case.rows[key]) is not None:
                    a, b = (batch.part(t, others, case.rows[key]) for t in (a, b))
                    assert same(a, b), f"gradient of {key}, {what}"


def _poisoned(case, sample, batch):
    """Yield places and what to put there, as rows of the batch, numbers and where in the row.

    Of a few samples one: all numbers in the first place, NaN in every one, and a third of the rest in turn.  Of many
    samples one for each number of a kind, at once: a NaN would hide the largest of other numbers.
    """
    n, most = batch.n, len(POISON)
    for i, place in enumerate(_places(case, sample, batch)):
        if n >= 3 * most:
            rows = [(n * (2 * j + 1) // (2 * most), *p) for j, p in enumerate(POISON)]
            for kind in (math.isnan, math.isinf, math.isfinite):
                yield place, [row for row in rows if kind(row[1])]
            continue
        for j, p in enumerate(POISON):
            if not (i and j) or (i + j) % 3 == 0:
                yield place, [(n // 2, *p)]


def _places(case, sample, batch):
    """Yield the arguments that hold numbers of each sample, and which of their tensors do."""
    for name, axis in case.rows.items():
        value = sample.tensors.get(name, sample.fixed.get(name))
        for i, t in enumerate(pytree.tree_leaves(value)):
            numbers = isinstance(t, torch.Tensor) and t.is_floating_point() and t.numel()
            if numbers and batch.view(t, axis) is not None:
                yield name, i


def check_determinism(case, threads):
    """The same bits each time, for any number of threads."""
    for sample in case.large():
        before = torch.get_num_threads()
        found = []
        try:
            for n in threads:
                torch.set_num_threads(n)
                found.append(run(case.op, sample)[0])
        finally:
            torch.set_num_threads(before)
        names = _names(sample)
        count = len(found[0]) - len(names)
        for i, (first, *others) in enumerate(zip(*found, strict=True)):
            if i < count or names[i - count] not in case.torch_sums:
                assert all(same(first, t) for t in others), f"result {i} ({sample})"


def _names(sample):
    """Return which argument each gradient belongs to."""
    return [
        key
        for key, value in sample.tensors.items()
        for t in pytree.tree_leaves(value)
        if isinstance(t, torch.Tensor) and t.is_floating_point()
    ]


def check_autocast(case, device):
    """Autocast changes neither a bit nor a dtype: an op chooses what it computes in."""
    for sample in case.small(torch.float32):
        expected, _, _ = run(case.op, sample)
        found, _, _ = run(
            case.op, sample, around=lambda: torch.autocast(device.type, torch.bfloat16)
        )
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype
            assert same(a, b), str(sample)


def _some(function, wanted):
    return lambda *v: [function(*v)[i] for i in wanted]


def check_function_transforms(case):
    """``jvp`` is the adjoint of the gradient, ``vmap`` a loop, ``grad`` autograd."""
    for sample in case.small(torch.float64):
        function, leaves = of_leaves(case.op, sample)
        found = function(*leaves)
        smooth = [i for i, t in enumerate(found) if t.requires_grad]
        leaves = tuple(t.detach() for t in leaves)
        if smooth:
            cotangents = [normal(*found[i].shape, seed=i) for i in smooth]
            tangents = tuple(normal(*t.shape, seed=20 + i) for i, t in enumerate(leaves))
            again, moved = torch.func.jvp(function, leaves, tangents)
            _, pull = torch.func.vjp(_some(function, smooth), *leaves)
            ours = [t.clone().requires_grad_() for t in leaves]
            gradients = torch.autograd.grad(
                [function(*ours)[i] for i in smooth],
                ours,
                [g.clone() for g in cotangents],
                allow_unused=True,
                materialize_grads=True,
            )
            for a, b in zip(again, found, strict=True):
                torch.testing.assert_close(a, b.detach())
            for a, b in zip(pull(cotangents), gradients, strict=True):
                torch.testing.assert_close(a, b, rtol=TWO_FORMULAS, atol=TWO_FORMULAS)
            forward = sum((g * moved[i]).sum() for g, i in zip(cotangents, smooth, strict=True))
            backward = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))
            torch.testing.assert_close(forward, backward, rtol=TWO_FORMULAS, atol=TWO_FORMULAS)
        many = [torch.stack((t, t.flip(0) if t.dim() else t / 2)) for t in leaves]
        one_by_one = [function(*(t[i] for t in many)) for i in (0, 1)]
        if leaves:
            for a, *b in zip(torch.func.vmap(function)(*many), *one_by_one, strict=True):
                torch.testing.assert_close(a, torch.stack(b))
