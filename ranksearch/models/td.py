"""TD blocks for design: convolutions that are factorized from the start, and trained so (Salman 2018)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from torch import Tensor, nn

from ranksearch.compress.scratch import initialise_
from ranksearch.errors import ModelError, nearest
from ranksearch.plan import CP, CP4, SVD, Factorization, Tucker2

NORMS = ("all", "inner", "none")


def td_conv(
    in_channels: int, out_channels: int, kernel_size: int, factorization: Factorization, *, stride: int = 1,
    padding: int = 0, norm: str = "all", activation: type[nn.Module] = nn.ReLU, residual: bool = False,
) -> nn.Module:  # fmt: skip
    """A convolution stored as `factorization` says, with the activation at its end only.

    An activation between the sub-convolutions cost the thesis 5 points of accuracy, and without batch normalisation after
    each its CP net did not train. Every sub-convolution has a bias, as the thesis counts them. Weights are drawn
    as `initialise_` does.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: of both sides.
        factorization: CP4 (1x1, depthwise d x 1, depthwise 1 x d, 1x1), CP (1x1, depthwise d x d, 1x1), Tucker2 (1x1,
            d x d, 1x1), or SVD (1x1, 1x1) where the kernel is 1x1.
        stride: of the kernel.
        padding: of the kernel.
        norm: batch normalisation after "all" sub-convolutions, the "inner" ones (all but the last), or "none".
        activation: what ends the block.
        residual: adds the block's input before the activation (He et al. 2016); a future work of the thesis.

    Raises:
        ModelError: a factorization that is no block, an unknown `norm`, or a residual block that changes the shape.
    """
    if norm not in NORMS:
        raise ModelError(f"norm must be one of {', '.join(NORMS)}, but got {norm!r}.{nearest(norm, NORMS)}")
    if residual and (in_channels != out_channels or stride != 1 or 2 * padding != kernel_size - 1):
        raise ModelError(
            f"A residual block must keep the shape of its input, but got {in_channels} -> {out_channels} channels, stride "
            f"{stride} and padding {padding} around a kernel of {kernel_size}."
        )
    steps: OrderedDict[str, nn.Module] = OrderedDict()
    parts = list(_parts(in_channels, out_channels, kernel_size, factorization, stride, padding))
    initialise_([conv for _, conv in parts], last="relu" if activation is nn.ReLU else "linear")
    for name, conv in parts:
        last = name == parts[-1][0]
        steps[name] = conv
        if norm == "all" or (norm == "inner" and not last):
            steps[f"{name}_norm"] = nn.BatchNorm2d(conv.out_channels)
    if residual:
        return nn.Sequential(OrderedDict(block=Residual(nn.Sequential(steps)), activation=activation()))
    return nn.Sequential(steps | {"activation": activation()})


class Residual(nn.Module):
    """What a block makes of its input, plus the input."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, inputs: Tensor) -> Tensor:
        added: Tensor = inputs + self.block(inputs)
        return added


def _parts(into: int, out: int, d: int, value: Factorization, stride: int, padding: int) -> Iterator[tuple[str, nn.Conv2d]]:
    if isinstance(value, CP4):
        yield "reduce", nn.Conv2d(into, value.rank, 1)
        yield "high", nn.Conv2d(value.rank, value.rank, (d, 1), (stride, 1), (padding, 0), groups=value.rank)
        yield "wide", nn.Conv2d(value.rank, value.rank, (1, d), (1, stride), (0, padding), groups=value.rank)
        yield "expand", nn.Conv2d(value.rank, out, 1)
    elif isinstance(value, CP):
        yield "reduce", nn.Conv2d(into, value.rank, 1)
        yield "depthwise", nn.Conv2d(value.rank, value.rank, d, stride, padding, groups=value.rank)
        yield "expand", nn.Conv2d(value.rank, out, 1)
    elif isinstance(value, Tucker2):
        yield "reduce", nn.Conv2d(into, value.rank_in, 1)
        yield "core", nn.Conv2d(value.rank_in, value.rank_out, d, stride, padding)
        yield "expand", nn.Conv2d(value.rank_out, out, 1)
    elif isinstance(value, SVD) and d == 1:
        yield "reduce", nn.Conv2d(into, value.rank, 1)
        yield "expand", nn.Conv2d(value.rank, out, 1, stride, padding)
    else:
        raise ModelError(f"A TD block is CP, CP4 or Tucker2, or SVD for a 1x1 kernel, but got {value} for {d}x{d}.")
