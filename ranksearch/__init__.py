"""ranksearch: compress a trained CNN by searching a tensor decomposition and its ranks for every layer."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ranksearch.api import search as search
    from ranksearch.compress.export import export_model as export_model
    from ranksearch.compress.inventory import Inventory as Inventory
    from ranksearch.compress.inventory import inventory as inventory
    from ranksearch.compress.merging import merge_ as merge_
    from ranksearch.compress.saved import load_model as load_model
    from ranksearch.compress.saved import save_model as save_model
    from ranksearch.compress.surgery import factorize_ as factorize_
    from ranksearch.data import Splits as Splits
    from ranksearch.errors import RankSearchError as RankSearchError
    from ranksearch.methods import register_method as register_method
    from ranksearch.methods.layer import Layer as Layer
    from ranksearch.plan import CP as CP
    from ranksearch.plan import CP4 as CP4
    from ranksearch.plan import SVD as SVD
    from ranksearch.plan import TT as TT
    from ranksearch.plan import Dense as Dense
    from ranksearch.plan import Factorization as Factorization
    from ranksearch.plan import Plan as Plan
    from ranksearch.plan import Spatial as Spatial
    from ranksearch.plan import Tucker2 as Tucker2
    from ranksearch.results.costs import Cost as Cost
    from ranksearch.results.costs import register_cost as register_cost
    from ranksearch.results.record import StudyRecord as StudyRecord
    from ranksearch.results.trials import TrialRecord as TrialRecord
    from ranksearch.spec import Finalists as Finalists
    from ranksearch.spec import Latency as Latency
    from ranksearch.spec import Recipe as Recipe
    from ranksearch.spec import Search as Search
    from ranksearch.spec import Space as Space
    from ranksearch.study.options import Local as Local
    from ranksearch.study.options import Ray as Ray
    from ranksearch.task.task import Task as Task

__version__ = "0.2.0"

_NAMES_BY_MODULE = {
    "api": ("search",),
    "compress.export": ("export_model",),
    "compress.inventory": (
        "Inventory",
        "inventory",
    ),
    "compress.merging": ("merge_",),
    "compress.saved": (
        "load_model",
        "save_model",
    ),
    "compress.surgery": ("factorize_",),
    "data": ("Splits",),
    "errors": ("RankSearchError",),
    "methods": ("register_method",),
    "methods.layer": ("Layer",),
    "plan": (
        "CP",
        "CP4",
        "Dense",
        "Factorization",
        "Plan",
        "SVD",
        "Spatial",
        "TT",
        "Tucker2",
    ),
    "results.costs": ("Cost", "register_cost"),
    "results.record": ("StudyRecord",),
    "results.trials": ("TrialRecord",),
    "spec": (
        "Finalists",
        "Latency",
        "Recipe",
        "Search",
        "Space",
    ),
    "study.options": (
        "Local",
        "Ray",
    ),
    "task.task": ("Task",),
}

__all__ = ["__version__", *(name for names in _NAMES_BY_MODULE.values() for name in names)]


def __getattr__(name: str) -> Any:
    # Import each name on first use, so that `ranksearch --help` and reports do not wait for torch.
    for module, names in _NAMES_BY_MODULE.items():
        if name in names:
            return getattr(importlib.import_module(f"ranksearch.{module}"), name)
    raise AttributeError(f"module 'ranksearch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
