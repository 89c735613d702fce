"""Products with second derivatives of the lower objective: providers, Gauss-Newton, micro-batches."""

from bilevel.products.automatic import HVP, Automatic, Measurement, as_provider
from bilevel.products.gauss_newton import ComposedObjective, GaussNewton
from bilevel.products.graph import beginnings, graph_nodes, named_among, reached
from bilevel.products.graph_memory import graph_bytes
from bilevel.products.hvp import (
    FiniteDifference,
    ForwardOverReverse,
    Hessians,
    HVPProvider,
    Linearization,
    Objective,
    ReverseOverReverse,
)
from bilevel.products.lost_curvature import LOST, CurvatureErrors, curvature_errors, suspicious_operations
from bilevel.products.micro_batch import MicroBatched, micro_batched_gradient
from bilevel.products.outputs import check_outputs, check_rows
from bilevel.products.vector_field import VectorField, linearize_fields

__all__ = [
    "HVP",
    "LOST",
    "Automatic",
    "ComposedObjective",
    "CurvatureErrors",
    "FiniteDifference",
    "ForwardOverReverse",
    "GaussNewton",
    "HVPProvider",
    "Hessians",
    "Linearization",
    "Measurement",
    "MicroBatched",
    "Objective",
    "ReverseOverReverse",
    "VectorField",
    "as_provider",
    "beginnings",
    "check_outputs",
    "check_rows",
    "curvature_errors",
    "graph_bytes",
    "graph_nodes",
    "linearize_fields",
    "micro_batched_gradient",
    "named_among",
    "reached",
    "suspicious_operations",
]
