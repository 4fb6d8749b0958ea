"""TD blocks: convolutions that are factorized by design and trained from scratch (Salman 2018)."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from ranksearch.compress.scratch import initialise_
from ranksearch.errors import ModelError, nearest
from ranksearch.methods import METHODS
from ranksearch.methods.parts import META_DEVICE, built
from ranksearch.plan import Factorization

NORMS = ("all", "inner", "none")


def td_conv(
    in_channels: int, out_channels: int, kernel_size: int, factorization: Factorization, *, stride: int = 1,
    padding: int = 0, norm: str = "all", activation: type[nn.Module] = nn.ReLU, residual: bool = False,
) -> nn.Module:  # fmt: skip
    """A convolution stored as the parts of `factorization`, with an activation after the last part only.

    In the thesis, activations between the parts cost 5 percentage points of accuracy, and without batch normalisation after
    each part its CP model did not train. Each part has a bias, as in the thesis. Weights are initialised by `initialise_`.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: height and width of the kernel.
        factorization: a factorization whose method can store such a kernel. With `CP4`, the parts are a 1x1, a depthwise
            d x 1, a depthwise 1 x d and a 1x1 convolution.
        stride: stride of the convolution.
        padding: padding of the convolution.
        norm: batch normalisation after "all" parts, after the "inner" ones (all but the last), or "none".
        activation: class of the activation at the end.
        residual: add the block's input before the activation (He et al. 2016); future work of the thesis.

    Raises:
        ModelError: the method cannot store such a kernel, `norm` is unknown, or a residual block changes the shape.
    """
    if norm not in NORMS:
        raise ModelError(f"norm must be one of {', '.join(NORMS)}, but got {norm!r}.{nearest(norm, NORMS)}")
    if residual and (in_channels != out_channels or stride != 1 or 2 * padding != kernel_size - 1):
        raise ModelError(
            f"A residual block must keep the shape of its input, but got {in_channels} -> {out_channels} channels, stride "
            f"{stride} and padding {padding} around a kernel of {kernel_size}."
        )
    steps: OrderedDict[str, nn.Module] = OrderedDict()
    dense = nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=padding, device=META_DEVICE)
    weight, method = tuple(dense.weight.shape), METHODS.get(type(factorization))
    if method is None or not method.applies(weight, linear=False):
        size = f"{kernel_size}x{kernel_size}"
        raise ModelError(f"A TD block needs a factorization that can store its kernel, but got {factorization} for {size}.")
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
    """The output of `block` plus its input."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, inputs: Tensor) -> Tensor:
        added: Tensor = inputs + self.block(inputs)
        return added
