"""The lower level's objective and its derivatives, and whether they are still those of the present variables."""

from bilevel.lower.curvature import Examination, examine_curvature, in_double_precision, thorough_examinations
from bilevel.lower.derivatives import lower_derivatives, lower_value, training_derivatives, upper_derivatives
from bilevel.lower.kinds.fields import ProximalPoint, largest_entry, mean_residual, residual_field, training_residual
from bilevel.lower.kinds.maps import ByName, ProximalMap
from bilevel.lower.kinds.penalties import L1, ElasticNet, GroupL1
from bilevel.lower.kinds.proximal import ProximalProblem, apply_map, check_step_size, map_of
from bilevel.lower.kinds.residual import FixedPointProblem, ResidualProblem, RootProblem
from bilevel.lower.kinds.sets import Box, LinearEqualities, NonNegative, Simplex
from bilevel.lower.objectives import LowerObjectives
from bilevel.lower.per_problem import PerProblem
from bilevel.lower.reach import batch_by_batch, cross_examined, examine_cross, examine_response
from bilevel.lower.repeatable import all_repeatable, draws, repeatable
from bilevel.lower.resolved import LowerSolver, OutOfTime, Resolved, Solves, reweighted
from bilevel.lower.samples.draws import Draw, Partition
from bilevel.lower.samples.oracles import FirstDerivatives, LowerParts, Oracles
from bilevel.lower.sampling import are_samples, halves
from bilevel.lower.selection import (
    Selection,
    Tikhonov,
    check_selection,
    check_tikhonov,
    check_tikhonov_names,
    selected,
)
from bilevel.lower.staleness import BufferWatch, Inputs, StaleSystemError, strided
from bilevel.lower.surroundings import (
    autocasts,
    check_batch,
    check_batches,
    check_recordable,
    differentiates,
    explaining_batches,
    under_autocasts,
)

__all__ = [
    "L1",
    "Box",
    "BufferWatch",
    "ByName",
    "Draw",
    "ElasticNet",
    "Examination",
    "FirstDerivatives",
    "FixedPointProblem",
    "GroupL1",
    "Inputs",
    "LinearEqualities",
    "LowerObjectives",
    "LowerParts",
    "LowerSolver",
    "NonNegative",
    "Oracles",
    "OutOfTime",
    "Partition",
    "PerProblem",
    "ProximalMap",
    "ProximalPoint",
    "ProximalProblem",
    "ResidualProblem",
    "Resolved",
    "RootProblem",
    "Selection",
    "Simplex",
    "Solves",
    "StaleSystemError",
    "Tikhonov",
    "all_repeatable",
    "apply_map",
    "are_samples",
    "autocasts",
    "batch_by_batch",
    "check_batch",
    "check_batches",
    "check_recordable",
    "check_selection",
    "check_step_size",
    "check_tikhonov",
    "check_tikhonov_names",
    "cross_examined",
    "differentiates",
    "draws",
    "examine_cross",
    "examine_curvature",
    "examine_response",
    "explaining_batches",
    "halves",
    "in_double_precision",
    "largest_entry",
    "lower_derivatives",
    "lower_value",
    "map_of",
    "mean_residual",
    "repeatable",
    "residual_field",
    "reweighted",
    "selected",
    "strided",
    "thorough_examinations",
    "training_derivatives",
    "training_residual",
    "under_autocasts",
    "upper_derivatives",
]
