"""Counts multiply-accumulates while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
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
