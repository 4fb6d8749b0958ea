"""Decompositions of one layer, one a file. Adding one: its value in `ranksearch.plan`, its file, and its line here."""

from ranksearch.methods.base import FEWER_PARAMS, Method, Prepared, RankConstraints, Shape, nearest_rank
from ranksearch.methods.cp import CPMethod
from ranksearch.methods.cp4 import CP4Method
from ranksearch.methods.spatial import SpatialMethod
from ranksearch.methods.svd import SVDMethod
from ranksearch.methods.tucker2 import Tucker2Method
from ranksearch.plan import Factorization

METHODS: dict[type[Factorization], Method] = {
    method.kind: method for method in (SVDMethod(), SpatialMethod(), Tucker2Method(), CPMethod(), CP4Method())
}

__all__ = ["FEWER_PARAMS", "METHODS", "Method", "Prepared", "RankConstraints", "Shape", "nearest_rank"]
