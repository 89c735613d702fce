"""The lower level's objective and its derivatives, and whether they are still those of the present variables."""

from bilevel.lower.derivatives import lower_derivatives, lower_value, training_derivatives, upper_derivatives
from bilevel.lower.objectives import LowerObjectives
from bilevel.lower.once import OncePerProblem
from bilevel.lower.staleness import BufferWatch, StaleSystemError, check_marks, take_marks
from bilevel.lower.surroundings import check_batch, check_recordable, differentiates

__all__ = [
    "BufferWatch",
    "LowerObjectives",
    "OncePerProblem",
    "StaleSystemError",
    "check_batch",
    "check_marks",
    "check_recordable",
    "differentiates",
    "lower_derivatives",
    "lower_value",
    "take_marks",
    "training_derivatives",
    "upper_derivatives",
]
