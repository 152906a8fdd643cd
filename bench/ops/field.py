"""Velocity and divergence of a field, against the usual way: one VJP by autograd."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench._case import Case, Inputs, Lazy, Outputs, Provider, nbytes
from pyflowkern import ops


def _layers(parameters: dict[str, Tensor]) -> tuple[list[Tensor], ...]:
    """Return weights, biases and gates; the gates may be empty."""
    return tuple([t for name, t in parameters.items() if name[0] == kind] for kind in "wbg")


def _mlp(x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    weights, biases, gates = _layers(parameters)
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        x = torch.addcmul(b, F.linear(x, w), gates[i]) if gates else F.linear(x, w, b)
        x = torch.tanh(x) if i < len(weights) - 1 else x
    return x


def vjp(x: Tensor, probe: Tensor, **parameters: Tensor) -> Outputs:
    """FFJORD's estimate: the field, one VJP with a graph, and its product with the probe."""
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x if x.requires_grad else x.requires_grad_()
        y = _mlp(x, parameters)
        (ej,) = torch.autograd.grad(y, x, probe, create_graph=recorded)
    return y, (ej * probe).sum(1)


def stacked(x: Tensor, probe: Tensor, **parameters: Tensor) -> Any:
    """Our reference in plain PyTorch: values and tangents stacked in one batch."""
    return ops.field_divergence_reference(x, *_layers(parameters), probe=probe)


def ours(x: Tensor, probe: Tensor, **parameters: Tensor) -> Any:
    return ops.field_divergence(x, *_layers(parameters), probe=probe)


def exact(x: Tensor, probe: Tensor, **parameters: Tensor) -> Any:
    return ops.field_divergence(x, *_layers(parameters), method="exact")


def exact_by_vjps(x: Tensor, probe: Tensor, **parameters: Tensor) -> Outputs:
    """The exact trace in the usual way: one VJP for each dimension."""
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x if x.requires_grad else x.requires_grad_()
        y = _mlp(x, parameters)
        terms = [
            torch.autograd.grad(y[:, i].sum(), x, create_graph=recorded, retain_graph=True)[0][
                :, i
            ]
            for i in range(x.shape[1])
        ]
    return y, torch.stack(terms).sum(0)


# --- cases ---------------------------------------------------------------------------------------


def make_inputs(n: int, dims: Sequence[int], gates: bool = False) -> Callable[..., Inputs]:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Inputs:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        found = {"x": normal(n, dims[0]), "probe": normal(n, dims[0]).sign()}
        for i, (a, b) in enumerate(itertools.pairwise(dims)):
            found |= {f"w{i}": normal(b, a) / a**0.5, f"b{i}": normal(b)}
            found |= {f"g{i}": normal(b).sigmoid()} if gates else {}
        return found

    return make


def _names(dims: Sequence[int], kinds: str = "wb") -> list[str]:
    return [f"{kind}{i}" for kind in kinds for i in range(len(dims) - 1)]


def _flops(inputs: Inputs) -> float:
    """Operations of the values and of one tangent in every product; a backward is twice that."""
    weights = sum(t.numel() for name, t in inputs.items() if name.startswith("w"))
    return 4.0 * len(inputs["x"]) * weights


def _bytes(inputs: Inputs, outputs: Outputs) -> int:
    return nbytes(*inputs.values(), *outputs)


def hutchinson(
    name: str, n: int, dims: Sequence[int], target: float, gates: bool = False, **case: Any
) -> Case:
    providers: dict[str, Provider] = {"eager": vjp, "ours": ours, "stacked": stacked}
    return Case(
        name=name,
        make_inputs=make_inputs(n, dims, gates),
        providers=providers,
        passes=("forward", "forward+backward"),
        forward_bytes=_bytes,
        flops=_flops,
        constants=("probe",),
        parameters=_names(dims, "wbg" if gates else "wb"),
        compiles=False,  # torch.compile takes no autograd.grad inside
        targets={"forward+backward vs eager": target, "kept for backward vs eager": 3.0},
        **case,
    )


def closed_form(name: str, n: int, dims: Sequence[int], **case: Any) -> Case:
    # "one probe" computes an estimate, which differs; its time is what the exact trace is compared with
    providers: dict[str, Provider | Lazy] = {
        "eager": exact_by_vjps,
        "ours": exact,
        "one probe": Lazy(lambda inputs: ours, comparable=False),
    }
    return Case(
        name=name,
        make_inputs=make_inputs(n, dims),
        providers=providers,
        passes=("forward", "forward+backward"),
        forward_bytes=_bytes,
        flops=_flops,
        constants=("probe",),
        parameters=_names(dims),
        compiles=False,
        **case,
    )


#: Time of one probe over that of the exact trace, which shall cost at most 1.15 probes.
ONE_PROBE = {"forward vs one probe": 1 / 1.15, "forward+backward vs one probe": 1 / 1.15}
CASES = [
    hutchinson("field 512x2 64x3", 512, (2, 64, 64, 64, 2), 2.0),
    hutchinson("field 1000x6 60x3", 1000, (6, 60, 60, 60, 6), 2.0),
    hutchinson("field 1000x43 860x2", 1000, (43, 860, 860, 43), 1.2),
    hutchinson("gated field 1000x6 60x3", 1000, (6, 60, 60, 60, 6), 2.0, gates=True),
    closed_form("exact 1000x6 64x2", 1000, (6, 64, 64, 6), targets=ONE_PROBE),
    closed_form("exact 1000x43 128x2", 1000, (43, 128, 128, 43), targets=ONE_PROBE),
    closed_form("exact 1000x43 860x2", 1000, (43, 860, 860, 43), targets=ONE_PROBE),
]
