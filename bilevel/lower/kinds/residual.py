"""Problems whose lower level is the root of a residual."""

from abc import abstractmethod
from typing import Any

from torch import Tensor

from bilevel import tree
from bilevel.problem import Problem
from bilevel.tree import Params


class ResidualProblem(Problem):
    r"""A bilevel problem whose lower level is a system of equations:

    .. math:: \min_x F(x, y^*(x)) \quad\text{s.t.}\quad S(x, y^*(x)) = 0.

    By the implicit function theorem, with w over the lower variables,

    .. math:: \frac{dF}{dx} = \frac{\partial F}{\partial x} - \Big(\frac{\partial S}{\partial x}\Big)^{\!\top} w, \qquad
       \Big(\frac{\partial S}{\partial y}\Big)^{\!\top} w = \frac{\partial F}{\partial y}.

    The operator is not symmetric in general: take ``Implicit(GMRES())``. Over several batches, and over ranks, S is the
    mean of the batches' residuals. The smooth minimum of a `Problem` is S = dG/dy.

    `FixedPointProblem`, `RootProblem` and `ProximalProblem` are the kinds to derive from. The lower variables may come
    from anywhere: a trainer, an iteration of one's own, SciPy, scikit-learn, a closed form.
    """

    symmetric: bool = False
    """Whether dS/dy is symmetric, as where S is a gradient: then CG and MINRES serve too."""

    @abstractmethod
    def residual(self, upper: Params, lower: Params, batch: Any) -> Params:
        """S(x, y) on one batch: a tensor of its variable's shape for each lower variable."""

    def lower_objective(self, upper: Params, lower: Params, batch: Any) -> Tensor:
        """There is none: raises TypeError."""
        raise TypeError(
            f"{type(self).__name__} has no lower objective: its lower level is the equation that its residual is zero"
        )


class FixedPointProblem(ResidualProblem):
    r"""A bilevel problem whose lower level is a fixed point, :math:`y^*(x) = T(x, y^*(x))` (deep equilibrium models:
    Bai, Kolter and Koltun 2019; hypergradients: Grazzi, Franceschi, Pontil and Salzo 2020).

    With S = y - T the theorem reads

    .. math:: \frac{dF}{dx} = \frac{\partial F}{\partial x} + \Big(\frac{\partial T}{\partial x}\Big)^{\!\top} w, \qquad
       w = \frac{\partial F}{\partial y} + \Big(\frac{\partial T}{\partial y}\Big)^{\!\top} w.

    T need not contract for that: `AdjointIteration` needs it, `GMRES` and `Dense` do not. A trainer's lower steps go
    along y - T(x, y): with ``torch.optim.SGD(lr=1.0)`` they are the iteration y <- T(x, y), with a smaller rate the
    damped one.
    """

    @abstractmethod
    def fixed_point_map(self, upper: Params, lower: Params, batch: Any) -> Params:
        """T(x, y) on one batch: a tensor of its variable's shape for each lower variable."""

    def residual(self, upper: Params, lower: Params, batch: Any) -> Params:
        """S = y - T(x, y)."""
        image = self.fixed_point_map(upper, lower, batch)
        return tree.sub({name: lower[name] for name in image}, image)


class RootProblem(ResidualProblem):
    r"""A bilevel problem whose lower level is the root of a condition, :math:`S(x, y^*(x)) = 0`: optimality or balance
    equations, one for each number in y.

    A trainer's lower steps go along S, which leads to the root where the eigenvalues of dS/dy have positive real parts
    and the rate is small enough; solve by other means elsewhere.
    """

    @abstractmethod
    def optimality(self, upper: Params, lower: Params, batch: Any) -> Params:
        """S(x, y) on one batch: a tensor of its variable's shape for each lower variable."""

    def residual(self, upper: Params, lower: Params, batch: Any) -> Params:
        """S(x, y)."""
        return self.optimality(upper, lower, batch)
