"""An inventory skips no layer that can be replaced, whatever else the forward does."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as module_hooks

from ranksearch.compress.inventory import count_macs, inventory
from ranksearch.compress.surgery import factorize_
from ranksearch.plan import SVD, Tucker2
from tests.nets import IMAGE, Net


def watched():
    """A model with a hook that reads whatever parameters there are, so a layer can be replaced."""
    model = Net(lambda n, x: n.two(n.one(x.to(next(n.parameters()).device))), one=nn.Conv2d(4, 4, 1), two=nn.Conv2d(4, 2, 1))
    model.register_forward_hook(lambda module, args, output: output / max(p.norm() for p in module.parameters()))
    return model


class UnderAutocast(Net):
    @torch.autocast("cpu", dtype=torch.bfloat16)
    def forward(self, inputs):
        return super().forward(inputs)


def under_autocast():
    return UnderAutocast(lambda n, x: n.two(n.one(x)), one=nn.Conv2d(4, 4, 1), two=nn.Conv2d(4, 2, 1))


KINDS = [(nn.Conv1d, (6,)), (nn.Conv2d, (6, 5)), (nn.Conv3d, (6, 5, 4))]
MODES, PADDINGS = ("zeros", "reflect", "replicate", "circular"), (0, 1, "same", "valid")
# Every mode with every padding, the kinds in turn: each kind with each mode and with each padding.
CONVOLUTIONS = {
    f"{kind.__name__} {mode} {padding}": (
        nn.Sequential(kind(2, 3, 3, padding=padding, padding_mode=mode)),
        torch.ones(1, 2, *size),
    )
    for row, mode in enumerate(MODES)
    for column, padding in enumerate(PADDINGS)
    for kind, size in [KINDS[(row + column) % 3]]
}
ORDINARY = CONVOLUTIONS | {
    "linear": (nn.Sequential(nn.Flatten(), nn.Linear(120, 3)), IMAGE),
    "groups": (nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)), IMAGE),
    "one channel in each group": (nn.Sequential(nn.Conv2d(4, 8, 3, groups=4)), IMAGE),
    "depthwise": (nn.Sequential(nn.Conv2d(4, 4, (5, 5), groups=4)), IMAGE),
    "transposed": (nn.Sequential(nn.ConvTranspose2d(4, 8, 3, stride=2, output_padding=1)), IMAGE),
    "hooks": (watched(), IMAGE),
    "autocast": (under_autocast(), IMAGE),
}


@pytest.mark.parametrize(("model", "example"), ORDINARY.values(), ids=ORDINARY)
def test_ordinary_layers_are_not_skipped(model, example):
    assert not inventory(model, example).skipped


READS = {
    "sizes": lambda n, x: n.two(F.pad(n.one(x), [n.one.dilation[0] * (k // 2) for k in n.one.kernel_size * 2])),
    "channels": lambda n, x: n.two(n.one(x)) * n.one.in_channels / n.two.out_channels,
    "features": lambda n, x: n.head(n.two(n.one(x)).mean((2, 3))[:, : n.head.in_features]),
    "their own": lambda n, x: n.two(n.one(x)) * n.one.gain,
}


@pytest.mark.parametrize("run", READS.values(), ids=READS)
def test_attributes_without_tensors_may_be_read_and_the_replacement_has_them(run):
    model = Net(run, one=nn.Conv2d(4, 4, 3, dilation=2, padding=2), two=nn.Conv2d(4, 2, 1), head=nn.Linear(2, 3))
    model.one.gain = 0.5
    found = inventory(model, IMAGE)
    assert set(found.skipped) <= {"head"}
    plan = {"one": Tucker2(4, 4), "two": SVD(2)} | ({} if "head" in found.skipped else {"head": SVD(2)})
    wanted = model(IMAGE)
    torch.testing.assert_close(factorize_(model, plan)(IMAGE), wanted)
    assert (model.one.in_channels, model.one.kernel_size, model.one.gain) == (4, (3, 3), 0.5)


def test_a_net_that_draws_in_every_pass_is_not_skipped():
    model = Net(lambda n, x: n.two(n.one(x) + torch.rand(1)), one=nn.Conv2d(4, 4, 1), two=nn.Conv2d(4, 2, 1))
    assert not inventory(model, IMAGE).skipped


def test_work_that_torchs_table_leaves_out_counts():
    attention = Net(lambda n, x: n.out(F.scaled_dot_product_attention(x, x, x)), out=nn.Linear(32, 1))
    assert count_macs(attention, torch.ones(1, 1, 50, 32)) == 2 * 50 * 50 * 32 + 50 * 32
    recurrent = Net(lambda n, x: n.out(n.lstm(x)[0]), lstm=nn.LSTM(16, 32, batch_first=True), out=nn.Linear(32, 1))
    assert count_macs(recurrent, torch.ones(1, 20, 16)) == 20 * (4 * 32 * (16 + 32) + 32)


def test_hooks_of_every_module_may_look_at_weights():
    def look(module, args):
        if isinstance(module, nn.Conv2d):
            seen.append(module.weight.norm())

    seen = []
    handle = module_hooks.register_module_forward_pre_hook(look)
    try:
        assert not inventory(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)), IMAGE).skipped
    finally:
        handle.remove()
    assert seen
