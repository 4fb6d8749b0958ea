"""TD blocks for design: convolutions that are factorized from the start, and trained so (Salman 2018)."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from ranksearch.compress.scratch import initialise_
from ranksearch.errors import ModelError, nearest
from ranksearch.methods import METHODS
from ranksearch.methods.parts import NOWHERE, built
from ranksearch.plan import Factorization

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
        factorization: of any method that stores such a kernel; its parts are the block's convolutions: those of CP4 1x1,
            depthwise d x 1, depthwise 1 x d, 1x1.
        stride: of the kernel.
        padding: of the kernel.
        norm: batch normalisation after "all" sub-convolutions, the "inner" ones (all but the last), or "none".
        activation: what ends the block.
        residual: adds the block's input before the activation (He et al. 2016); a future work of the thesis.

    Raises:
        ModelError: a method that stores no such kernel, an unknown `norm`, or a residual block that changes the shape.
    """
    if norm not in NORMS:
        raise ModelError(f"norm must be one of {', '.join(NORMS)}, but got {norm!r}.{nearest(norm, NORMS)}")
    if residual and (in_channels != out_channels or stride != 1 or 2 * padding != kernel_size - 1):
        raise ModelError(
            f"A residual block must keep the shape of its input, but got {in_channels} -> {out_channels} channels, stride "
            f"{stride} and padding {padding} around a kernel of {kernel_size}."
        )
    steps: OrderedDict[str, nn.Module] = OrderedDict()
    dense = nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=padding, device=NOWHERE)
    weight, method = tuple(dense.weight.shape), METHODS.get(type(factorization))
    if method is None or not method.applies(weight, linear=False):
        size = f"{kernel_size}x{kernel_size}"
        raise ModelError(f"A TD block must be stored by a method that suits its kernel, but got {factorization} for {size}.")
    parts = built(method.parts(weight, factorization.ranks))
    convs = [part.module(dense, weight, bias=True).to_empty(device="cpu") for part in parts]
    initialise_(convs, last="relu" if activation is nn.ReLU else "linear")
    for part, conv in zip(parts, convs, strict=True):
        steps[part.name] = conv
        if norm == "all" or (norm == "inner" and part is not parts[-1]):
            steps[f"{part.name}_norm"] = nn.BatchNorm2d(part.out)
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
