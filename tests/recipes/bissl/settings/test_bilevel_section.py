"""The fields of the BiSSL stage that choose its linear systems' solver and products."""

from typing import Any

import pytest

from bilevel import CG, MINRES
from bilevel.linear import Nystrom
from bilevel.linear.solvers.escalating import Escalating
from bilevel.products import ReverseOverReverse
from bilevel.products.automatic import Automatic
from recipes.bissl.commands.parsing import parse
from recipes.bissl.settings.config import build_config
from recipes.bissl.settings.presets import PRESETS
from recipes.experiment.errors import ConfigError

GIB = 1_073_741_824


def test_options_of_the_system() -> None:
    bissl = PRESETS["digits"]("v2").bissl

    def with_fields(**fields: Any) -> Any:
        return type(bissl).model_validate({**bissl.model_dump(), **fields})

    noise = with_fields(solver="cg", solver_rtol="noise", solver_iterations=9, hessian_batches=2, recycle=7)
    assert noise.make_solver() == CG(9, "noise", recycle=7)
    assert with_fields(solver="cg", solver_rtol=0.1, escalate=True).make_solver() == Escalating(
        CG(bissl.solver_iterations, 0.1)
    )
    escalating = with_fields(solver="minres", solver_iterations=3, solver_rtol=0.5, escalate=True).make_solver()
    assert escalating == Escalating(MINRES(3, 0.5))
    model = {"solver": "nystrom", "nystrom_rank": 6, "solver_iterations": 2, "solver_rtol": 0.1}
    assert with_fields(**model).make_solver() == Nystrom(6, 1.0, 2, 0.1)
    assert with_fields(**model, implicit_head=True).make_solver() == Nystrom(6, None, 2, 0.1)
    kept = with_fields(hvp="reverse-kept", graph_memory=1.5).make_hvp()
    assert kept == ReverseOverReverse(keep_graph=True, memory_budget=GIB + GIB // 2)
    automatic = [with_fields(hvp="auto", graph_memory=memory).make_hvp() for memory in (None, 2.0)]
    assert [type(hvp) for hvp in automatic] == [Automatic, Automatic]
    assert [hvp.memory_budget for hvp in automatic] == [None, 2 * GIB]
    # From the command line, whose values are texts.
    fields = [
        "--bissl.hessian-batches",
        "2",
        "--bissl.solver-rtol",
        "noise",
        "--bissl.recycle",
        "4",
        "--bissl.aggregate",
        "true",
        "--bissl.hvp",
        "auto",
    ]
    parsed = parse([*fields, "--bissl.graph-memory", "0.5", "--bissl.escalate", "true"]).config.bissl
    assert (parsed.solver_rtol, parsed.recycle, parsed.aggregate) == ("noise", 4, True)
    assert (parsed.hvp, parsed.graph_memory, parsed.escalate) == ("auto", 0.5, True)


def test_fresh_hessian_batches_may_be_more_than_the_lower_steps() -> None:
    few: dict[str, Any] = {"bissl": {"lower_steps": 2, "hessian_batches": 3}}
    with pytest.raises(ConfigError, match=r"hessian_batches=3 exceeds lower_steps=2.*or set fresh_hessian_batches"):
        build_config(PRESETS["digits"]("v2"), few)
    section = build_config(
        PRESETS["digits"]("v2"), few | {"bissl": few["bissl"] | {"fresh_hessian_batches": True}}
    ).bissl
    assert (section.hessian_batches, section.fresh_hessian_batches) == (3, True)


TO_THE_NOISE: dict[str, Any] = {"hessian_batches": 2, "solver_rtol": "noise", "hvp": "reverse"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"solver": "minres", "solver_rtol": "noise"}, "'minres' with solver_rtol; set solver to cg"),
        ({"solver": "neumann", "recycle": 2}, "'neumann' with solver_rtol, recycle; set solver to cg"),
        ({"solver": "nystrom", "solver_memory": 2, "inexact": True}, "with solver_rtol, inexact, solver_memory; set"),
        ({"layerwise": True, "recycle": 2}, "layerwise keeps no conjugate directions"),
        ({"layerwise": True, "solver_rtol": "noise"}, "but solver_rtol came; leave them out"),
        ({"inexact": True, "recycle": 3}, "set recycle to 0 and solver_memory instead, or inexact to false"),
        ({"layerwise": True, "solver_memory": 3}, "solver_rtol, solver_memory came; leave them out"),
        ({"through_negative_curvature": True}, "through_negative_curvature belongs to layerwise.*set .* to false too"),
        (
            {"layerwise": True, "solver_rtol": None, "through_negative_curvature": True, "escalate": True},
            "escalate answers negative curvature .* set one of the two to false",
        ),
        ({"solver_rtol": "noise", "hessian_batches": 1}, "hessian_batches must be at least 2, got 1"),
        ({"solver_rtol": "loud"}, "bissl.solver_rtol"),
        ({"solver_rtol": 1.0}, "bissl.solver_rtol"),
        ({"recycle": -1}, "bissl.recycle"),
        ({"aggregate": "sometimes"}, "bissl.aggregate"),
        ({"solver": "identity", "escalate": True}, "solver identity has none; set escalate to false"),
        ({"graph_memory": 1.0}, "hvp=reverse keeps none; set hvp to reverse-kept or auto"),
        ({"hvp": "forward", "graph_memory": 1.0}, "hvp=forward keeps none"),
        ({"hvp": "reverse-kept", "graph_memory": 0.0}, "bissl.graph_memory"),
    ],
    ids=str,
)
def test_options_of_the_system_that_contradict_each_other(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(PRESETS["digits"]("v2"), {"bissl": TO_THE_NOISE | fields})
