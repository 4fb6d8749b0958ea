"""The decompositions, one per file. To add one: its value in `ranksearch.plan`, its file, and its line here.

To add one outside of this package: a subclass of `ranksearch.Factorization`, a subclass of `Method`, and a call of
`register_method`.
"""

from ranksearch.methods.base import FEWER_PARAMS, Method, Prepared, RankConstraints, nearest_rank
from ranksearch.methods.cp import CPMethod
from ranksearch.methods.cp4 import CP4Method
from ranksearch.methods.parts import Part, Shape
from ranksearch.methods.registry import METHODS, method_of, register_method
from ranksearch.methods.spatial import SpatialMethod
from ranksearch.methods.svd import SVDMethod
from ranksearch.methods.tt import TTMethod
from ranksearch.methods.tucker2 import Tucker2Method

register_method(SVDMethod())
register_method(SpatialMethod())
register_method(Tucker2Method())
register_method(CPMethod())
register_method(CP4Method())
register_method(TTMethod())

__all__ = [
    "FEWER_PARAMS",
    "METHODS",
    "Method",
    "Part",
    "Prepared",
    "RankConstraints",
    "Shape",
    "method_of",
    "nearest_rank",
    "register_method",
]
