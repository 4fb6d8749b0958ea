"""The whitening of a layer: what its moments are of, and what becomes of odd inputs."""

import copy
import re

import pytest
import torch
from torch import nn

from ranksearch.compress import whitening as whitening
from ranksearch.compress.inventory import inventory
from ranksearch.compress.profile import profile
from ranksearch.compress.whitening import Whitening, whitenings
from ranksearch.errors import ModelError
from tests import nets
from tests.compress.whitened import correlated, measured, rebuilt
from tests.geometries import BY_NAME, assert_close, given_geometry
from tests.nets import Net, normal

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")


@pytest.mark.parametrize("name", BY_NAME)
def test_without_inputs_nothing_is_whitened(name):
    model, inputs, layer = given_geometry("linear behind a map")
    method = BY_NAME[name]
    plain = profile(model, inventory(model, inputs), {"layer": [method]}).layers["layer"]
    (group,) = plain.groups
    assert group.whitening == Whitening()
    holds, kernel = method.holds(layer.weight), model.layer.weight.detach().reshape(layer.weight)
    assert group.whitened[name] is group.kernel
    identity = Whitening(
        {run: torch.eye(int(torch.Size([layer.weight[m] for m in run]).numel())).double() for run in holds if run}
    )
    for candidate in plain.candidates():
        factors = method.factors(kernel, group.prepared[name], candidate.value.ranks, 0)
        assert all(torch.equal(a, b) for a, b in zip(plain.factors(candidate.value), factors, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(identity.fold(factors, holds, layer.weight), factors, strict=True))
        assert plain.bias_correction(candidate.value, factors) is None


@pytest.mark.parametrize("inputs", ["one dead channel", "all dead", "constant", "copied channels"])
@pytest.mark.parametrize("name", BY_NAME)
def test_dead_constant_and_copied_inputs(name, inputs):
    model, one, layer = given_geometry("linear behind a map")
    batch = correlated(one)
    if inputs == "one dead channel":
        batch[:, 1] = 0
    elif inputs == "copied channels":
        batch[:, 1] = batch[:, 0]
    else:
        batch = torch.full_like(batch, 0.0 if inputs == "all dead" else 0.1)
    method = BY_NAME[name]
    ((found, kernel),) = measured(model, layer, method, batch)
    assert all(torch.isfinite(root).all() for root in found.roots.values())
    assert max(float(torch.linalg.cond(root)) for root in found.roots.values()) < 1e3
    assert_close(rebuilt(found, layer, kernel, method, method.bounds(layer.weight)), kernel)
    if inputs in ("all dead", "constant"):
        assert all(torch.equal(root, torch.eye(len(root)).double()) for root in found.roots.values())


def test_moments_are_taken_around_the_mean_where_the_mean_can_be_corrected():
    inputs, runs = correlated(normal(1, 4, 9, 8)), [(1,), (2, 3)]

    def found(*layers):
        model = nn.Sequential(nn.Conv2d(4, 6, 3, bias="bias" in layers), *[nn.BatchNorm2d(6)] * ("norm" in layers)).double()
        return whitenings(model, {inventory(model, inputs[:1])["0"]: runs}, inputs)["0"][0]

    with_bias, with_norm, with_both, with_none = found("bias"), found("norm"), found("bias", "norm"), found()
    assert (with_norm.mean, with_none.mean) == (None, None)
    assert torch.equal(with_bias.mean, with_both.mean)
    for run in runs:
        assert torch.equal(with_bias.roots[run], with_norm.roots[run])
        assert not torch.allclose(with_bias.roots[run], with_none.roots[run])


def test_a_normalisation_corrects_the_mean_only_for_itself():
    """In a pre-activation ResNet the shortcut takes the convolution's output past the normalisation: the mean reaches the output."""
    inputs, runs, conv, norm = correlated(normal(1, 4, 9, 8)), [(1,)], nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)

    def root(run):
        model = Net(run, conv=conv, norm=norm).double()
        return whitenings(model, {inventory(model, inputs[:1])["conv"]: runs}, inputs)["conv"][0].roots[1,]

    def beside(n, x):
        y = n.conv(x)
        return n.norm(y) + y

    alone, none = root(lambda n, x: n.norm(n.conv(x))), root(lambda n, x: n.conv(x))
    assert not torch.allclose(alone, none)
    assert torch.equal(root(beside), none)
    assert torch.equal(root(lambda n, x: n.norm(n.conv(x)).relu()), alone)


def test_modes_too_large_for_one_root_are_split(monkeypatch):
    model, inputs, layer = given_geometry("linear behind a map")
    method, batch = BY_NAME["svd"], correlated(inputs)
    assert layer.weight[1:] == (4, 3, 5)
    for largest, runs in ((60, {(1, 2, 3)}), (59, {(1,), (2, 3)}), (14, {(1,), (2,), (3,)}), (4, {(1,), (2,)}), (2, set())):
        monkeypatch.setattr(whitening, "MAX_MOMENT_ROWS", largest)
        ((found, kernel),) = measured(model, layer, method, batch)
        assert set(found.roots) == runs
        assert_close(rebuilt(found, layer, kernel, method, method.bounds(layer.weight)), kernel)


def test_a_layer_that_gets_nan_is_named():
    model, inputs, layer = given_geometry("conv2d")
    model.layer.register_forward_pre_hook(lambda module, args: (args[0] / 0,))
    message = (
        "The inputs of every layer must be finite on the training data, but those of 'layer' hold NaN or infinity; mend the "
        "model, or set space.data_aware = false."
    )
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        whitenings(model, {layer: [(1,)]}, inputs)
    assert len(model.layer._forward_pre_hooks) == 1


def test_the_model_and_the_random_state_are_left_alone():
    model = nets.small().train()
    model.norm1.eval()
    inputs = nets.few_digits().train.tensors[0][:50]
    found = inventory(model, inputs[:1])
    modes = {name: module.training for name, module in model.named_modules()}
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    whitenings(model, {layer: [(1,)] for layer in found.layers}, inputs)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_layer_called_by_keyword():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 6)

        def forward(self, inputs):
            return self.layer(input=inputs)

    model = Named()
    inputs = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    found = whitenings(model, {inventory(model, inputs[:1])["layer"]: [(1,)]}, inputs)["layer"][0]
    torch.testing.assert_close(found.mean, inputs.double().mean(0))


class OnMps(torch.Tensor):
    """A stand-in for a tensor on Apple's GPU: it refuses float64."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cpu:
            with torch._C.DisableTorchFunctionSubclass():
                return args[0].as_subclass(torch.Tensor)
        if func == torch.Tensor.device.__get__:
            return torch.device("mps")
        result = super().__torch_function__(func, types, args, kwargs)
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            raise TypeError("the MPS framework doesn't support float64")
        return result


def test_moments_of_inputs_on_a_gpu_without_float64():
    model = nets.small()
    inputs = nets.few_digits().train.tensors[0][:50]
    found = inventory(model, inputs[:1])
    holds = {layer: [(1,), (2, 3)][: len(layer.weight) - 2 or 1] for layer in found.layers}
    far = inputs.as_subclass(OnMps)
    with pytest.raises(TypeError, match="float64"):
        far.double()
    expected, got = whitenings(model, holds, inputs), whitenings(model, holds, far)
    for name, (one,) in expected.items():
        assert all(torch.equal(root, got[name][0].roots[modes]) for modes, root in one.roots.items())
