"""Contestants in JAX: solvers of a checkout of benchmark_bilevel, and jaxopt's implicit differentiation.

Objectives are those of `problems` in jax.numpy, on the same numbers; a test compares the two. Everything is compiled
before the clock starts. benchmark_bilevel is on no package index: it is imported from a folder that the reader names.
"""

import contextlib
import importlib
import importlib.util
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers.adapters import installed
from benchmarks.race.finite_sums.contestants import Contestant, Entry, Look
from benchmarks.race.finite_sums.problems import BATCH, FiniteSum, Steps

SOLVERS = {
    "SOBA": "soba",
    "SABA": "saba",
    "SRBA": "srba",
    "SUSTAIN": "sustain",
    "MRBO": "mrbo",
    "FSLA": "fsla",
    "AmIGO": "amigo",
    "stocBiO": "stocbio",
    "TTSA": "ttsa",
    "F2SA": "f2sa",
}
"""Names here and the files of benchmark_bilevel's solvers."""

Objective = Callable[..., Any]
"""Of (y, x, start, batch_size), on the samples from `start` on."""


def one_thread() -> None:
    """Keep XLA on one thread; before jax is first used."""
    os.environ.setdefault("NPROC", "1")
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")


def losses(problem: FiniteSum, *, rewritten: bool = False) -> tuple[Objective, Objective]:
    """G and F of (x, y, batch), with the quadratics as benchmark_bilevel writes them: one sample, mapped over all."""
    jax, np_ = importlib.import_module("jax"), importlib.import_module("jax.numpy")

    def quadratic(x: Any, y: Any, batch: Any) -> Any:
        def one(A: Any, B: Any, C: Any, a: Any, b: Any) -> Any:
            return 0.5 * y @ (A @ y) + 0.5 * x @ (B @ x) + x @ (C @ y) + a @ y + b @ x

        return np_.mean(jax.vmap(one)(*batch[1:]))

    def products(x: Any, y: Any, batch: Any) -> Any:
        def forms(matrices: Any, left: Any, right: Any) -> Any:
            return matrices.reshape(len(matrices), -1) @ np_.outer(left, right).reshape(-1)

        _, A, B, C, a, b = batch
        return np_.mean(0.5 * forms(A, y, y) + 0.5 * forms(B, x, x) + forms(C, x, y) + a @ y + b @ x)

    def entropies(y: Any, batch: Any) -> Any:
        scores = batch[1] @ y.reshape(-1, 10)
        return jax.nn.logsumexp(scores, axis=1) - (jax.nn.one_hot(batch[2], 10) * scores).sum(1)

    def cleaning(x: Any, y: Any, batch: Any) -> Any:
        return np_.mean(jax.nn.sigmoid(x[batch[0]]) * entropies(y, batch)) + 0.2 * (y**2).sum()

    def logistic(x: Any, y: Any, batch: Any) -> Any:
        return -np_.mean(jax.nn.log_sigmoid(batch[2] * (batch[1] @ y)))

    if rewritten:
        quadratic = products
    return {
        "quadratics": (quadratic, quadratic),
        "data cleaning": (cleaning, lambda x, y, batch: np_.mean(entropies(y, batch))),
        "hyperparameter selection": (
            lambda x, y, batch: logistic(x, y, batch) + 0.5 * (np_.exp(x) * y**2).sum(),
            logistic,
        ),
    }[problem.name]


def objectives(
    problem: FiniteSum, count: Callable[[int], None] | None = None, *, rewritten: bool = False
) -> tuple[Objective, Objective]:
    """With the signature that benchmark_bilevel's solvers ask for. `count` hears the samples of every oracle call, by
    the rule of `contestants.SumProblem`."""
    jax, np_ = importlib.import_module("jax"), importlib.import_module("jax.numpy")

    def counted(samples: int) -> Callable[[Any], Any]:
        """The identity, whose derivative counts whenever it is taken; also inside a derivative."""
        if count is None:
            return lambda tensor: tensor
        told = count
        identity = jax.custom_vjp(lambda tensor: tensor)

        def backward(_: None, cotangent: Any) -> tuple[Any]:
            jax.debug.callback(lambda: told(samples))
            return (cotangent,)

        identity.defvjp(lambda tensor: (identity(tensor), None), backward)
        return identity

    def of(data: Sequence[Tensor], loss: Objective, *, gradients: bool) -> Objective:
        arrays = [np_.asarray(t.numpy()) for t in data]

        def objective(y: Any, x: Any, start: Any = 0, batch_size: int = 1) -> Any:
            batch = [jax.lax.dynamic_slice_in_dim(array, start, batch_size) for array in arrays]
            watch = counted(batch_size)
            return watch(loss(x, y, batch)) if gradients else loss(watch(x), watch(y), batch)

        return objective

    below, above = losses(problem, rewritten=rewritten)
    return of(problem.lower_data, below, gradients=False), of(problem.upper_data, above, gradients=True)


