"""Counts multiply-accumulates while a model runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _recurrence(inputs: Tensor, input_weights: Tensor, state_weights: Tensor, *args: Any, **kwargs: Any) -> int:
    steps, batch = inputs.shape[:2]
    return 2 * steps * batch * (input_weights.numel() + state_weights.numel())


FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten.mkldnn_rnn_layer: _recurrence,
}
"""CPU operations that are missing from torch's own table of formulas."""


class OperationCounter(TorchDispatchMode):
    """Counts operations by torch's own formulas, two per multiply-accumulate, as torch's FlopCounterMode does.

    FlopCounterMode imports torch's compiler, which adds a second to every start. Branches of a `torch.cond` are not counted.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Tells torch not to import its compiler for this mode. A torch that no longer calls this method only loses that second.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        keywords = dict(kwargs or {})
        if isinstance(func, torch._ops.HigherOrderOperator):
            return NotImplemented
        formula = FORMULAS.get(func._overloadpacket) or flop_registry.get(func._overloadpacket)
        if formula is None:
            with self:
                result = func.decompose(*args, **keywords)
            if result is not NotImplemented:
                return result
        result = func(*args, **keywords)
        if formula is not None:
            self.flops += int(formula(*args, **keywords, out_val=result))
        return result


@dataclass
class _Running:
    """A module whose forward runs: the operations counted before it, and those in the modules that it has called."""

    name: str
    before: int
    inside: int = 0


class OperationsByModule:
    """The operations that a counter counts in each module of a model, by name, without those in the modules that it calls."""

    def __init__(self, counter: OperationCounter) -> None:
        self.flops = Counter[str]()
        self._counter = counter
        self._running: list[_Running] = []

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """Count in the passes of this model."""
        with ExitStack() as hooks:
            for name, module in model.named_modules():
                if not isinstance(module, torch.jit.ScriptModule):
                    # First of all hooks, since those of a layer may compute its weight.
                    hooks.enter_context(module.register_forward_pre_hook(partial(self._begin, name), prepend=True))
                    hooks.enter_context(module.register_forward_hook(partial(self._end, name)))
            yield

    def _begin(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._running.append(_Running(name, self._counter.flops))

    def _end(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        inside = 0
        while (ended := self._running.pop()).name != name:
            inside += ended.inside  # its forward raised, and a module that called it went on
        whole = self._counter.flops - ended.before
        self.flops[name] += whole - ended.inside - inside
        if self._running:
            self._running[-1].inside += whole
