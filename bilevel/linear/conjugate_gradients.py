"""The recursion of conjugate gradients, for the solvers that run it."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from bilevel import tree
from bilevel.linear.account import Account
from bilevel.linear.inexact import InexactProducts
from bilevel.linear.lanczos import conjugate_block, ritz_range
from bilevel.linear.preconditioner import Inverse
from bilevel.linear.recycling import Directions
from bilevel.linear.solution import Solution, Status
from bilevel.linear.solver import classify_curvature
from bilevel.tree import Params

_Point = tuple[Params, Params]
"""x and its residual."""

_Iterate = tuple[Params, float]
"""x and its relative residual."""

# A fixed budget that leaves this many times the first residual has not approximated anything.
_GROWTH = 10.0


class ConjugateGradients:
    """One run: the textbook's x, r, z = M^-1 r, d and what must be known to report on them.

    Args:
        account: of this solve.
        layerwise: coefficients per leaf.
        through: go on through directions of negative curvature and whatever growth of the residual.
        inverse: the preconditioner.
        directions: of earlier solves, to which r is orthogonal; those of this run are kept there too.
        stop_at_noise: measure the noise of the first product and take it for the tolerance.
        inexact: makes the products on fewer batches, as many as the tolerance asks for, and lets a last step be made
            without one.
        memory: how many directions are kept in `met`.
        watched: read every iteration's numbers at once and stop at a breakdown; otherwise none is read before the last.

    Attributes:
        met: the last directions of sound steps with their products.
    """

    def __init__(
        self,
        account: Account,
        *,
        layerwise: bool = False,
        through: bool = False,
        inverse: Inverse | None = None,
        directions: Directions | None = None,
        stop_at_noise: bool = False,
        inexact: InexactProducts | None = None,
        memory: int = 0,
        watched: bool = True,
    ) -> None:
        self.account, self.layerwise, self.through, self.inverse = account, layerwise, through, inverse
        self.directions = Directions(0) if directions is None else directions
        self.stop_at_noise, self.inexact, self.memory, self.watched = stop_at_noise, inexact, memory, watched
        self.met: list[tuple[Params, Params]] = []
        self.earlier_iterations = account.iterations
        self.blocks: list[tuple[list[Tensor], list[Tensor]]] = []

    def solve(self, x0: Params | None, r: Params, start: float) -> Solution:
        """Iterates from x0, or from 0 without one, where the residual is r, of relative norm `start`."""
        account, b = self.account, self.account.b
        self.from_zero, self.start = x0 is None, start
        x = tree.zeros_like(b) if x0 is None else x0
        relative = start
        while True:
            x, relative, breakdown = self._iterate(x, r, relative, start)
            no_step = breakdown is not None and self._at_zero
            x = b if no_step else x
            if no_step or self.layerwise or account.drifted(x, relative):
                r = account.residual(x)
                relative = account.relative(r)
            # Directions made of nothing but rounding errors have arbitrary curvature: no breakdown once x is as good
            # as it can get.
            at_rounding = account.at_rounding_level(x, relative)
            if breakdown is not None and not (at_rounding and breakdown is not Status.NON_FINITE):
                return account.close(breakdown, x, (start, relative), self._ritz_range())
            stop = at_rounding or not account.unfinished(relative)
            if stop or self.layerwise or not math.isfinite(relative):
                verdict = account.verdict(relative, at_rounding)
                if account.rtol is None and verdict.ok and relative > _GROWTH * max(start, 1.0):
                    verdict = Status.DIVERGED
                return account.close(verdict, x, (start, relative), self._ritz_range())

    @property
    def _at_zero(self) -> bool:
        return self.from_zero and self.account.iterations == self.earlier_iterations

    def _iterate(self, x: Params, r: Params, relative: float, start: float) -> tuple[Params, float, Status | None]:
        """Iterates from x with residual r; after a breakdown the iterate of smallest residual among those made."""
        # Zero, the start without an x0, is never kept as the best.
        best = x, math.inf if self._at_zero else relative
        step = _Step(self, r)
        self.blocks.append((step.pivots, step.conjugations))
        loop = self._watched if self.watched else self._unwatched
        (x, relative), best, breakdown = loop(step, (x, r), relative, start, best)
        if self.account.rtol is None and not self.layerwise and breakdown is None and relative > _GROWTH * start:
            breakdown = Status.DIVERGED
        if breakdown is None:
            return x, relative, None
        return best[0], min(best[1], relative), breakdown

    def _watched(
        self, step: "_Step", point: _Point, relative: float, start: float, best: _Iterate
    ) -> tuple[_Iterate, _Iterate, Status | None]:
        """Reads every iteration's numbers in one transfer, and stops where they say so."""
        account, (x, r) = self.account, point
        while account.unfinished(self._after_last(relative)):
            step.multiply(r)
            ahead = step.advance(x, r)
            if self.stop_at_noise and account.noise is None:
                assert step.gain_noise is not None, "measured on the first product"
                relative_noise = step.gain_noise * float(tree.norm(ahead[0])) / account.norm_b
                account.noise = account.rtol = max(relative_noise, account.rounding)
            readings = step.readings(ahead[1]).tolist()
            if self.inexact is not None and self.inexact.partial and self._breaks(readings):
                # Some batches may have negative curvature where the mean over all has none.
                step.multiply_whole()
                ahead = step.advance(x, r)
                readings = step.readings(ahead[1]).tolist()
            verdict = self._judge(readings, start)
            if account.operator.agree(verdict is not None):
                return (x, relative), best, verdict or Status.NON_FINITE
            if self.inexact is not None:
                self.inexact.met(readings[0])
            (x, r), relative = ahead, readings[-1]
            best = (x, relative) if relative <= best[1] else best
            step.turn(r)
        return (step.last(x, r), self._after_last(relative)), best, None

    def _unwatched(
        self, step: "_Step", point: _Point, relative: float, start: float, best: _Iterate
    ) -> tuple[_Iterate, _Iterate, Status | None]:
        """All iterations of the budget; one that is not sound freezes the iterate, and is read at the end."""
        account, (x, r), (best_x, best_relative) = self.account, point, best
        norm = tree.norm(r)
        alive, smallest = torch.ones_like(norm, dtype=torch.bool), torch.full_like(norm, best_relative)
        scale, rows = torch.full_like(norm, account.norm_a), []
        for _ in range(account.max_iterations - account.iterations):
            step.multiply(r)
            ahead = step.advance(x, r)
            readings = step.readings(ahead[1])
            curvature, gain, _, now = readings.unbind()
            scale = torch.fmax(scale, torch.where(torch.isfinite(gain), gain, 0.0))
            sound = alive & torch.isfinite(readings).all() & self._goes_on(curvature, gain, scale)
            sound = sound & (now <= start * self._limit)
            x, r = tree.where(sound, ahead[0], x), tree.where(sound, ahead[1], r)
            better = sound & (now <= smallest)
            best_x, smallest = tree.where(better, x, best_x), torch.where(better, now, smallest)
            rows.append(torch.cat([readings, torch.stack([alive, sound]).to(readings)]))
            alive = sound & (now > account.rounding)
            step.mask(sound)
            step.turn(r)
        if not rows:
            return (x, relative), best, None
        verdict, made = None, 0
        *table, (least, *_) = torch.stack([*rows, smallest.expand_as(rows[0])]).tolist()
        live = [row for row in table if row[-2]]
        for *readings, _, was_sound in live:
            verdict = self._judge(readings, start)
            if verdict is not None or not was_sound:
                verdict = verdict or Status.NON_FINITE
                break
            relative, made = readings[-1], made + 1
        step.cut(made, len(live))
        return (x, relative), (best_x, least), verdict

    def _after_last(self, relative: float) -> float:
        """The relative residual expected after a last step without a product, which is trusted to do what the step
        before it did, but no more than halve it, and with what products on some batches have missed; `relative` itself
        where all products are made and whole."""
        if self.inexact is None or self.inexact.curvature is None:
            return relative
        curve = self.account.curve[self.earlier_iterations :]
        before = curve[-2] if len(curve) > 1 else self.start
        ahead = relative * max(0.5, min(1.0, relative / before) if curve else 0.5)
        return math.hypot(ahead, math.sqrt(self.inexact.missed) / self.account.norm_b)

    def _breaks(self, readings: list[float]) -> bool:
        """Whether one iteration's numbers say that A is not definite."""
        curvature, gain, *_ = readings
        scale = max(self.account.norm_a, gain)
        return classify_curvature(curvature, gain, scale, self.account.product_error) is not None

    def _judge(self, readings: list[float], start: float) -> Status | None:
        """What one iteration's numbers say; takes note of them."""
        account = self.account
        curvature, gain, rho, relative = readings
        if self.inverse is not None and rho <= 0.0:
            raise ValueError(
                f"preconditioner: r'M^-1 r = {rho:.3g} for a residual r that is not 0; M must be symmetric positive "
                "definite"
            )
        verdict = account.meet(curvature, gain)
        if verdict is Status.NEGATIVE_CURVATURE and self.through:
            account.passed_negative_curvature = True
        elif verdict is not None:
            return verdict
        if not math.isfinite(relative):
            return Status.NON_FINITE
        account.curve.append(relative)
        return Status.DIVERGED if relative > start * self._limit else None

    def _goes_on(self, curvature: Tensor, gain: Tensor, scale: Tensor) -> Tensor:
        """Whether a direction lets the iterations go on: what `_judge` makes of `classify_curvature`, on the device."""
        error = self.account.product_error
        positive = curvature > 4.0 * error * scale
        return positive | (gain > 4.0 * math.sqrt(error) * scale) if self.through else positive

    @property
    def _limit(self) -> float:
        """Growth of the residual beyond which rounding has taken over."""
        return math.inf if self.through else 1.0 / math.sqrt(self.account.rounding)

    def _ritz_range(self) -> tuple[float, float] | None:
        """None where the coefficients are not those of A in the Euclidean inner product."""
        if self.layerwise or self.inverse is not None:
            return None
        return ritz_range(conjugate_block(*block) for block in self.blocks)


