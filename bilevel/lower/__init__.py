"""The lower level's objective and its derivatives, and whether they are still those of the present variables."""

from bilevel.lower.curvature import Examination, examine_curvature, thorough_examinations
from bilevel.lower.derivatives import lower_derivatives, lower_value, training_derivatives, upper_derivatives
from bilevel.lower.draws import Draw, Partition
from bilevel.lower.objectives import LowerObjectives
from bilevel.lower.oracles import FirstDerivatives, LowerParts, Oracles
from bilevel.lower.per_problem import PerProblem
from bilevel.lower.reach import batch_by_batch, cross_examined, examine_cross
from bilevel.lower.repeatable import repeatable
from bilevel.lower.resolved import LowerSolver, OutOfTime, Resolved, Solves, reweighted
from bilevel.lower.sampling import are_samples, halves
from bilevel.lower.selection import (
    Selection,
    Tikhonov,
    check_selection,
    check_tikhonov,
    check_tikhonov_names,
    selected,
)
from bilevel.lower.staleness import BufferWatch, StaleSystemError, check_marks, strided, take_marks
from bilevel.lower.surroundings import (
    autocasts,
    check_batch,
    check_batches,
    check_recordable,
    differentiates,
    under_autocasts,
)

__all__ = [
    "BufferWatch",
    "Draw",
    "Examination",
    "FirstDerivatives",
    "LowerObjectives",
    "LowerParts",
    "LowerSolver",
    "Oracles",
    "OutOfTime",
    "Partition",
    "PerProblem",
    "Resolved",
    "Selection",
    "Solves",
    "StaleSystemError",
    "Tikhonov",
    "are_samples",
    "autocasts",
    "batch_by_batch",
    "check_batch",
    "check_batches",
    "check_marks",
    "check_recordable",
    "check_selection",
    "check_tikhonov",
    "check_tikhonov_names",
    "cross_examined",
    "differentiates",
    "examine_cross",
    "examine_curvature",
    "halves",
    "lower_derivatives",
    "lower_value",
    "repeatable",
    "reweighted",
    "selected",
    "strided",
    "take_marks",
    "thorough_examinations",
    "training_derivatives",
    "under_autocasts",
    "upper_derivatives",
]
