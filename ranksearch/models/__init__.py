"""Models for studies, named as `model = "ranksearch.models:lenet"`; a user's own models are named in the same way."""

from ranksearch.models.ccnn import ccnn, td_ccnn
from ranksearch.models.lenet import lenet, lenet3, residual_lenet, td_lenet
from ranksearch.models.nin import nin
from ranksearch.models.pydnet import pydnet
from ranksearch.models.resnet import resnet20, resnet56
from ranksearch.models.td import td_conv
from ranksearch.models.vgg import vgg16

__all__ = [
    "ccnn",
    "lenet",
    "lenet3",
    "nin",
    "pydnet",
    "residual_lenet",
    "resnet20",
    "resnet56",
    "td_ccnn",
    "td_conv",
    "td_lenet",
    "vgg16",
]
