"""Methods that move both levels and the adjoint variable from samples drawn for each step; one method a file."""

from bilevel.hypergradients.single_loop.amigo import AmIGO
from bilevel.hypergradients.single_loop.bome import BOME
from bilevel.hypergradients.single_loop.f2sa import F2SA
from bilevel.hypergradients.single_loop.frame import AdjointLoop, Estimate, Point, SingleLoop, directions
from bilevel.hypergradients.single_loop.fsla import FSLA
from bilevel.hypergradients.single_loop.ma_soba import MASOBA
from bilevel.hypergradients.single_loop.mrbo import MRBO
from bilevel.hypergradients.single_loop.saba import SABA
from bilevel.hypergradients.single_loop.soba import SOBA
from bilevel.hypergradients.single_loop.srba import SRBA
from bilevel.hypergradients.single_loop.stocbio import StocBiO
from bilevel.hypergradients.single_loop.sustain import SUSTAIN
from bilevel.hypergradients.single_loop.ttsa import TTSA

__all__ = [
    "BOME",
    "F2SA",
    "FSLA",
    "MASOBA",
    "MRBO",
    "SABA",
    "SOBA",
    "SRBA",
    "SUSTAIN",
    "TTSA",
    "AdjointLoop",
    "AmIGO",
    "Estimate",
    "Point",
    "SingleLoop",
    "StocBiO",
    "directions",
]