class JaxContestant(Contestant):
    """A solver of benchmark_bilevel.

    Args:
        checkout: its folder.
        file: of the solver, without .py.
        rewritten: with the objective of the quadratics as this package's side writes it.
    """

    def __init__(self, problem: FiniteSum, checkout: Path, file: str, *, rewritten: bool = False) -> None:
        super().__init__(problem)
        self.checkout, self.file = checkout, file
        # Objectives that count would cost the timed runs too much.
        counting = self._solver(objectives(problem, self.count, rewritten=rewritten))
        self._run(counting, problem.grid[0], 0, self.counting)
        self.solver = self._solver(objectives(problem, rewritten=rewritten))

    def run(self, steps: Steps, seed: int, look: Look) -> None:
        self._run(self.solver, steps, seed, look)

    def counting(self, x: Tensor) -> bool:
        importlib.import_module("jax").effects_barrier()
        return super().counting(x)

    def _solver(self, functions: tuple[Objective, Objective]) -> Any:
        """Compiled: its `set_objective` makes two rounds."""
        np_ = importlib.import_module("jax.numpy")
        problem, below, above = self.problem, *functions
        kind = solver_class(self.checkout, self.file)
        step = problem.grid[0]
        with contextlib.redirect_stdout(io.StringIO()):
            solver = kind.get_instance(
                step_size=step.size, outer_ratio=step.ratio, batch_size=BATCH, eval_freq=problem.chunk, random_state=0
            )
            starts = [np_.asarray(start.numpy()) for start in (problem.lower, problem.upper)]
            solver.set_objective(below, above, len(problem.lower_data[0]), len(problem.upper_data[0]), *starts)
        return solver

    def _run(self, solver: Any, steps: Steps, seed: int, look: Look) -> None:
        jax = importlib.import_module("jax")
        # Nothing of these is compiled in: they are in what `init` returns.
        solver.step_size, solver.outer_ratio, solver.random_state = steps.size, steps.ratio, seed
        keys = jax.random.split(jax.random.PRNGKey(seed), 2)
        solver.state_inner_sampler = {**solver.state_inner_sampler, "key": keys[0]}
        solver.state_outer_sampler = {**solver.state_outer_sampler, "key": keys[1]}

        def callback() -> bool:
            return look(torch.from_numpy(np.array(jax.block_until_ready(solver.outer_var))))

        solver.run(callback)


class JaxoptContestant(Contestant):
    """Gradient descent on F(x, y*(x)) with all samples: jaxopt's L-BFGS below, from the last solution on, with its
    implicit differentiation (conjugate gradients on the normal equations by default)."""

    iterations = 20

    def __init__(self, problem: FiniteSum) -> None:
        super().__init__(problem)
        self._run(self._compiled(self.count), problem.grid[0], self.counting)
        self.step = self._compiled(None)

    @property
    def chunk(self) -> int:
        return 1

    def run(self, steps: Steps, seed: int, look: Look) -> None:
        self._run(self.step, steps, look)

    def counting(self, x: Tensor) -> bool:
        importlib.import_module("jax").effects_barrier()
        return super().counting(x)

    def _compiled(self, count: Callable[[int], None] | None) -> Callable[..., Any]:
        """x, y and the upper rate to the next x and y."""
        jax, jaxopt = importlib.import_module("jax"), importlib.import_module("jaxopt")
        below, above = objectives(self.problem, count)
        n, m = len(self.problem.lower_data[0]), len(self.problem.upper_data[0])
        solver = jaxopt.LBFGS(lambda y, x: below(y, x, 0, n), maxiter=self.iterations, implicit_diff=True)

        def value(x: Any, y: Any) -> Any:
            solution = solver.run(y, x).params
            return above(solution, x, 0, m), solution

        def step(x: Any, y: Any, rate: Any) -> Any:
            gradient, solution = jax.grad(value, has_aux=True)(x, y)
            return x - rate * gradient, solution

        compiled = jax.jit(step)
        jax.block_until_ready(compiled(*self._start(), 0.0))
        return compiled

    def _start(self) -> list[Any]:
        np_ = importlib.import_module("jax.numpy")
        return [np_.asarray(start.numpy()) for start in (self.problem.upper, self.problem.lower)]

    def _run(self, step: Callable[..., Any], steps: Steps, look: Look) -> None:
        jax = importlib.import_module("jax")
        x, y = self._start()
        while look(torch.from_numpy(np.array(jax.block_until_ready(x)))):
            x, y = step(x, y, steps.upper)


def solver_class(checkout: Path, file: str) -> Any:
    """The class `Solver` of a file of benchmark_bilevel.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = checkout / "solvers" / f"{file}.py"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; give the folder of a checkout of benchmark_bilevel")
    spec = importlib.util.spec_from_file_location(f"benchmark_bilevel_{file}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _first_in_path(checkout), contextlib.redirect_stdout(io.StringIO()):
        spec.loader.exec_module(module)
    return module.Solver


@contextlib.contextmanager
def _first_in_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def peers(checkout: Path | None) -> list[Entry]:
    """What can take part here."""
    if installed("jax") is None:
        return []
    entries = [Entry("implicit, L-BFGS", "jaxopt", JaxoptContestant)] if installed("jaxopt") else []
    if checkout is None or installed("benchopt") is None:
        return entries
    rewritten = _solver("SABA, rewritten", checkout, "saba", only="quadratics")
    return [*(_solver(name, checkout, file) for name, file in SOLVERS.items()), rewritten, *entries]


def _solver(name: str, checkout: Path, file: str, *, only: str = "") -> Entry:
    def prepare(problem: FiniteSum) -> Contestant:
        return JaxContestant(problem, checkout, file, rewritten=bool(only))

    return Entry(name, "JAX", prepare, only)
