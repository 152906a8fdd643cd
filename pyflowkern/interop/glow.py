"""What is known of Glow as a script: classes that many projects have copied, and that belong to no package.

They are recognised by the names of classes, the parts they consist of, and the values that they give.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from pyflowkern import ops
from pyflowkern.interop._check import comparable, same_values
from pyflowkern.interop._doors import MethodDoor, the_library_itself
from pyflowkern.interop._glow_parts import FlowForm, PriorForm, has
from pyflowkern.interop._images import Form, FormDoor, Forms, form_disagreement, served_samples
from pyflowkern.interop._kinds import Kind, Library, Outcome

__all__ = ["LIBRARY"]

_DIRECTIONS = {"forward": False, "reverse": True}


class _Script(Library):
    """A library whose classes may lie anywhere."""

    def kind_of(self, cls: type) -> Kind | None:
        """Return what is known of a class of that name, which is made and called as in the script."""
        kind, own = self.kinds.get(cls.__name__), vars(cls)
        if kind is None or not {*_DIRECTIONS} <= own.keys() or "__init__" not in own:
            return None
        code = getattr(own["__init__"], "__code__", None)
        return kind if code is not None and code.co_varnames[1:2] == ("in_channel",) else None


class _BlockForm(Form):
    """A Block: squeeze, flows, and the density of what leaves here given what goes on."""

    def __init__(self, split: bool, flows: Any) -> None:
        super().__init__()
        self.split, self.flows, self.prior = split, flows, PriorForm()

    @classmethod
    def read(cls, module: Any) -> _BlockForm | None:
        """Return the form of a Block; None for one of other parts."""
        if not has(module, "Block", children={"flows", "prior"}) or not isinstance(
            module.split, bool
        ):
            return None
        flows = module._modules["flows"]
        if type(flows) is not torch.nn.ModuleList:
            return None
        form = cls(module.split, flows)
        link = form.link
        conv = PriorForm.read(module._modules["prior"], link)
        ratio = 2 if module.split else 4
        if conv is None or conv.in_channels % ratio:
            return None
        form.channels = conv.in_channels // ratio
        if conv.out_channels != conv.in_channels * 2:
            return None
        link.watch(module, "split")
        link.watch(flows)
        return form

    def forward(self, x: Tensor, tensors: list[Tensor]) -> tuple[Any, ...]:
        """Return what goes on, the log-determinant, the log-density of what leaves, and that."""
        n, c, h, w = x.shape
        out = x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4)
        out = out.contiguous().view(n, c * 4, h // 2, w // 2)
        log_det: Any = 0
        for flow in self.flows:
            out, more = flow(out)
            log_det = log_det + more
        if self.split:
            out, leaves = out.chunk(2, 1)
            mean, log_sd = self.prior.evaluate(out, *tensors).chunk(2, 1)
        else:
            leaves = out
            mean, log_sd = self.prior.of_zeros(out, *tensors)[0].chunk(2, 0)
        return out, log_det, ops.normal_log_prob(leaves, mean, log_sd), leaves

    def reverse(
        self, z: Tensor, tensors: list[Tensor], eps: Any = None, reconstruct: Any = False
    ) -> Tensor:
        """Return the images."""
        if not reconstruct:
            stats = self.prior.evaluate if self.split else self.prior.of_zeros
            mean, log_sd = stats(z, *tensors).chunk(2, 1)
            eps = mean + torch.exp(log_sd) * eps
        z = torch.cat([z, eps], 1) if self.split else eps
        for flow in reversed(self.flows):
            z = flow.reverse(z)
        n, c, h, w = z.shape
        z = z.view(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3)
        return z.contiguous().view(n, c // 4, h * 2, w * 2)


class _BlockDoor(MethodDoor):
    """One direction of a Block."""

    def __init__(self, module: torch.nn.Module, name: str) -> None:
        super().__init__(module, name)
        self._forms = Forms(module, _BlockForm.read)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the flows, and the prior by a few ops."""
        x = args[0] if args else None
        if not served_samples(x) or x.dim() != 4 or not kwargs.keys() <= {"eps", "reconstruct"}:
            return self.own(*args, **kwargs)
        ready = self._forms.ready(x, self.name)
        if ready is None or not isinstance(form := ready[0], _BlockForm):
            return self.own(*args, **kwargs)
        if self.name == "reverse":
            return form.reverse(x, ready[1], *args[1:], **kwargs)
        if len(args) > 1 or kwargs or x.shape[2] % 2 or x.shape[3] % 2:
            return self.own(*args, **kwargs)
        return form.forward(x, ready[1])


def _flow(module: torch.nn.Module) -> Outcome:
    if FlowForm.read(module) is None:
        return Outcome()
    if why := form_disagreement(module, _DIRECTIONS, FlowForm.read):
        return Outcome(note=why)
    read = FlowForm.read
    doors = [FormDoor(module, name, inverse, read) for name, inverse in _DIRECTIONS.items()]
    return Outcome(doors, runs="own op")


def _block(module: torch.nn.Module) -> Outcome:
    form = _BlockForm.read(module)
    if form is None:
        return Outcome()
    if why := _block_disagreement(module, form):
        return Outcome(note=why)
    return Outcome([_BlockDoor(module, name) for name in _DIRECTIONS], runs="own op")


def _block_disagreement(module: torch.nn.Module, form: _BlockForm) -> str:
    """Return why a block must not be replaced, found by running it on a few numbers; empty if it may."""
    twin: Any = comparable(copy.deepcopy(module))
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(2, form.channels or 1, 4, 4, generator=draw, dtype=torch.float64)
    with torch.no_grad(), the_library_itself():
        try:
            twin(x)  # perhaps the first batch, by which parts of it initialise themselves
            want = twin(x)
            back = (want[0], torch.randn(want[3].shape, generator=draw, dtype=want[3].dtype))
            want = (*want, twin.reverse(*back), twin.reverse(*back, reconstruct=True))
        except Exception as error:
            return f"the library itself fails on a few numbers: {type(error).__name__}: {error}"
        there, home = (_BlockDoor(twin, name).run for name in _DIRECTIONS)
        got = (*there(x), home(*back), home(*back, reconstruct=True))
    if not all(isinstance(t, Tensor) for t in (*got, *want)) or not same_values(got, want):
        return "its values are not those of the form that its name says"
    return ""


LIBRARY = _Script(
    "glow",
    (),
    {
        "Block": Kind(_block, (*_DIRECTIONS,), holds=True),
        "Flow": Kind(_flow, (*_DIRECTIONS,)),
    },
)
