"""What is measured at trained networks: solves against the response of further training, and training by them."""

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.networks.problems import KINDS, Hyperparameters, Network, Point, Setting, Size
from bilevel import (
    CG,
    MINRES,
    AlternatingSchedule,
    Hypergradient,
    Identity,
    Implicit,
    Level,
    Neumann,
    Params,
    SolverError,
    Trainer,
    hypergradient,
    linearize,
)
from bilevel.hypergradients import OnFailure
from bilevel.linear import Escalating
from bilevel.products import GaussNewton

FRACTIONS = (0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Of the largest Ritz value: Tikhonov's terms that are tried."""
TAKEN = 1e-2
RTOL = 1e-2

Figures = dict[str, Any]


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


def compared(setting: Setting, result: Hypergradient, reference: Params) -> Figures:
    """A hypergradient by kind against the reference, and how its solve ended."""
    solution = result.solution
    assert solution is not None
    kinds = {
        kind: {
            "cosine": cosine(result.grad[kind], reference[kind]),
            "ratio": float(result.grad[kind].norm() / reference[kind].norm()),
        }
        for kind in KINDS
    }
    return {
        "status": solution.status.name,
        "products": solution.num_hvps,
        "kinds": kinds,
        "found": setting.found(result.grad["weights"]),
        "stationarity": result.stationarity,
    }


def at(setting: Setting, point: Point, method: Implicit, on_failure: OnFailure = "ignore") -> Hypergradient:
    setting.restore(point)
    batches = {"upper_batch": setting.validation, "lower_batches": [setting.train]}
    return hypergradient(setting.problem, setting.upper, point.lower, method, **batches, on_failure=on_failure)


def suggested(setting: Setting, point: Point, method: Implicit) -> float | None:
    """The term that the message suggests where the solve fails."""
    try:
        at(setting, point, method, on_failure="raise")
    except SolverError as failed:
        match = re.search(r"raise tikhonov from \S+ to about ([\d.e+-]+)", str(failed))
        return float(match[1]) if match else None
    return None


def solvers(top: float, iterations: int, suggestion: float | None) -> dict[str, Implicit]:
    """By the name that a table gives them; terms are multiples of the largest Ritz value `top`."""
    cg, term = CG(iterations, RTOL), TAKEN * top
    rows = {
        "CG(n, 1e-2)": Implicit(cg, tikhonov=term),
        "CG(10, None)": Implicit(CG(10, None), tikhonov=term),
        "MINRES(n, 1e-2)": Implicit(MINRES(iterations, RTOL), tikhonov=term),
        "MINRES(n, 1e-2), no term": Implicit(MINRES(iterations, RTOL)),
        "Escalating(CG(n, 1e-2)), no term": Implicit(Escalating(cg)),
        "Neumann(n, 1e-2)": Implicit(Neumann(iterations, RTOL), tikhonov=term),
        "Neumann(10)": Implicit(Neumann(10), tikhonov=term),
        "Identity()": Implicit(Identity()),
        "CG(n, 1e-2) with GaussNewton()": Implicit(cg, hvp=GaussNewton(), tikhonov=term),
        "CG(n, 1e-2) with GaussNewton(), term / 10": Implicit(cg, hvp=GaussNewton(), tikhonov=0.1 * term),
    }
    if suggestion is not None:
        rows["CG(n, 1e-2), the suggested term"] = Implicit(cg, tikhonov=suggestion)
    return rows


def measure_setting(setting: Setting) -> Figures:
    """All tables but the last for one network and seed."""
    size = setting.size
    marks = [max(1, size.steps // 8), max(2, size.steps // 4), max(3, size.steps // 2), size.steps]
    points, point, made = {}, setting.start(), 0
    for mark in marks:
        point, made = setting.trained(mark - made, point), mark
        points[mark] = point
    reference = setting.response(point, size.further)
    plain = Implicit(CG(size.iterations, RTOL))
    first = at(setting, point, plain)
    assert first.solution is not None
    assert first.solution.ritz_range is not None
    top = first.solution.ritz_range[1]
    terms = []
    for fraction in FRACTIONS:
        method = Implicit(CG(size.iterations, RTOL), tikhonov=fraction * top)
        terms.append({"fraction": fraction, **compared(setting, at(setting, point, method), reference)})
    suggestion = suggested(setting, point, plain)
    rows = {
        name: compared(setting, at(setting, point, method), reference)
        for name, method in solvers(top, size.iterations, suggestion).items()
    }
    taken = Implicit(CG(size.iterations, RTOL), tikhonov=TAKEN * top)
    steps = [{"steps": mark, **compared(setting, at(setting, p, taken), reference)} for mark, p in points.items()]
    return {
        "seed": setting.seed,
        "largest_ritz": top,
        "suggestion": suggestion,
        "reference": checked(setting, point, reference, size.further),
        "terms": terms,
        "solvers": rows,
        "steps": steps,
        "warm": warm(setting, point, TAKEN * top),
        "modes": modes(setting, point, taken) if point.buffers else None,
    }


def checked(setting: Setting, point: Point, reference: Params, steps: int) -> Figures:
    """The reference by kind against a difference along itself."""
    return {
        kind: {
            "length": float(g.norm()),
            "measured": setting.difference(point, kind, g / g.norm(), steps),
            "found": setting.found(g) if kind == "weights" else None,
        }
        for kind, g in reference.items()
    }


def whole(setting: Setting) -> Figures:
    """The derivative of F after the whole training, from the first step on."""
    start, steps = setting.start(), setting.size.steps
    return checked(setting, start, setting.response(start, steps), steps)


def warm(setting: Setting, point: Point, term: float) -> Figures:
    """Products of a solve after 10 more lower steps, from nothing and from the solution before."""
    solver, later = CG(setting.size.iterations, RTOL), setting.trained(10, point)
    products = {}
    before = at(setting, point, Implicit(solver, tikhonov=term)).solution
    assert before is not None
    setting.restore(later)
    system = linearize(setting.problem, setting.upper, later.lower, [setting.train], solver=solver, tikhonov=term)
    for name, start in (("cold", None), ("warm", before.value)):
        solution = system.hypergradient(setting.validation, x0=start, on_failure="ignore").solution
        assert solution is not None
        products[name] = solution.num_hvps
    return products


def modes(setting: Setting, point: Point, method: Implicit) -> Figures:
    """The gradient for the decays, upper objective in train and in eval mode, against differences for each in which
    running statistics follow the training."""
    axes, found = torch.eye(len(setting.upper["log_decay"])), {}
    for above in ("train", "eval"):
        setting.restore(point)
        result = hypergradient(
            Hyperparameters(setting.module, above=above),
            setting.upper,
            point.lower,
            method,
            upper_batch=setting.validation,
            lower_batches=[setting.train],
            on_failure="ignore",
        )
        measured = torch.tensor(
            [setting.difference(point, "log_decay", axis, setting.size.further, above=above) for axis in axes]
        )
        predicted = result.grad["log_decay"]
        ratio = float(predicted.norm() / measured.norm())
        found[above] = {"cosine": cosine(predicted, measured), "ratio": ratio}
    return found


def trained_by(top: float) -> dict[str, Implicit]:
    """The methods of a training, by the name that a table gives them."""
    cg, term = CG(100, RTOL), TAKEN * top
    return {
        "CG(100, 1e-2), no term": Implicit(cg),
        "CG(100, 1e-2), the term": Implicit(cg, tikhonov=term),
        "CG(10, None), the term": Implicit(CG(10, None), tikhonov=term),
        "CG with GaussNewton(), the term": Implicit(cg, hvp=GaussNewton(), tikhonov=term),
        "Identity()": Implicit(Identity()),
    }


def judged(setting: Setting, upper: Params) -> Figures:
    """A new training with these upper variables: F, the same of images that nothing has seen, the labels found."""
    torch.manual_seed(setting.seed + 1000)
    other = setting.network.make()
    fresh = Setting(setting.network, setting.seed, setting.size)
    fresh.module.load_state_dict(other.state_dict())
    point = fresh.trained(setting.size.steps, upper=upper)
    with torch.no_grad():
        losses = {
            name: float(fresh.problem.upper_objective(upper, point.lower, batch))
            for name, batch in (("validation", fresh.validation), ("test", fresh.test))
        }
    return {**losses, "found": setting.found(-upper["weights"])}


def train_by(setting: Setting, method: Implicit, alternations: int) -> Figures:
    """Alternating training from where the upper variables start, then a new training with what it found."""
    start = Setting(setting.network, setting.seed, setting.size)
    upper = {kind: leaf.clone().requires_grad_() for kind, leaf in start.upper.items()}
    lower = {n: p.detach().clone().requires_grad_() for n, p in start.module.named_parameters()}
    trainer = Trainer(
        start.problem,
        Level(upper, torch.optim.Adam(upper.values(), lr=0.3), [start.validation]),
        Level(lower, torch.optim.Adam(lower.values(), lr=start.network.rate), [start.train]),
        AlternatingSchedule(alternations, lower_steps=20, upper_steps=1),
        method,
        on_failure="ignore",
    )
    trainer.run()
    return {"statuses": dict(trainer.solves), **judged(start, {kind: leaf.detach() for kind, leaf in upper.items()})}


def measure_training(settings: Sequence[Setting], tops: Mapping[int, float], alternations: int) -> list[Figures]:
    """One row a seed and method."""
    rows = [{"method": "the start", "seed": s.seed, "statuses": {}, **judged(s, s.upper)} for s in settings]
    for setting in settings:
        for name, method in trained_by(tops[setting.seed]).items():
            rows.append({"method": name, "seed": setting.seed, **train_by(setting, method, alternations)})
    return rows


def measure(networks: Mapping[str, Network], sizes: Mapping[str, Size], *, seeds: int, alternations: int) -> Figures:
    """Every figure of the page."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: Figures = {}
        for name, network in networks.items():
            settings = [Setting(network, seed, sizes[name]) for seed in range(seeds)]
            found[name] = {"seeds": [measure_setting(setting) for setting in settings]}
            if name == "CNN":
                tops = {row["seed"]: row["largest_ritz"] for row in found[name]["seeds"]}
                found[name]["whole"] = [whole(setting) for setting in settings]
                found[name]["training"] = measure_training(settings, tops, alternations)
    return found
