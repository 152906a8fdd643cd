"""Registration: the family of an op follows from its name, and backward passes have derivatives by the reference."""

import inspect
import re
from pathlib import Path

import pytest
import torch

from pyflowkern import _library, ops
from pyflowkern.core.second_derivatives import gradient_of_reference

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = [p.name for p in (ROOT / "csrc").iterdir() if p.is_dir() and p.name != "core"]
#: A family whose ops begin with something shorter.
SHORT = {"runge_kutta": "rk"}


def family_of(op):
    """An op is called like the public function that it computes, or begins with the name of its family."""
    base = re.sub(r"(_backward)?_?$", "", op)
    function = getattr(ops, base, None)
    if inspect.isfunction(function):
        return function.__module__.rpartition(".")[2]
    # the longest name: field_layer begins with field, too
    return max(
        (f for f in FAMILIES if op.startswith(SHORT.get(f, f) + "_") or op == f),
        key=len,
        default=None,
    )


@pytest.mark.parametrize("op", _library.OPS)
def test_an_op_is_where_its_name_says(op):
    family = family_of(op)
    assert family in FAMILIES, f"{op} is of no family"
    files = [
        *(ROOT / "pyflowkern/ops").glob(f"_{family}*.py"),
        ROOT / f"pyflowkern/ops/{family}.py",
    ]
    assert any(f'"{op}(' in f.read_text() for f in files), f"{op} is not registered in {family}.py"
    sources = [p.read_text() for p in (ROOT / "csrc" / family).iterdir()]
    if any(f'"{op}"' in text for text in sources):
        return
    assert op == "autoregressive_solve", f"csrc/{family} does not implement {op}"  # torch alone


def test_a_gradient_for_each_input_of_any_kind():
    x, y = torch.tensor([2.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)
    plain = torch.tensor([5.0])

    def reference(x, pair, none, sizes, power):
        assert (none, sizes, power) == (None, [1, 2], 2)
        return x**power * pair[0] * pair[1], x + 0 * sizes[0]

    inputs = (x, [y, plain], None, [1, 2], 2)
    grads = gradient_of_reference(reference, inputs, (torch.ones(1), None, None))
    assert grads[0].item() == 2 * 2 * 3 * 5
    assert grads[1][0].item() == 4 * 5
    assert grads[1][1:] == [None]
    assert grads[2:] == [None, None, None]
    (second,) = torch.autograd.grad(grads[0], x)
    assert second.item() == 2 * 3 * 5
    none = gradient_of_reference(reference, inputs, (None, None))
    assert none == [None, [None, None], None, None, None]
