"""The section of the bilevel stage: Algorithm 1 and how its linear systems are solved."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from bilevel import CG, MINRES, Identity, Neumann
from bilevel.linear import Escalating, Nystrom, Solver
from bilevel.products import Automatic, FiniteDifference, ForwardOverReverse, HVPProvider, ReverseOverReverse

from ...experiment.configuration import Section


class BilevelConfig(Section):
    """Stage 3: Algorithm 1."""

    alternations: int = Field(ge=1, description="T, number of alternations")
    lower_steps: int = Field(default=20, ge=1, description="N_L, pretext steps an alternation")
    upper_steps: int = Field(default=8, ge=1, description="N_U, hypergradient steps an alternation")
    adaptation_every: int | None = Field(
        default=100, ge=1, description="N_a, alternations between adaptations; null: never"
    )
    adaptation_strength: float = Field(
        default=0.1, ge=0, le=1, description="alpha of theta_D <- (1-alpha) theta_D + alpha theta_P"
    )
    regularization_weight: float = Field(default=0.001, ge=0, description="lambda of lambda/2 ||theta_P - theta_D||^2")
    damping: float = Field(default=10.0, ge=0, description="added to lambda in the linear system (appendix B.3)")
    gamma: float = Field(default=0.01, ge=0, description="weight of the downstream loss of theta_D itself")
    pretext_fraction: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="share of the pretext images that the lower level draws from, chosen by data.split_seed",
    )
    hessian_batches: int = Field(default=5, ge=1, description="K, lower batches in the Hessian's mean")
    fresh_hessian_batches: bool = Field(
        default=False,
        description="draw these K after the lower steps, instead of taking the first ones of an alternation",
    )
    solver: Literal["cg", "minres", "neumann", "nystrom", "identity"] = Field(
        default="cg", description="solver of the linear system"
    )
    nystrom_rank: int = Field(
        default=20, ge=1, description="with solver nystrom: products for its model, made once an alternation"
    )
    solver_iterations: int = Field(default=5, ge=1, description="N_c, most iterations of the solver")
    solver_rtol: Annotated[float, Field(ge=0, lt=1)] | Literal["noise"] | None = Field(
        default=None,
        description='relative residual to stop at; "noise" (cg): what other stored batches would change; '
        "null: all iterations",
    )
    recycle: int = Field(
        default=0,
        ge=0,
        description="search directions of cg kept for the later solves of an alternation (two vectors of memory each)",
    )
    solver_memory: int = Field(
        default=0,
        ge=0,
        description="search directions of cg that precondition later alternations (two vectors of memory each)",
    )
    inexact: bool = Field(
        default=False,
        description="products of cg after the first one on as many of the K batches as their noise asks for, and a "
        "last step without a product",
    )
    aggregate: bool = Field(
        default=False,
        description="one solve an alternation, for the sum of its upper steps' right-hand sides, in the last of them",
    )
    implicit_head: bool = Field(
        default=False,
        description="let phi_P respond to the upper level too (the paper holds it fixed)",
    )
    head_tikhonov: float = Field(
        default=1.0,
        ge=0,
        description="with implicit_head: Tikhonov term of phi_P's block (multiples of lambda + damping)",
    )
    layerwise: bool = Field(
        default=False, description="CG with step lengths per tensor, the paper's variant (not exact)"
    )
    through_negative_curvature: bool = Field(
        default=False,
        description="with layerwise: make all iterations through directions of negative curvature, as the paper's "
        "algorithm does, instead of stopping there",
    )
    escalate: bool = Field(
        default=False,
        description="answer a breakdown of the solver (negative curvature, ...) by a growing Tikhonov term",
    )
    hvp: Literal["auto", "reverse", "reverse-kept", "forward", "finite-difference"] = Field(
        default="reverse",
        description="Hessian-vector products; reverse-kept keeps graphs in memory, auto takes what is measured fastest "
        "(timings decide, so that the last digits may differ between runs)",
    )
    graph_memory: float | None = Field(
        default=None,
        gt=0,
        description="with hvp=reverse-kept or auto: memory for the kept graphs of a system's K batches (GiB); null: no "
        "limit for reverse-kept, none kept by auto",
    )
    max_grad_norm: float | None = Field(
        default=10.0, gt=0, description="norm limit of each level's gradient; null: none"
    )
    lower_lr: float = Field(default=1.0, gt=0, description="peak learning rate of the lower level")
    lower_warmup_epochs: float = Field(
        default=10.0, ge=0, description="linear warm-up of the lower level (pretext epochs)"
    )
    lower_warmup_steps: int | None = Field(
        default=None, ge=0, description="length of that warm-up in lower steps; null: lower_warmup_epochs"
    )
    upper_lr: float = Field(gt=0, description="initial learning rate of the upper level (SGD, momentum 0.9, cosine)")
    upper_weight_decay: float = Field(ge=0, description="weight decay of the upper level")
    upper_lr_floor: float = Field(
        default=0.0, ge=0, le=1, description="where the upper level's cosine ends (fraction of upper_lr)"
    )
    checkpoint_every: int = Field(default=5, ge=1, description="alternations between two checkpoints")

    @model_validator(mode="after")
    def _consistent(self) -> "BilevelConfig":
        if self.layerwise and self.solver != "cg":
            raise ValueError(f"layerwise is a variant of cg, but solver is {self.solver!r}; set solver to cg")
        own = {"solver_rtol": self.solver_rtol == "noise", "recycle": self.recycle > 0, "inexact": self.inexact}
        given = [name for name, is_set in {**own, "solver_memory": self.solver_memory > 0}.items() if is_set]
        if self.solver in ("minres", "neumann", "nystrom") and given:
            raise ValueError(
                f"solver_rtol=noise, recycle, solver_memory and inexact belong to cg, but solver is {self.solver!r} "
                f"with {', '.join(given)}; set solver to cg, or give a number for solver_rtol, 0 for recycle and "
                "solver_memory, false for inexact"
            )
        if self.layerwise and given:
            raise ValueError(
                "layerwise keeps no conjugate directions and no true residual: it takes none of recycle, "
                f"solver_memory, inexact and solver_rtol=noise, but {', '.join(given)} came; leave them out"
            )
        if self.inexact and self.recycle:
            raise ValueError(
                f"recycle={self.recycle} answers later right-hand sides by whole products, and inexact makes them of "
                "some batches alone; set recycle to 0 and solver_memory instead, or inexact to false"
            )
        if self.through_negative_curvature and not self.layerwise:
            raise ValueError(
                "through_negative_curvature belongs to layerwise, the paper's variant of cg, which is off; set "
                "through_negative_curvature to false too"
            )
        if self.through_negative_curvature and self.escalate:
            raise ValueError(
                "escalate answers negative curvature by a Tikhonov term and through_negative_curvature passes it by; "
                "set one of the two to false"
            )
        if self.solver_rtol == "noise" and self.hessian_batches < 2:
            raise ValueError("solver_rtol=noise compares Hessian batches: hessian_batches must be at least 2, got 1")
        if self.escalate and self.solver == "identity":
            raise ValueError("escalate answers breakdowns, and solver identity has none; set escalate to false")
        if self.graph_memory is not None and self.hvp not in ("reverse-kept", "auto"):
            raise ValueError(
                f"graph_memory limits kept graphs, and hvp={self.hvp} keeps none; set hvp to reverse-kept or auto, or "
                "graph_memory to null"
            )
        if self.hessian_batches > self.lower_steps and not self.fresh_hessian_batches:
            raise ValueError(
                f"hessian_batches={self.hessian_batches} exceeds lower_steps={self.lower_steps}, whose first batches "
                "are used; reduce hessian_batches, or set fresh_hessian_batches"
            )
        if self.regularization_weight + self.damping == 0.0:
            raise ValueError("regularization_weight + damping must be positive; the system divides by their sum")
        return self

    def make_solver(self) -> Solver:
        """The solver that the fields describe."""
        return Escalating(self._plain_solver()) if self.escalate else self._plain_solver()

    def _plain_solver(self) -> Solver:
        if self.solver == "identity":
            return Identity()
        if self.solver == "minres":
            return MINRES(self.solver_iterations, self._number())
        if self.solver == "neumann":
            return Neumann(self.solver_iterations, self._number())
        if self.solver == "nystrom":
            # The regularizer's identity is known to be in A, but has no part in phi_P's block.
            identity = None if self.implicit_head else 1.0
            return Nystrom(self.nystrom_rank, identity, self.solver_iterations, self._number())
        return CG(
            self.solver_iterations,
            self.solver_rtol,
            self.layerwise,
            recycle=self.recycle,
            through_negative_curvature=self.through_negative_curvature,
            memory=self.solver_memory,
            inexact=self.inexact,
        )

    def _number(self) -> float | None:
        assert self.solver_rtol != "noise", "checked with the fields"
        return self.solver_rtol

    def make_hvp(self) -> HVPProvider:
        """The provider that the fields describe."""
        budget = None if self.graph_memory is None else int(self.graph_memory * 2**30)
        return {
            "auto": Automatic(budget),
            "reverse": ReverseOverReverse(),
            "reverse-kept": ReverseOverReverse(keep_graph=True, memory_budget=budget),
            "forward": ForwardOverReverse(),
            "finite-difference": FiniteDifference(),
        }[self.hvp]
