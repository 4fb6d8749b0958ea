"""ranksearch: which tensor decomposition and which rank, layer by layer, make a trained CNN many times smaller."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ranksearch.api import search as search
    from ranksearch.data import Splits as Splits
    from ranksearch.errors import RankSearchError as RankSearchError
    from ranksearch.export import load_model as load_model
    from ranksearch.layers import inventory as inventory
    from ranksearch.options import Options as Options
    from ranksearch.plan import CP as CP
    from ranksearch.plan import CP4 as CP4
    from ranksearch.plan import SVD as SVD
    from ranksearch.plan import Dense as Dense
    from ranksearch.plan import Plan as Plan
    from ranksearch.plan import Spatial as Spatial
    from ranksearch.plan import Tucker2 as Tucker2
    from ranksearch.spec import Recipe as Recipe
    from ranksearch.surgery import factorize_ as factorize_
    from ranksearch.tasks import Task as Task

__version__ = "0.1.0"

_HOMES = {
    "api": ("search",),
    "data": ("Splits",),
    "errors": ("RankSearchError",),
    "export": ("load_model",),
    "layers": ("inventory",),
    "options": ("Options",),
    "plan": ("CP", "CP4", "SVD", "Dense", "Plan", "Spatial", "Tucker2"),
    "spec": ("Recipe",),
    "surgery": ("factorize_",),
    "tasks": ("Task",),
}


def __getattr__(name: str) -> Any:
    # Loaded when first used, so that `ranksearch --help` and reports do not wait for torch.
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"ranksearch.{module}"), name)
    raise AttributeError(f"module 'ranksearch' has no attribute {name!r}")