class _Step:
    """One iteration after the other: the direction d, its product A d, and r'z."""

    def __init__(self, run: ConjugateGradients, r: Params) -> None:
        self.run = run
        z = self._precondition(r)
        self.direction, self.rho = run.directions.conjugate(z), self._inner(r, z)
        self.pivots: list[Tensor] = []
        self.conjugations: list[Tensor] = []
        self.gain_noise: float | None = None
        self._kept_before = len(run.directions)

    def multiply(self, r: Params) -> None:
        """A d and d'A d, where the residual is r."""
        run, direction = self.run, self.direction
        unmeasured = run.inexact is not None and run.inexact.deviation is None
        if self.gain_noise is None and (unmeasured or (run.stop_at_noise and run.account.noise is None)):
            self.product = self._sampled(direction)
        elif run.inexact is not None:
            tolerance = max(run.account.rtol or 0.0, run.account.rounding) * run.account.norm_b
            self.product = run.inexact.product(run.account.operator, direction, r, tolerance)
        else:
            self.product = run.account.operator(direction)
        self._weigh()

    def multiply_whole(self) -> None:
        """The last product again, over all batches."""
        assert self.run.inexact is not None, "other products are whole"
        self.product = self.run.inexact.whole(self.run.account.operator, self.direction)
        del self.pivots[-1:]
        self._weigh()

    def _weigh(self) -> None:
        """d'A d of the product."""
        self.energy = tree.dot(self.direction, self.product)
        if isinstance(self.rho, Tensor):
            self.pivots.append(self.energy / self.rho)

    def _sampled(self, direction: Params) -> Params:
        """A d, taking note of its noise."""
        run = self.run
        product, error = run.account.operator.sampled(direction)
        if error is not None:
            self.gain_noise = float(error / tree.norm(direction))
            if run.inexact is not None:
                run.inexact.measured(self.gain_noise, run.account.operator)
        elif run.stop_at_noise:
            raise ValueError(
                'CG: rtol="noise" needs an operator that is a mean over two batches or more; pass more lower_batches '
                "(in a Trainer: Implicit(hessian_batches=2) or more), or a number for rtol"
            )
        return product

    def last(self, x: Params, r: Params) -> Params:
        """x after one more step, whose product nobody makes; x itself where all are made."""
        step = None if self.run.inexact is None else self.run.inexact.step(self.direction, r)
        return x if step is None else tree.axpy(step[0], self.direction, x)

    def advance(self, x: Params, r: Params) -> _Point:
        """x and r after the step along d."""
        if self.run.layerwise:
            alpha = _ratio(self.rho, tree.leaf_dots(self.direction, self.product))
        elif self.run.directions.limit:
            # Equal to r'z but for the rounding that has made r less orthogonal to what is kept.
            alpha = tree.dot(self.direction, r) / self.energy
        else:
            alpha = _ratio(self.rho, self.energy)
        return tree.axpy(alpha, self.direction, x), tree.axpy(_negative(alpha), self.product, r)

    def readings(self, r: Params) -> Tensor:
        """Curvature along d, gain ||A d|| / ||d||, r'z from before the step, and the relative residual after it."""
        square = tree.dot(self.direction, self.direction)
        rho = torch.stack(list(self.rho.values())).sum() if isinstance(self.rho, Mapping) else self.rho
        relative = tree.norm(r) / self.run.account.norm_b
        return torch.stack([self.energy / square, tree.norm(self.product) / square.sqrt(), rho, relative])

    def turn(self, r: Params) -> None:
        """The next direction."""
        kept = self.run.directions.offer(self.direction, self.product, self.energy)
        if self.run.memory:
            self.run.met = [*self.run.met, (self.direction, self.product)][-self.run.memory :]
        z = self._precondition(r)
        rho = self._inner(r, z)
        beta = _ratio(rho, self.rho)
        if isinstance(beta, Tensor):
            self.conjugations.append(beta)
        new = self.run.directions.conjugate(z)
        self.direction = new if kept else tree.axpy(beta, self.direction, new)
        self.rho = rho

    def mask(self, sound: Tensor) -> None:
        """Where the step was not sound its direction counts for nothing."""
        if self.run.directions.limit:
            nothing = tree.zeros_like(self.direction)
            self.direction = tree.where(sound, self.direction, nothing)
            self.product = tree.where(sound, self.product, nothing)
            self.energy = torch.where(sound, self.energy, 1.0)

    def cut(self, made: int, directions: int) -> None:
        """Forget the coefficients that came after `made` sound steps, out of `directions` that mean something."""
        del self.pivots[directions:], self.conjugations[made:]
        self.run.directions.truncate(self._kept_before + made)

    def _precondition(self, r: Params) -> Params:
        return r if self.run.inverse is None else self.run.inverse(r)

    def _inner(self, x: Params, y: Params) -> Tensor | Params:
        return tree.leaf_dots(x, y) if self.run.layerwise else tree.dot(x, y)


def _ratio(numerator: Tensor | Params, denominator: Tensor | Params) -> Tensor | Params:
    """Coefficient of a step; per leaf, 0 where a leaf has nothing to do (both zero)."""
    if isinstance(numerator, Mapping):
        assert isinstance(denominator, Mapping)
        return {
            name: torch.where(denominator[name] == 0.0, 0.0, value / denominator[name])
            for name, value in numerator.items()
        }
    assert isinstance(denominator, Tensor)
    return numerator / denominator


def _negative(alpha: Tensor | Params) -> Tensor | Params:
    return {name: -value for name, value in alpha.items()} if isinstance(alpha, Mapping) else -alpha
