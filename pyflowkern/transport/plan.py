"""The plan of a solved problem: products, sums and draws, without its matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from pyflowkern import ops
from pyflowkern.core.checks import check_count, check_flag, check_floating, check_generator
from pyflowkern.core.draws import uniform_like
from pyflowkern.ops.plan_tensors import PlanTensors

__all__ = ["Plan", "draw"]

#: Draws without replacement give up after this many for each cell that is wanted, and some more.
MOST_DRAWS, SOME_MORE = 100, 10_000
#: Distances by differences of coordinates: products lose digits.
DIFFERENCES = "donot_use_mm_for_euclid_dist"


class Plan:
    r"""The plan :math:`P_{ij} = a_i b_j \exp((f_i + g_j - C_{ij}) / \varepsilon)` as a linear map.

    Kept are the points and the potentials, :math:`O((n + m) d)` numbers; whatever is asked for is computed tile by
    tile.  Made by :func:`sinkhorn`, as :attr:`Solution.plan`.

    Args:
        x: points ``[B, n, d]``; ``y``: ``[B, m, d]``.
        a: masses ``[B, n]``, float64; ``b``: ``[B, m]``.
        f: potential of ``x`` ``[B, n]``, float64; ``g``: of ``y``, ``[B, m]``.
        epsilon: the weight of the entropy.
        scale: the cost is ``scale`` times the squared distance.
        batched: whether results have the axis of problems.
        penalties: the weights :math:`\rho` of the penalties on the marginals of ``x`` and ``y``, None for one that is
            held.

    Source: Cuturi, "Sinkhorn distances: Lightspeed computation of optimal transport" (2013).

    Example:
        >>> import torch
        >>> from pyflowkern import transport
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> plan = transport.sinkhorn(x, x + 2, epsilon=0.1).plan
        >>> [round(v, 3) for v in (plan @ torch.ones(2)).tolist()], plan.T.shape
        ([0.5, 0.5], (2, 2))
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        a: Tensor,
        b: Tensor,
        f: Tensor,
        g: Tensor,
        *,
        epsilon: float,
        scale: float = 1.0,
        batched: bool = False,
        penalties: tuple[float | None, float | None] = (None, None),
    ) -> None:
        self._tensors = PlanTensors(*(t.detach() for t in (x, y, a, b, f, g)))
        self.x, self.y, self.a, self.b, self.f, self.g = self._tensors
        self.epsilon, self.scale, self.batched = epsilon, scale, batched
        self.penalties = penalties
        self._sums: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """``(n, m)``, or ``(B, n, m)``."""
        size = (self.x.shape[0], self.x.shape[1], self.y.shape[1])
        return size if self.batched else size[1:]

    @property
    def T(self) -> Plan:
        """The transposed plan, from ``y`` to ``x``."""
        return self._like(self._tensors.transposed(), self.penalties[::-1])

    def __matmul__(self, matrix: Tensor) -> Tensor:
        """Multiply by ``[m, k]`` or ``[m]``, after the axis of problems if there is one; differentiable in it.

        Raises:
            TypeError: for another dtype than that of the points.
            ValueError: for a shape that does not fit.
        """
        check_floating("matrix", matrix)
        given = matrix if self.batched else matrix[None]
        vector = given.dim() == 2
        if vector:
            given = given[..., None]
        if given.dim() != 3 or given.shape[:2] != self.y.shape[:2]:
            raise ValueError(
                f"matrix must have shape {self.shape[:-2] + self.shape[-1:]} or one axis more, "
                f"got {tuple(matrix.shape)}"
            )
        out = self._product(given)
        out = out[..., 0] if vector else out
        return out if self.batched else out[0]

    def row_sums(self) -> Tensor:
        """Return the mass that leaves each point of ``x``, ``[n]``; it is computed once."""
        if self._sums is None:
            self._sums = self._product(torch.ones_like(self.y[..., :1]))[..., 0]
        return self._sums if self.batched else self._sums[0]

    def column_sums(self) -> Tensor:
        """Return the mass that reaches each point of ``y``, ``[m]``."""
        return self.T.row_sums()

    def marginal_error(self) -> Tensor:
        """Return by how much marginals are off in all, in units of mass and computed in float64; the larger of both.

        A penalized marginal is compared with what it is for these potentials where they are a solution.
        """
        wide = self._like(self._tensors._replace(x=self.x.double(), y=self.y.double()))
        errors = []
        for plan in (wide, wide.T):
            rho, sums = plan.penalties[0], plan._product(torch.ones_like(plan.y[..., :1]))[..., 0]
            wanted = plan.a if rho is None else plan.a * torch.exp(-plan.f / rho)
            errors.append((sums - wanted).abs().sum(-1))
        error = torch.maximum(*errors)
        return error if self.batched else error[0]

    def growth(self) -> Tensor:
        r"""Return what part of its mass each point of ``x`` sends out, :math:`\sum_j P_{ij} / a_i`, ``[n]``.

        It is 1 where marginals are held.  An unbalanced plan loses mass where it is below 1, and makes some where it
        is above.  A point without mass has a value, too: the one that a little of it would have.
        """
        return self._like(self._tensors.per_mass()).row_sums()

    def dense(self) -> Tensor:
        """Return the whole matrix ``[n, m]``, of the dtype of the points; for small problems."""
        x, y = self.x.double(), self.y.double()
        # of differences, but without a matrix for each coordinate
        cost = self.scale * torch.cdist(x, y, compute_mode=DIFFERENCES).square()
        score = (self.f[:, :, None] + self.g[:, None] - cost) / self.epsilon
        out = (self.a[:, :, None] * self.b[:, None] * score.exp()).to(self.x.dtype)
        return out if self.batched else out[0]

    def conditional_mean(self, values: Tensor | None = None) -> Tensor:
        r"""Return :math:`\sum_j P_{ij} v_j / \sum_j P_{ij}`, ``[n, k]``.

        The values ``v`` ``[m, k]`` are the points ``y`` if None.  A point of ``x`` without mass has a mean as well, as
        masses ``a`` cancel, and so has one whose penalized marginal sends out next to nothing.
        """
        given = self.y if values is None else (values if self.batched else values[None])
        if given.dim() != 3 or given.shape[:2] != self.y.shape[:2]:
            raise ValueError(
                f"values must have shape {self.shape[:-2] + self.shape[-1:]} and one axis more, "
                f"got {tuple(given.shape if self.batched else given.shape[1:])}"
            )
        rows = self._like(self._tensors.per_mass()._replace(f=self._undamped()))
        centre = given.detach().mean(1, keepdim=True)
        sums = rows._product(torch.cat([given - centre, torch.ones_like(given[..., :1])], -1))
        out = sums[..., :-1] / sums[..., -1:] + centre
        return out if self.batched else out[0]

    def transport_cost(self) -> Tensor:
        r"""Return :math:`\langle P, C \rangle`, the cost without the entropy, in float64; not differentiable."""
        x, y = self.x.double(), self.y.double()
        wide = self._like(self._tensors._replace(x=x, y=y))
        centre = y.mean(1, keepdim=True)
        x, y = x - centre, y - centre
        squares = y.square().sum(-1, keepdim=True)
        sums = wide._product(torch.cat([y, squares, torch.ones_like(squares)], -1))
        cross = 2 * (x * sums[..., :-2]).sum(-1)
        each = x.square().sum(-1) * sums[..., -1] - cross + sums[..., -2]
        total = self.scale * each.sum(-1)
        return total if self.batched else total[0]

    def pairs(
        self,
        n: int | None = None,
        *,
        replace: bool = True,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        r"""Draw cells ``(i, j)`` of the plan.

        Without ``n`` each row is there once, with a column of probability :math:`P_{ij} / \sum_j P_{ij}`.  With
        ``n``, cells have probability :math:`P_{ij} / \sum P`: a row is drawn by the sums of rows, then a column of
        it.  With ``replace=False`` the cells differ, as if each was taken out once drawn; repeated draws are thrown
        away, which is the same.

        Args:
            n: how many cells.
            replace: whether a cell may come again.
            generator: the source of random numbers, on the device of the points.

        Returns:
            ``i`` and ``j``, int64, ``[n]``, or ``[B, n]`` for a batch of problems.

        Raises:
            TypeError: for an ``n`` that is no int, a ``replace`` that is no bool, or a wrong generator.
            ValueError: for an ``n`` below 1, a plan without mass, and for ``replace=False`` where fewer than ``n``
                cells carry (enough) mass.

        Example:
            >>> import torch
            >>> from pyflowkern import transport
            >>> x = torch.tensor([[0.0], [1.0]])
            >>> i, j = transport.sinkhorn(x, x.flip(0), epsilon=0.01).pairs()
            >>> i.tolist(), j.tolist()
            ([0, 1], [1, 0])
        """
        check_generator(generator)
        check_flag("replace", replace)
        if n is None:
            return self.partners(uniforms=self._uniforms(self.x.shape[1], generator))
        n = check_count("n", n)
        self.row_sums()  # here, so that those of each problem are parts of it
        out = self._cells(n, generator) if replace else self._distinct(n, generator)
        return out if self.batched else (out[0][0], out[1][0])

    def partners(self, rows: Tensor | None = None, *, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows and a column for each, chosen by uniform random numbers, as :meth:`pairs` does.

        Args:
            rows: indices of rows, int64, ``[k]`` or ``[B, k]``; each row once if None.
            uniforms: float64 numbers in [0, 1), a number for each row.
        """
        if self.batched:
            return self._partners(rows, uniforms)
        i, j = self._partners(None if rows is None else rows[None], uniforms[None])
        return i[0], j[0]

    # --- what the rest is made of -----------------------------------------------------------------

    def _like(
        self, tensors: PlanTensors, penalties: tuple[float | None, float | None] | None = None
    ) -> Plan:
        return Plan(
            *tensors,
            epsilon=self.epsilon,
            scale=self.scale,
            batched=self.batched,
            penalties=penalties or self.penalties,
        )

    def _undamped(self) -> Tensor:
        """Return the soft minimum that ``f`` is a part of: with it rows sum to their masses, whatever they send."""
        rho = self.penalties[0]
        return self.f if rho is None else self.f * (1 + self.epsilon / rho)

    def _product(self, matrix: Tensor) -> Tensor:
        return ops.plan_product(*self._tensors, matrix, epsilon=self.epsilon, scale=self.scale)

    def _partners(self, rows: Tensor | None, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        plan, x = self._tensors, self.x
        if rows is None:
            rows = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        else:
            x = x.gather(1, rows[..., None].expand(-1, -1, x.shape[2]))
            plan = plan._replace(x=x, a=plan.a.gather(1, rows), f=plan.f.gather(1, rows))
        return rows, ops.plan_draw(*plan, uniforms, epsilon=self.epsilon, scale=self.scale)

    def _uniforms(self, n: int, generator: torch.Generator | None) -> Tensor:
        shape = (self.x.shape[0], n) if self.batched else (n,)
        return uniform_like(self.x, shape, generator, torch.float64)

    def _cells(self, n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        assert self._sums is not None
        shape = (2, *self._sums.shape[:-1], n)
        of_rows, of_columns = uniform_like(self.x, shape, generator, torch.float64)
        return self._partners(draw(self._sums, of_rows), of_columns)

    def _distinct(self, n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        found = [self._distinct_of(p, n, generator) for p in range(self.x.shape[0])]
        cells = torch.stack(found) if found else self.f.new_zeros(0, n, dtype=torch.int64)
        columns = self.y.shape[1]
        return cells // columns, cells % columns

    def _distinct_of(self, p: int, n: int, generator: torch.Generator | None) -> Tensor:
        one = self._like(PlanTensors(*(t[p : p + 1] for t in self._tensors)))
        assert self._sums is not None
        one._sums = self._sums[p : p + 1]
        columns = self.y.shape[1]
        most = int((one._sums > 0).sum()) * int((one.b > 0).sum())
        if n > most:
            raise ValueError(f"n must be at most {most}, the cells of the plan with mass, got {n}")
        found, drawn, batch = one.f.new_zeros(0, dtype=torch.int64), 0, n
        while len(found) < n:
            if drawn > MOST_DRAWS * n + SOME_MORE:
                raise ValueError(
                    f"n must be fewer distinct cells: {drawn} draws found only {len(found)} of {n}, "
                    "as hardly any others carry mass; take replace=True or a larger epsilon"
                )
            i, j = one._cells(batch, generator)
            found = _first_of_each(torch.cat([found, i[0] * columns + j[0]]))
            drawn += batch
            batch = min(2 * batch, n + SOME_MORE)
        return found[:n]


def _first_of_each(values: Tensor) -> Tensor:
    """Return the values without repeats, in the order in which they first come."""
    order = values.argsort(stable=True)
    ordered = values[order]
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return values[order[first].sort().values]


def draw(sums: Tensor, uniforms: Tensor) -> Tensor:
    """Return an index of the last axis of ``sums`` ``[*, k]`` for each of ``uniforms`` ``[*, n]``, in proportion."""
    upto = sums.double().cumsum(-1)
    total = upto[..., -1:]
    if not bool(((total > 0) & total.isfinite()).all()):
        raise ValueError("the plan must carry mass that is finite, got one of none, or of NaN")
    # below the total also where the product is rounded up: the index is then one that has mass
    wanted = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(upto, wanted, right=True)
