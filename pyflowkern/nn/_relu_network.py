"""ReLU networks of linear layers as one node of the graph: less memory moved, less overhead a layer.

Written in torch's matrix products.  At the sizes of simulation-based inference, a hidden width of 50
and a few hundred rows, autograd's nodes cost as much as the products; at large ones the sums and
activations in place save passes over memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyflowkern._library import transformed
from pyflowkern.ops._registry import autocasts, gradient_of_reference

__all__ = ["linear_layers", "relu_network", "relu_network_reference"]


def linear_layers(
    x: Tensor, layers: Sequence[Any], activations: Sequence[Any]
) -> list[Tensor] | None:
    """Return weight and bias of each layer where :func:`relu_network` may stand for calling them.

    None where someone would notice: activations other than ReLU, layers that were replaced, hooked or
    parametrized, autocast, a function transform, or a compiler, which does the same by itself.
    """
    if torch.compiler.is_compiling() or transformed():
        return None
    if x.dim() != 2 or autocasts(x):
        return None
    params: list[Tensor] = []
    for modules, kind in ((layers, torch.nn.Linear), (activations, torch.nn.ReLU)):
        for module in modules:
            known = module.__dict__  # nn.Module's own look-up takes longer
            if type(module) is not kind or known["_forward_hooks"] or known["_forward_pre_hooks"]:
                return None
            if known["_backward_hooks"] or known["_backward_pre_hooks"]:
                return None
            if kind is torch.nn.Linear:
                inside = known["_parameters"]
                if (bias := inside["bias"]) is None or bias.dtype != x.dtype:
                    return None
                params += (inside["weight"], bias)
    return params


def relu_network(
    x: Tensor,
    context: Tensor | None,
    params: Sequence[Tensor],
    residual: bool,
    activate_last: bool,
) -> Tensor:
    """Return the network's output; arguments as for :func:`relu_network_reference`."""
    needed = torch.is_grad_enabled() and torch._C._any_requires_grad(x, context, *params)
    if needed:
        out: Tensor = _Network.apply(x, context, residual, activate_last, *params)  # type: ignore[no-untyped-call]
        return out
    return _run(x, context, params, residual, activate_last)[0]


def relu_network_reference(
    x: Tensor,
    context: Tensor | None,
    *params: Tensor,
    residual: bool,
    activate_last: bool,
) -> Tensor:
    """Compute the network in plain PyTorch.

    Args:
        x: input ``[N, in]``.
        context: added to the first layer's output, ``[N, hidden]``, or None.
        *params: weight and bias of each layer in turn.
        residual: layers 1 and 2, 3 and 4, ... are residual blocks, :math:`h + W_2 r(W_1 r(h))`.
        activate_last: a ReLU before the last layer, too; plain layers always have it.
    """
    pairs = list(zip(params[::2], params[1::2], strict=True))
    linear = torch.nn.functional.linear
    h = linear(x, *pairs[0])
    if context is not None:
        h = h + context
    if residual:
        for i in range(1, len(pairs) - 1, 2):
            inner = linear(h.relu(), *pairs[i])
            h = h + linear(inner.relu(), *pairs[i + 1])
    else:
        for pair in pairs[1:-1]:
            h = linear(h.relu(), *pair)
    return linear(h.relu() if activate_last or not residual else h, *pairs[-1])


def _run(
    x: Tensor,
    context: Tensor | None,
    params: Sequence[Tensor],
    residual: bool,
    activate_last: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Return the output and the input of each layer after its ReLU."""
    weights, biases = params[::2], params[1::2]
    last = len(weights) - 1
    read = [x]
    h = torch.addmm(biases[0], x, weights[0].t())
    if context is not None:
        h.add_(context)
    if residual:
        for i in range(1, last, 2):
            a = h.relu()
            u = torch.addmm(biases[i], a, weights[i].t()).relu_()
            h.add_(biases[i + 1]).addmm_(u, weights[i + 1].t())
            read += (a, u)
    else:
        for i in range(1, last):
            read.append(h.relu_())
            h = torch.addmm(biases[i], h, weights[i].t())
    if activate_last or not residual:
        h.relu_()
    read.append(h)
    return torch.addmm(biases[last], h, weights[last].t()), read


class _Network(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        context: Tensor | None,
        residual: bool,
        activate_last: bool,
        *params: Tensor,
    ) -> Tensor:
        out, read = _run(x, context, params, residual, activate_last)
        ctx.form = residual, activate_last
        ctx.save_for_backward(context, *params, *read)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        context, *saved = ctx.saved_tensors
        residual, activate_last = ctx.form
        layers = len(saved) // 3
        params, read = saved[: 2 * layers], saved[2 * layers :]
        if torch.is_grad_enabled():
            reference = partial(
                relu_network_reference, residual=residual, activate_last=activate_last
            )
            inputs = (read[0], context, *params)
            grads = gradient_of_reference(reference, inputs, (grad,))
            return grads[0], grads[1], None, None, *grads[2:]
        need_x, need_context = ctx.needs_input_grad[:2]
        wanted = ctx.needs_input_grad[4:]
        found: list[Tensor | None] = [None] * (2 * layers)
        weights = params[::2]

        def through(g: Tensor, i: int, input_too: bool = True) -> Tensor | None:
            """Note the gradients of layer i; return that of its input."""
            if wanted[2 * i]:
                found[2 * i] = g.t() @ read[i]
            if wanted[2 * i + 1]:
                found[2 * i + 1] = g.sum(0)
            return g @ weights[i] if input_too else None

        g = _required(through(grad, layers - 1))
        if activate_last or not residual:
            _mask_(g, read[-1])
        if residual:
            for i in range(layers - 3, 0, -2):
                inner = _mask_(_required(through(g, i + 1)), read[i + 1])
                g.add_(_mask_(_required(through(inner, i)), read[i]))
        else:
            for i in range(layers - 2, 0, -1):
                g = _mask_(_required(through(g, i)), read[i])
        grad_x = through(g, 0, need_x)
        return grad_x, g if need_context else None, None, None, *found


def _required(g: Tensor | None) -> Tensor:
    if g is None:
        raise RuntimeError("a layer without the gradient of its input")
    return g


def _mask_(g: Tensor, activated: Tensor) -> Tensor:
    """Multiply by the ReLU's derivative in place."""
    masked: Tensor = torch.ops.aten.threshold_backward.grad_input(g, activated, 0, grad_input=g)
    return masked
