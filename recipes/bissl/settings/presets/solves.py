"""How all presets but the paper's solve their linear systems."""

from typing import Any

TO_THE_NOISE: dict[str, Any] = {"solver_iterations": 10, "solver_rtol": "noise"}
"""Solves go no further than the batches' noise."""

ONE_SOLVE: dict[str, Any] = {**TO_THE_NOISE, "aggregate": True, "solver_memory": 6, "inexact": True}
"""And there is one an alternation, which profits from those before it, with later products on fewer batches. Over a
dozen short ones, as in digits, what comes late is not made up for."""

TWO_PRODUCTS: dict[str, Any] = {"solver_iterations": 2, "solver_rtol": None}
"""Two iterations a solve: of a single batch, whose system more of them would solve beyond its own noise."""
