"""The settings of a study: its sections and the whole, as frozen values. Study files have the same keys."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import tomli_w

from ranksearch.plan import KINDS, Dense
from ranksearch.results.costs import COSTS
from ranksearch.results.limits import Limits
from ranksearch.settings import (
    at_least,
    documented,
    matching,
    one_of,
    positive,
    setting,
    to_table,
)

SAMPLERS = ("rank", "tpe", "nsga2", "gp", "random")
PRECISIONS = ("float32", "bfloat16")
FROM_PYTHON = "python:given"
"""The value of `task.model` and `task.data` in the spec of a study whose model and data were passed to `ranksearch.search`."""
STARTS = ("decomposed", "scratch")
SCHEDULES = ("one-shot", "layerwise")
TIMED_RANK_MULTIPLE = 4
"""ONNX Runtime's depthwise convolutions are slow unless their channels are a multiple of 4: a 7x7 one of 25 channels took
4.4 ms, one of 24 took 0.9."""


def _reference(help: str, **kwargs: Any) -> Any:
    return matching(r"\w[\w.]*:\w[\w.]*", "'package.module:name'", help, **kwargs)


def _costs(help: str) -> Any:
    return setting(help, f"at least one of {', '.join(COSTS)}", bool, default=("params",))


def _fall_from_one(widths: Sequence[float]) -> bool:
    return bool(widths) and widths[0] == 1 and widths[-1] > 0 and all(a > b for a, b in pairwise(widths))


def _are_modules(names: Iterable[str]) -> bool:
    return all(re.fullmatch(r"\w+(\.\w+)*", name) for name in names)


@documented
@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """The model to compress, its data, its loss and its score. References are `package.module:name`."""

    model: str = _reference("a function that returns the dense `nn.Module`, such as `torchvision.models:resnet18`")
    model_args: Mapping[str, Any] = setting("the arguments of `task.model`", default_factory=dict)
    data: str = _reference("a function that returns `ranksearch.Splits`")
    data_args: Mapping[str, Any] = setting("the arguments of `task.data`", default_factory=dict)
    loss: str = _reference(
        "a function of (outputs, targets) that returns a scalar tensor", default="torch.nn.functional:cross_entropy"
    )
    score: str = _reference(
        "a function of a whole split's (outputs, targets): higher is better, and 0.01 is one percentage point",
        default="ranksearch.task.task:accuracy",
    )
    show: str = matching(
        r"(\w[\w.]*:\w[\w.]*)?", "'package.module:name'",
        "a function of (`input`, `target` or `output`, one such value) that returns a picture, height x width x 3 of uint8, or "
        "None; the report then shows inputs and outputs",
        default="",
    )  # fmt: skip


@documented
@dataclass(frozen=True)
class Recipe:
    """How to train: AdamW, with a learning rate that rises over the first 15 % of the steps and falls to zero as a cosine."""

    epochs: int = at_least(0, "epochs of training; 0 trains nothing")
    batch_size: int = at_least(1, "inputs in a step", default=64)
    learning_rate: float = positive("the highest learning rate", default=1e-3)
    weight_decay: float = at_least(0, "the weight decay of AdamW", default=1e-4)
    precision: str = one_of(  # Micikevicius et al. 2018; bfloat16 needs no loss scaling
        PRECISIONS,
        "`float32`, or `bfloat16` for mixed precision in training; weights and scores stay float32; slow on GPUs before Ampere",
        default="float32",
    )


@documented
@dataclass(frozen=True, kw_only=True)
class DenseSpec(Recipe):
    """Where the weights of the dense model come from: a file, training, or both; neither if the model has trained weights."""

    weights: str = setting(
        "a file with the state dict to start from, `.safetensors` or `.pt`, relative to the current folder",
        default="",
    )


@documented
@dataclass(frozen=True, kw_only=True)
class Finalists(Recipe):
    """Which trials of the front become finalists, and how these are fine-tuned again, for longer, and tested."""

    # Not in the repr, by which checkpoints know their recipe: the count does not change the training.
    count: int = at_least(1, "how many trials of the front become finalists", default=10, repr=False)
    sweeps: int = at_least(
        0,
        "further sweeps over the factors before fine-tuning: HOOI for Tucker-2, alternating least squares for CP",
        default=0,
    )
    schedule: str = one_of(
        SCHEDULES,
        "`one-shot`, or `layerwise` as in the thesis: decompose one layer at a time, the last first, and train for `epochs` "
        "after each",
        default="one-shot",
    )


@documented
@dataclass(frozen=True, kw_only=True)
class Space:
    """The methods and ranks that the search may use, and the layers it may decompose."""

    methods: tuple[str, ...] = setting(
        f"methods to decompose layers with: {', '.join(f'`{name}`' for name in KINDS if name != Dense.method)}, "
        "or methods of your own",
        "at least one method",
        bool,
        default=("tucker2", "cp", "svd"),
    )
    plugins: tuple[str, ...] = setting(
        "modules that register methods of your own; they are imported first",
        "names of modules such as 'my_pkg.methods'",
        _are_modules,
        default=(),
    )
    layers: tuple[str, ...] = setting(
        "decompose only these layers, by names or patterns such as `stage2.*`; empty for all that can be decomposed",
        default=(),
    )
    skip: tuple[str, ...] = setting("leave these layers dense, by names or patterns", default=())
    rank_multiple: int | None = at_least(
        1,
        "ranks are multiples of this number, as some hardware prefers; a rank whose maximum is smaller stays at its maximum. "
        f"The default is 1, and {TIMED_RANK_MULTIPLE} in a study that minimises or limits the latency",
        default=None,
    )
    smaller_in: tuple[str, ...] = _costs(
        "use only factorizations that are smaller than the dense layer in each of these costs: `params`, `macs`, `latency`"
    )
    widths: tuple[float, ...] = setting(
        "also search from narrower nets, made of the dense one by pruning channels: the share of the multiply-accumulates that "
        "each net keeps, 1 for the dense net itself",
        "shares that begin with 1 and fall, each above 0",
        _fall_from_one,
        default=(1.0,),
    )
    data_aware: bool = setting(
        "minimise the error of each layer's outputs on training inputs, not the error of its weights", default=True
    )
    start: str = one_of(
        STARTS,
        "train each plan from the `decomposed` weights of the dense net, or from random weights (`scratch`)",
        default="decomposed",
    )


@documented
@dataclass(frozen=True, kw_only=True)
class Search:
    """The sampler, the length of the search, its costs and its limits."""

    sampler: str = one_of(
        SAMPLERS, "the sampler that proposes plans: our own, `rank`, or Optuna's `tpe`, `nsga2`, `gp`, `random`", default="rank"
    )
    trials: int = at_least(1, "how many plans to train in all; plans over a limit and repeated plans do not count", default=60)
    first: tuple[str, ...] = setting(
        "files of plans to try first, such as `models/5/plan.json`, relative to the current folder", default=()
    )
    minimize: tuple[str, ...] = _costs("the costs to minimise while the score is maximised: `params`, `macs`, `latency`")
    minutes: float | None = positive(
        "stop starting trials after this many minutes of search, summed over all runs; other stages do not count", default=None
    )
    min_score: float | None = setting(
        "models with a lower validation score are not on the front", "a finite number", math.isfinite, default=None
    )
    min_ratio: float | None = positive("models with a lower compression ratio are not trained", default=None)
    max_params: int | None = at_least(1, "models with more parameters are not trained", default=None)
    max_macs: int | None = at_least(1, "models with more multiply-accumulates for one input are not trained", default=None)
    max_latency_ms: float | None = positive("models with a higher predicted latency are not trained", default=None)

    @property
    def limits(self) -> Limits:
        """The limits that every model of the front must keep."""
        return Limits.of(dataclasses.asdict(self))


@documented
@dataclass(frozen=True, kw_only=True)
class Latency:
    """Where and how models are timed."""

    runtime: str = matching(
        r"auto|onnxruntime|torch|\w[\w.]*:\w[\w.]*",
        "auto, onnxruntime, torch, or 'package.module:name'",
        "`onnxruntime` on the CPU, `torch`, or a function of your own that takes a module and its inputs and returns "
        "milliseconds, as of a phone behind a cable; `auto` is ONNX Runtime on a CPU and torch elsewhere",
        default="auto",
    )
    threads: int = at_least(1, "threads that a model runs on", default=1)
    batch_size: int = at_least(1, "inputs in one pass", default=1)


@documented
@dataclass(frozen=True, kw_only=True)
class StudySpec:
    """A whole study. Equal specs give equal studies."""

    name: str = matching(
        r"[A-Za-z0-9][\w.-]*", "letters, digits, '.', '_' or '-'", "the name of the study, and of its folder `runs/NAME`"
    )
    about: str = setting("a line for `ranksearch studies` and the report", default="")
    seed: int = setting("the seed of everything random", "between 0 and 2147483647", lambda seed: 0 <= seed < 2**31, default=0)
    controls: int = at_least(
        0,
        "how many narrower copies of the net to train from random weights, for the epochs of `dense`, `narrow` (where "
        "`space.widths` asks for narrower nets) and `finalists` together; the report compares the front with them",
        default=0,
    )
    task: TaskSpec = setting("the model, its data, its loss and its score; functions are named as `package.module:name`")
    dense: DenseSpec = setting("where the dense net's weights come from: a file, training, or both")
    space: Space = setting(
        "the methods and ranks that the search may use, and the layers it may decompose", default_factory=Space
    )
    search: Search = setting("the sampler, the length of the search, its costs and its limits", default_factory=Search)
    latency: Latency = setting("where and how models are timed", default_factory=Latency)
    narrow: Recipe = setting("how the narrower nets of `space.widths` are trained", default_factory=lambda: Recipe(epochs=10))
    finetune: Recipe = setting("how each trial is fine-tuned")
    finalists: Finalists = setting(
        "which trials of the front become finalists, and how these are fine-tuned again, for longer, and tested"
    )

    @property
    def timed(self) -> bool:
        """Whether the search needs the latency of every plan."""
        return "latency" in (*self.search.minimize, *self.space.smaller_in) or self.search.max_latency_ms is not None

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain TOML values; leaves out settings that are None."""
        return to_table(self)

    def to_toml(self) -> str:
        """The resolved spec as TOML: every key, with defaults and overrides."""
        return tomli_w.dumps(self.to_dict())

    def identity(self) -> dict[str, Any]:
        """The settings that must not change when a study is resumed, flat: `section.key` -> value.

        The budget, the limits and the description may change: they do not change any score. The paths in `search.first` may
        change, because the storage holds the plans themselves. The modules in `space.plugins` may be renamed. `task.show` only
        draws what was computed.
        """
        flat: dict[str, Any] = {}
        for key, value in self.to_dict().items():
            flat |= {f"{key}.{inner}": entry for inner, entry in value.items()} if isinstance(value, dict) else {key: value}
        may_change = {"about", "controls", "task.show", "space.plugins", "search.trials", "search.minutes", "search.first"}
        may_change |= {"finalists.count", *(f"search.{key}" for key in Limits.names())}
        may_change |= set() if self.timed else {key for key in flat if key.startswith("latency.")}
        may_change |= set() if len(self.space.widths) > 1 else {key for key in flat if key.startswith("narrow.")}
        return {key: value for key, value in flat.items() if key not in may_change}
