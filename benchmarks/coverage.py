"""How much of other people's networks can be decomposed: all classifiers, segmentation and detection models of torchvision, and
many of timm, with random weights.

    python benchmarks/coverage.py --write                          # hours on one core; makes the table of docs/benchmarks.md
    python benchmarks/coverage.py --families vgg timm/convnext     # minutes; prints the table only

timm is no dependency of this package: `pip install timm`. Each model has a process of its own, so that a crash is a row.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import shlex
import statistics
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from multiprocessing.connection import Connection
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torchvision
from pages import machine, row, table, write_section
from torch import Tensor, nn

from ranksearch.compress.inventory import inventory
from ranksearch.errors import first_line
from ranksearch.results.account import account_by_kind

TIMM = {
    "timm/bit": "resnetv2_50x1_bit resnetv2_50 resnetv2_50d_gn",
    "timm/coat": "coat_tiny coat_lite_tiny coatnet_0_224 coatnet_nano_rw_224",
    "timm/convmixer": "convmixer_768_32 convmixer_1024_20_ks9_p14",
    "timm/convnext": "convnext_atto convnext_tiny convnext_tiny_hnf convnextv2_atto convnextv2_tiny",
    "timm/csp": "cspresnet50 cspresnext50 cspdarknet53 darknet53 cs3darknet_m",
    "timm/deit": "deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 deit3_small_patch16_224",
    "timm/densenet": "densenet121 densenetblur121d",
    "timm/dla": "dla34 dla60 dla60x dla60_res2net",
    "timm/dpn": "dpn68 dpn68b dpn92",
    "timm/edgenext": "edgenext_xx_small edgenext_small",
    "timm/efficientformer": "efficientformer_l1 efficientformerv2_s0",
    "timm/efficientnet": "efficientnet_b0 efficientnet_lite0 efficientnetv2_rw_t mixnet_s mnasnet_100 fbnetc_100",
    "timm/efficientvit": "efficientvit_b0 efficientvit_m0",
    "timm/fastvit": "fastvit_t8 fastvit_s12",
    "timm/ghostnet": "ghostnet_100 ghostnetv2_100",
    "timm/hgnet": "hgnet_tiny hgnetv2_b0",
    "timm/hrnet": "hrnet_w18_small hrnet_w18",
    "timm/inception": "inception_v3 inception_v4 inception_resnet_v2 xception41 legacy_xception",
    "timm/levit": "levit_128s levit_conv_128s",
    "timm/maxvit": "maxvit_tiny_tf_224 maxvit_rmlp_pico_rw_256 maxxvit_rmlp_nano_rw_256",
    "timm/mixer": "mixer_s32_224 gmlp_ti16_224 resmlp_12_224",
    "timm/mobilenet": "mobilenetv1_100 mobilenetv2_100 mobilenetv3_small_100 mobilenetv4_conv_small lcnet_100 tinynet_a",
    "timm/mobileone": "mobileone_s0 repvgg_a0 repghostnet_100",
    "timm/mobilevit": "mobilevit_xxs mobilevitv2_050",
    "timm/nest": "nest_tiny",
    "timm/nfnet": "nfnet_l0 dm_nfnet_f0 nf_resnet26 nf_regnet_b0 eca_nfnet_l0",
    "timm/pit": "pit_ti_224 pit_s_distilled_224",
    "timm/poolformer": "poolformer_s12 poolformerv2_s12 caformer_s18 convformer_s18",
    "timm/pvt": "pvt_v2_b0 pvt_v2_b1",
    "timm/regnet": "regnetx_002 regnety_002 regnetz_005 regnetv_040",
    "timm/res2net": "res2net50_26w_4s res2next50 resnest14d",
    "timm/resnet": "resnet18 resnet26d resnet50 resnet50_gn seresnet50 ecaresnet26t skresnet18 resnetrs50 gcresnet33ts",
    "timm/resnext": "resnext50_32x4d seresnext50_32x4d",
    "timm/rexnet": "rexnet_100 rexnetr_200",
    "timm/selecsls": "selecsls42b",
    "timm/senet": "legacy_seresnet18 legacy_senet154",
    "timm/starnet": "starnet_s1",
    "timm/swin": "swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swin_s3_tiny_224",
    "timm/tf": "tf_efficientnet_b0 tf_efficientnet_lite0 tf_efficientnetv2_s tf_mobilenetv3_small_075 tf_mixnet_s",
    "timm/tresnet": "tresnet_m",
    "timm/twins": "twins_pcpvt_small twins_svt_small",
    "timm/vgg": "vgg11 vgg11_bn vgg16",
    "timm/vit": "vit_tiny_patch16_224 vit_small_patch32_224 vit_base_patch32_224 vit_tiny_r_s16_p8_224 eva02_tiny_patch14_224",
    "timm/visformer": "visformer_tiny",
    "timm/volo": "volo_d1_224",
    "timm/xcit": "xcit_nano_12_p16_224 xcit_tiny_12_p16_224",
}
MODULES = {"": torchvision.models, "segmentation/": torchvision.models.segmentation, "detection/": torchvision.models.detection}
SIZES = {"": 224, "segmentation/": 256, "detection/": 320}
"""Heights and widths of inputs. Those of torchvision's Inception are 299, and timm names its own."""
MAX_SECONDS = 1200
"""How long one model may take."""


