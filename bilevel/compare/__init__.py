"""Solvers compared on one system: error against products and time, tables, a picture, advice in words.

`compare_solvers` does it for one's own problem, and so does ``python -m bilevel.compare module:factory``.
"""

from bilevel.compare.comparison import compare_solvers
from bilevel.compare.curves import KnownSystem, lower_gradient, measure_curves, relative, to_tolerance
from bilevel.compare.figure import apart, picture
from bilevel.compare.measuring import Timing, interleaved, machine, synchronize
from bilevel.compare.report import SolverReport
from bilevel.compare.solvers import Family, standard_solvers, stopping_solvers
from bilevel.compare.successive import measure_successive
from bilevel.compare.tables import (
    SUCCESSES,
    SUCCESSIVE_HEADER,
    curves,
    curves_header,
    curves_tables,
    names,
    number,
    spread,
    spread_of,
    successive,
    table,
    words,
)

__all__ = [
    "SUCCESSES",
    "SUCCESSIVE_HEADER",
    "Family",
    "KnownSystem",
    "SolverReport",
    "Timing",
    "apart",
    "compare_solvers",
    "curves",
    "curves_header",
    "curves_tables",
    "interleaved",
    "lower_gradient",
    "machine",
    "measure_curves",
    "measure_successive",
    "names",
    "number",
    "picture",
    "relative",
    "spread",
    "spread_of",
    "standard_solvers",
    "stopping_solvers",
    "successive",
    "synchronize",
    "table",
    "to_tolerance",
    "words",
]
