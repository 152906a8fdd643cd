"""Rectified flow: straight paths, and pairs of a learned flow."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyflowkern import ode
from pyflowkern.core.checks import check_count, check_floating
from pyflowkern.ode.solve import warn_unless_ok
from pyflowkern.transport.matchers import ConditionalFlowMatcher

__all__ = ["RectifiedFlow"]


class RectifiedFlow(ConditionalFlowMatcher):
    r"""Straight paths without noise, and pairs of a flow that was learned, whose paths are straighter.

    The first round takes independent pairs.  Each next one takes those of :meth:`reflow`: where a learned flow ends
    is the partner of where it began, and a flow matched to them needs fewer steps.

    .. math:: x_t = (1 - t)\, x_0 + t\, x_1, \qquad u_t = x_1 - x_0, \qquad x_1 = x_0 + \int_0^1 v(t, x_t)\,dt

    after a reflow with the velocity :math:`v`.

    Source: Liu, Gong and Liu (2023).

    Example:
        >>> import torch
        >>> from pyflowkern import transport
        >>> rectified = transport.RectifiedFlow()
        >>> x0, x1 = rectified.reflow(lambda t, x: torch.ones_like(x), torch.randn(8, 2), steps=4)
        >>> bool(torch.allclose(x1, x0 + 1))
        True
    """

    def __init__(self) -> None:
        super().__init__(0.0)

    def reflow(
        self,
        velocity: Callable[[Tensor, Tensor], Tensor],
        x0: Tensor,
        *,
        steps: int = 100,
        method: str = "euler",
    ) -> tuple[Tensor, Tensor]:
        """Return ``x0`` and where the flow takes it, without gradients.

        Args:
            velocity: ``(t, x) -> [N, *shape]`` with a 0-d ``t``.
            x0: ``[N, *shape]``.
            steps: equal steps from time 0 to 1.
            method: of :func:`pyflowkern.ode.solve`, with fixed steps.

        Raises:
            TypeError: for steps that are no int.
            ValueError: for less than one step, or a method that is not known.
        """
        check_floating("x0", x0)
        steps = check_count("steps", steps)
        with torch.no_grad():
            out = ode.solve(velocity, x0, [0.0, 1.0], method=method, step_size=1 / steps)
        warn_unless_ok(out.status)
        return x0, out.ys[-1]

    def straightness(
        self, velocity: Callable[[Tensor, Tensor], Tensor], x0: Tensor, *, steps: int = 100
    ) -> Tensor:
        r"""Return :math:`\int_0^1 |x_1 - x_0 - v(t, x_t)|^2\,dt` of each path of Euler steps, ``[N]``; 0 is straight.

        Args:
            velocity: ``(t, x) -> [N, *shape]`` with a 0-d ``t``.
            x0: ``[N, *shape]``.
            steps: equal steps from time 0 to 1.
        """
        check_floating("x0", x0)
        steps = check_count("steps", steps)
        x, speeds = x0, []
        with torch.no_grad():
            for k in range(steps):
                speeds.append(velocity(x.new_tensor(k / steps), x))
                x = x + speeds[-1] / steps
            off = [(x - x0 - v).square().flatten(1).sum(1) for v in speeds]
        return torch.stack(off).mean(0)
