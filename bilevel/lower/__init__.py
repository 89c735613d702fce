"""The lower level's objective and its derivatives, and whether they are still those of the present variables."""

from bilevel.lower.curvature import Examination, examine_curvature
from bilevel.lower.derivatives import lower_derivatives, lower_value, training_derivatives, upper_derivatives
from bilevel.lower.objectives import LowerObjectives
from bilevel.lower.staleness import BufferWatch, StaleSystemError, check_marks, take_marks

__all__ = [
    "BufferWatch",
    "Examination",
    "LowerObjectives",
    "StaleSystemError",
    "check_marks",
    "examine_curvature",
    "lower_derivatives",
    "lower_value",
    "take_marks",
    "training_derivatives",
    "upper_derivatives",
]