@dataclass(frozen=True)
class Found:
    """The shares of one model's parameters and multiply-accumulates in decomposable layers, and its largest other parts."""

    params: float
    macs: float
    others: Mapping[str, float]
    """By title of the part, its share of the parameters or of the multiply-accumulates, the larger one."""


class Detector(nn.Module):
    """A detector of torchvision that takes a batch of images as one tensor."""

    def __init__(self, name: str) -> None:
        super().__init__()
        sizes = {} if name.startswith("ssd") else {"min_size": SIZES["detection/"], "max_size": SIZES["detection/"]}
        self.net = torchvision.models.get_model(name, weights=None, weights_backbone=None, **sizes)

    def forward(self, images: Tensor) -> Any:
        return self.net(list(images))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=["*"], help="only these; patterns such as 'timm/*' match several")
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    wanted = {
        family: names for family, names in families().items() if any(fnmatchcase(family, each) for each in options.families)
    }
    if not wanted:
        raise SystemExit(f"--families must match a family, but got {options.families}; they are {', '.join(families())}.")
    needs_timm = any(family.startswith("timm/") for family in wanted)
    if needs_timm and not importlib.util.find_spec("timm"):
        raise SystemExit("The families timm/* need the package timm; install it, or leave them out by --families.")
    lines = [machine("torch", "torchvision", *(["timm"] if needs_timm else []))]
    lines += table(["family", "models", "parameters", "least", "MACs", "least", "largest part of the rest"])
    lines += [line for family, names in wanted.items() for line in family_rows(family, names)]
    if options.write:
        only = "" if options.families == ["*"] else f"--families {shlex.join(options.families)} "
        write_section("coverage", f"python benchmarks/coverage.py {only}--write", "\n".join(lines))


def families() -> dict[str, list[str]]:
    """The names of models by family: those of torchvision by the file that defines them."""
    found: dict[str, list[str]] = defaultdict(list)
    for prefix, module in MODULES.items():
        for name in torchvision.models.list_models(module):
            file = torchvision.models.get_model_builder(name).__module__.rpartition(".")[2]
            found[f"{prefix}{file}"].append(name)
    return found | {family: names.split() for family, names in TIMM.items()}


def family_rows(family: str, names: Sequence[str]) -> list[str]:
    """One row for the models that ran, and one for each that failed."""
    results = {name: in_a_process(family, name) for name in names}
    done = [result for result in results.values() if isinstance(result, Found)]
    rows = [row(family, name, *[""] * 4, result) for name, result in results.items() if isinstance(result, str)]
    if done:
        shares = [[found.params for found in done], [found.macs for found in done]]
        cells = [f"{value:.1%}" for each in shares for value in (statistics.mean(each), min(each))]
        rows.insert(0, row(family, len(done), *cells, largest(done)))
    return rows


def largest(done: Sequence[Found]) -> str:
    """The other part with the largest mean share."""
    sums: dict[str, float] = defaultdict(float)
    for found in done:
        for title, share in found.others.items():
            sums[title] += share / len(done)
    title = max(sums, key=lambda title: sums[title], default="")
    return f"{title} ({sums[title]:.1%})" if title else ""


def in_a_process(family: str, name: str) -> Found | str:
    """The shares of a model, or why there are none."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, family, name), daemon=True)
    process.start()
    sender.close()
    try:
        if receiver.poll(MAX_SECONDS):
            return receiver.recv()
        process.kill()
        return f"took longer than {MAX_SECONDS} s"
    except EOFError:
        process.join()
        return f"ended its process ({process.exitcode})"
    finally:
        process.join()


def _send(sender: Connection, family: str, name: str) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sender.send(coverage(*made(family, name)))
    except Exception as error:  # a model's code may raise anything
        sender.send(f"{type(error).__name__}: {first_line(error)}"[:200])


def made(family: str, name: str) -> tuple[nn.Module, Tensor]:
    """A model with random weights, and a batch of one input."""
    torch.manual_seed(0)
    prefix = f"{family.partition('/')[0]}/" if "/" in family else ""
    if prefix == "timm/":
        import timm

        model: Any = timm.create_model(name, pretrained=False)
        return model, torch.randn(1, *model.default_cfg["input_size"])
    size = 299 if name == "inception_v3" else SIZES[prefix]
    example = torch.rand(1, 3, size, size)
    if prefix == "detection/":
        return Detector(name), example
    backbone = {"weights_backbone": None} if prefix else {}
    return torchvision.models.get_model(name, weights=None, **backbone), example


def coverage(model: nn.Module, example: Tensor) -> Found:
    """The shares of a model.

    Raises:
        Exception: whatever the inventory or the model raises.
    """
    found = inventory(model, example)
    shares = {part.title: (part.params / found.params, part.macs / found.macs) for part in account_by_kind(found.account)}
    params, macs = shares.pop("decomposable layers")
    return Found(params, macs, {title: max(both) for title, both in shares.items()})


if __name__ == "__main__":
    main()
