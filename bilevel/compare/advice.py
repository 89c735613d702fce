"""What the measurements say, in words."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bilevel.compare.curves import to_tolerance
from bilevel.compare.tables import SUCCESSES, names, number, row_of
from bilevel.hypergradients import needed_tikhonov

Figures = Mapping[str, Any]

WITHOUT_NOISE = 1e-2
"""The error that is asked for where the noise of the batches is not known, or of no use."""
_LARGE_NOISE = 0.5
_RESOLVED = 3.0
"""Errors are told apart down to this many times what the reference may be wrong by."""
_ALIKE = 1.25
"""Prices that do not differ by more are alike: the simpler solver is named."""
_SINGULAR = 1e-6


@dataclass(frozen=True)
class Advice:
    """Which solver to take, and why.

    Attributes:
        target: the relative error that is enough.
        recommended: the solver that gets there for the fewest products on a first right-hand side, the simplest of
            those alike; the one of the smallest error where none gets there; None where the reference tells nothing.
        reached: whether it gets there.
        sentences: everything in words, the choice first.
    """

    target: float
    recommended: str | None
    reached: bool
    sentences: tuple[str, ...]


def advise(figures: Figures) -> Advice:
    """Advice from the figures of a `SolverReport`."""
    facts = figures["facts"]
    reading = _Reading(figures["curves"], facts, target_error(facts))
    around = [reading.spectrum(), reading.noise(), reading.stationarity(), reading.reference()]
    if not is_resolved(facts):
        sentences = [reading.flaws(), reading.unresolved(), *around]
        return Advice(reading.target, None, False, tuple(filter(None, sentences)))
    solvers = [reading.choice(), reading.two(), reading.identity(), reading.reuse(), reading.clock()]
    recommended, reached = reading.recommended()
    sentences = [reading.flaws(), *solvers, *around]
    return Advice(reading.target, recommended, reached, tuple(filter(None, sentences)))


def is_finite(value: float | None) -> bool:
    """Whether this is a number to tell of; kept figures hold None for others."""
    return value is not None and math.isfinite(value)


def is_resolved(facts: Figures) -> bool:
    """Whether the reference is accurate enough to tell solvers apart."""
    return _RESOLVED * facts["reference"]["accuracy"] < _LARGE_NOISE


def target_error(facts: Figures) -> float:
    """The noise of the batches, where it is known and below a half; never less than the reference resolves."""
    noise = facts["noise"]
    useful = noise is not None and 1e-9 <= noise < _LARGE_NOISE
    limit = _RESOLVED * facts["reference"]["accuracy"] if is_resolved(facts) else 0.0
    return max(noise if useful else WITHOUT_NOISE, limit)


def strict_error(facts: Figures) -> float | None:
    """A smaller error to show beside the target: 1e-6, or 1e-3 where the reference resolves no more."""
    limit = _RESOLVED * facts["reference"]["accuracy"]
    return next((error for error in (1e-6, 1e-3) if limit < error < 0.5 * target_error(facts)), None)


@dataclass
class _Reading:
    rows: Sequence[Figures]
    facts: Figures
    target: float
    sounds: dict[tuple[str, str], Figures] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for row in self.rows:
            # An iterate that a breakdown has left may be good, but is warned of wherever it comes up.
            points = [point for point in row["points"] if point["status"] in SUCCESSES]
            if points:
                self.sounds[row["solver"], row["use"]] = {**row, "points": points}

    @property
    def pair(self) -> tuple[str, str]:
        return ("CG", "Neumann") if self.facts["symmetric"] else ("GMRES", "adjoint iteration")

    def needs(self, solver: str, use: str = "first", what: str = "products") -> float | None:
        """The median of what it takes to the target; None where it is not reached by a solve that succeeds."""
        row = self.sounds.get((solver, use))
        found = None if row is None else to_tolerance(row, self.target)
        return None if found is None else found[what].median

    def smallest(self, solver: str) -> float:
        row = row_of(self.rows, solver=solver, use="first")
        return math.inf if row is None else min(point["error"]["median"] for point in row["points"])

    def is_cut(self, solver: str) -> bool:
        """Whether the time was over before the curve's last point."""
        row = row_of(self.rows, solver=solver, use="first")
        return row is None or row["cut"]

    def recommended(self) -> tuple[str, bool]:
        solvers = names(self.rows, "solver")
        prices = {solver: price for solver in solvers if (price := self.needs(solver)) is not None}
        if len(prices) > 1:
            # One product a variable is for small systems and for checks.
            prices.pop("Dense", None)
        if not prices:
            return min(solvers, key=self.smallest), False
        least = min(prices.values())
        return next(solver for solver in solvers if prices.get(solver, math.inf) <= _ALIKE * least), True

    def unresolved(self) -> str:
        """Why nothing can be said, and how far the solvers went."""
        found = self.facts["reference"]
        ends = [
            f"{solver} ended {row['points'][-1]['status']}"
            for solver in self.pair
            if (row := row_of(self.rows, solver=solver, use="first")) is not None
        ]
        return (
            f"No solver can be named: {found['solver']}, which the others are measured against, was left with a "
            f"relative residual of {number(found['residual'])} when its time was over ({', '.join(ends)}). Give more "
            "seconds, or take smaller batches; more damping, or a larger tikhonov, makes a system that is easier to "
            "solve."
        )

    def choice(self) -> str:
        solver, reached = self.recommended()
        enough = f"a relative error of {number(self.target)}"
        why = "which is the noise of the batches" if self.target == self.facts["noise"] else "taken as enough"
        if not reached:
            cut = any(map(self.is_cut, names(self.rows, "solver")))
            limit = "within the time" if cut else "with what was tried"
            return (
                f"No solver gets to {enough} ({why}) {limit}; the smallest error is that of {solver}: "
                f"{number(self.smallest(solver))}."
            )
        if self.needs(solver) == 0.0:
            return f"Take {solver}: it has {enough}, {why}, without a product."
        return f"Take {solver}: {self._cost(solver)} to {enough}, {why}. {self._setting(solver)}".rstrip()

    def _cost(self, solver: str) -> str:
        first, later = self.needs(solver), self.needs(solver, "later")
        text = _products(first)
        return text if later is None or later == first else f"{text} for the first right-hand side and {later:g} later"

    def _setting(self, solver: str) -> str:
        row = self.sounds[solver, "first"]
        made = next((p["budget"] for p in row["points"] if max(p["errors"]) <= self.target), None)
        code = {
            "CG": f"CG({made}, None)",
            "Neumann": f"Neumann({made})",
            "MINRES": f"MINRES({made}, None)",
            "GMRES": f"GMRES({made}, None, None)",
            "adjoint iteration": f"AdjointIteration({made}, None)",
            "CG, recycled": f"CG({made}, None, recycle=64)",
        }.get(solver)
        if code is None or made is None:
            return ""
        by_noise = self.facts["batches"] > 1 and self.target == self.facts["noise"] and solver.startswith("CG")
        alternative = ', or CG(50, "noise") which stops there by itself' if by_noise else ""
        return f"As a solver: {code}{alternative}."

    def two(self) -> str | None:
        """CG beside Neumann, and where A is not symmetric GMRES beside the adjoint iteration."""
        first, second = self.pair
        if not {first, second} <= set(names(self.rows, "solver")):
            return None
        reached = [solver for solver in self.pair if self.needs(solver) is not None]
        if not reached:
            limit = " within the time" if any(map(self.is_cut, self.pair)) else ""
            return f"Neither {first} nor {second} gets there{limit}: {self._end(first)}, {self._end(second)}."
        if len(reached) == 1:
            (there,), (not_there,) = reached, set(self.pair) - set(reached)
            limit = "not within the time" if self.is_cut(not_there) else "does not"
            return f"{there} gets there with {self._cost(there)}; {not_there} {limit}: {self._end(not_there)}."
        scale = ", the products for its scale among the first ones" if second == "Neumann" else ""
        return (
            f"Both {first} and {second} get there: {first} with {self._cost(first)}, {second} with "
            f"{self._cost(second)}{scale}."
        )

    def _end(self, solver: str) -> str:
        """The smallest error, how many iterations were tried, and the status where that is no success."""
        row = row_of(self.rows, solver=solver, use="first")
        if row is None:
            return f"{solver} was not measured"
        last = row["points"][-1]
        made = _counted(last["budget"], "iteration")
        text = f"{solver} has an error of {number(self.smallest(solver))} after up to {made}"
        return text if last["status"] in SUCCESSES else f"{text}, and ended {last['status']}"

    def identity(self) -> str | None:
        beside = self.facts["identity"]
        if "Identity" not in names(self.rows, "solver"):
            return None
        error = self.smallest("Identity")
        if beside is None:
            gradient = "; the hypergradient is zero to rounding at this point, so that no relative error of it is told"
        else:
            gradient = (
                f"; the hypergradient is then off by {number(beside['error'])} of its length, at a cosine of "
                f"{beside['cosine']:.3f}"
            )
        if error <= self.target:
            return f"Identity, without any product, is as good as need be: its error is {number(error)}{gradient}."
        if beside is None:
            return f"Identity has an error of {number(error)}{gradient}."
        worth = "a solve is worth its products" if beside["error"] > self.target else "a solve changes little of it"
        return f"Identity has an error of {number(error)}{gradient}: {worth}."

    def reuse(self) -> str | None:
        """Which solver learns from the first right-hand side."""
        plain = self.needs("CG", "later")
        if plain is None:
            return None
        learned = {
            solver: later
            for solver in ("CG, recycled", "Nyström", "CG, Nyström")
            if (later := self.needs(solver, "later")) is not None
            and later <= 0.7 * plain
            and self.needs(solver) is not None
        }
        if not learned:
            return None
        solver = min(learned, key=lambda name: learned[name])
        return (
            f"For later right-hand sides of the same system {solver} needs {_products(learned[solver])} where CG needs "
            f"{plain:g}, after {self.needs(solver):g} for the first one."
        )

    def clock(self) -> str | None:
        """The fastest solver, where that is another one by more than a little."""
        solver, reached = self.recommended()
        seconds = {
            name: time
            for name in names(self.rows, "solver")
            if (time := self.needs(name, what="gradients")) is not None
        }
        if not reached or solver not in seconds:
            return None
        fastest = min(seconds, key=lambda name: seconds[name])
        if seconds[solver] <= _ALIKE * seconds[fastest]:
            return None
        return (
            f"By the clock {fastest} is the fastest to the same error: the first right-hand side takes it the time of "
            f"{seconds[fastest]:.3g} gradients, {solver} {seconds[solver]:.3g}."
        )

    def spectrum(self) -> str:
        if self.facts["eigenvalues"] is None:
            return (
                f"{self.facts['variables']:,} variables: A is not symmetric, as that of a fixed point, a root or a "
                "proximal problem, so that CG, MINRES and Neumann do not serve."
            )
        low, high = self.facts["eigenvalues"]
        met = "all eigenvalues of A lie" if self.facts["eigenvalues_complete"] else "eigenvalues of A were met"
        text = f"{self.facts['variables']:,} variables: {met} between {number(low)} and {number(high)}"
        size = max(abs(low), abs(high))
        if low < -_SINGULAR * size:
            term = needed_tikhonov((self.facts["bounds"][0], self.facts["bounds"][1]))
            more = " or more damping" if self.facts["regularized"] else ""
            return (
                f"{text}. A has negative curvature, so that it is not positive definite: the lower level is not at a "
                "minimum of its own, or these batches alone do not see that it is. CG and Neumann do not solve such a "
                f"system; MINRES solves it as it is, a tikhonov of about {number(term)}{more} makes another, positive "
                "definite one, and so does GaussNewton."
            )
        if low <= _SINGULAR * size:
            return (
                f"{text}. A is singular or nearly so: a tikhonov of about {number(needed_tikhonov((low, high)))} "
                "would bound what small eigenvalues amplify."
            )
        least = "" if self.facts["eigenvalues_complete"] else "at least "
        return f"{text}, a condition number of {least}{number(high / low)}."

    def noise(self) -> str | None:
        noise, count = self.facts["noise"], self.facts["batches"]
        if not is_resolved(self.facts):
            # It is relative to x.
            return None
        if noise is None:
            return (
                "The noise of the batches was not measured: that takes two or more lower_batches, or a single one that "
                "can be halved and the time for it."
            )
        if noise < 1e-9:
            return "The lower batches agree to rounding: there is no noise to stop at."
        source = {
            "halves": "the halves of the single lower batch",
            "product": "one product with the lower batches",
        }.get(self.facts["noise_from"], "the lower batches")
        text = (
            f"Going by {source}, another choice of {'it' if count == 1 else f'all {count}'} would change x by "
            f"{number(noise)} of its length, if it is a sample of more data"
        )
        if noise >= _LARGE_NOISE:
            return f"{text}: these batches hardly tell x. More lower batches come before a better solver."
        return f"{text}. An error well below that buys nothing; more batches lower it by the root of their number."

    def stationarity(self) -> str:
        norm, noise, gain = (self.facts[key] for key in ("stationarity", "gradient_noise", "gain"))
        known = is_finite(noise) and is_finite(norm) and noise > 0.0
        beside = f", {number(norm / noise)} times what the batches leave open" if known else ""
        what = "residual y - T(x, y), or S(x, y)," if self.facts["residual"] else "gradient"
        assumed = "The implicit function theorem assumes"
        if not is_finite(norm):
            return (
                f"The lower {what} is not finite at this point. {assumed} that it is 0; check y and the lower batches."
            )
        text = f"The lower {what} has a norm of {number(norm)}{beside}"
        if not is_resolved(self.facts) or not (is_finite(gain) and is_finite(self.facts["loss"])):
            return f"{text}. {assumed} that it is 0."
        return (
            f"{text}: to first order, a lower level that is solved would change the upper loss "
            f"{number(self.facts['loss'])} by {number(gain)}. {assumed} that it is solved."
        )

    def reference(self) -> str:
        found = self.facts["reference"]
        text = (
            f"Errors are against {found['solver']} in {found['dtype']}, whose relative residual is "
            f"{number(found['residual'])}"
        )
        if found["accuracy"] > 1e-3:
            text += f"; that can hide errors up to {number(min(found['accuracy'], 1.0))}"
        return ". ".join([text, *found["remarks"]]) + "."

    def flaws(self) -> str | None:
        """What makes any solver's hypergradient wrong."""
        found = [flaw for flaw in (self.facts["lost_curvature"], self.facts["flaw"]) if flaw is not None]
        return f"Whatever the solver, the hypergradient is not right: {'; '.join(found)}." if found else None


def _products(count: float | None) -> str:
    return _counted(count, "product")


def _counted(count: float | None, noun: str) -> str:
    return f"1 {noun}" if count == 1 else f"{count:g} {noun}s"
