"""A layer is decomposed by what it hands to torch, and what it computes in each pass becomes permanent."""

import itertools
import math
import re
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from ranksearch.compress.inventory import inventory
from ranksearch.compress.merging import merge_
from ranksearch.compress.plain import plain_of
from ranksearch.compress.profile import profile
from ranksearch.compress.saved import check_reloading, load_model, save_model
from ranksearch.compress.surgery import copied, factorize_
from ranksearch.compress.whitening import POSITIONS_PER_INPUT, whitenings
from ranksearch.errors import PlanError
from ranksearch.plan import CP, Plan, Tucker2
from ranksearch.support.copies import deep_copy
from tests.geometries import BY_NAME, assert_close, counted_macs, fitting, some_ranks
from tests.layers import Cast, Same, Standardised, StandardisedSame, normalised, pruned
from tests.nets import normal


class Padded(nn.Conv2d):
    """A convolution that puts zeros around its input, more after it than before."""

    def forward(self, inputs):
        return self._conv_forward(nn.ZeroPad2d((0, 2, 1, 0))(inputs), self.weight, self.bias)


class Halved(nn.Conv2d):
    """A convolution that only sees half of its bias, and reflects its input."""

    def forward(self, inputs):
        return self._conv_forward(inputs, self.weight, self.bias / 2)


class Twice(nn.ConvTranspose2d):
    """A transposed convolution that makes its input twice as large."""

    def forward(self, inputs):
        return super().forward(inputs, [2 * size for size in inputs.shape[2:]])


class Low(nn.Module):
    """A parametrisation that computes a square weight from fewer parameters."""

    def forward(self, column):
        return column @ column.T


def low():
    layer = parametrizations.parametrize.register_parametrization(nn.Linear(6, 6), "weight", Low(), unsafe=True)
    layer.parametrizations.weight.original = nn.Parameter(torch.randn(6, 2))
    return layer


WEIGHT, SAME = "the weight computed in each pass", "the padding of inputs of this size, {}"
# id: (layer, size of one input, what becomes permanent)
COMPUTED = {
    "standardised": (lambda: Standardised(4, 6, 3, stride=2, padding=1), (4, 9, 8), WEIGHT),
    "standardised, no bias": (lambda: Standardised(4, 6, 3, padding="same", bias=False), (4, 9, 8), WEIGHT),
    "same": (lambda: Same(4, 6, 3), (4, 9, 8), ""),
    "same strided": (lambda: Same(4, 6, 3, stride=2), (4, 9, 8), SAME.format("((1, 1), (0, 1))")),
    "same strided, even": (lambda: Same(4, 6, 3, stride=2, dilation=2), (4, 8, 8), SAME.format("((1, 2), (1, 2))")),
    "same strided, odd": (lambda: Same(4, 6, 3, stride=2), (4, 9, 9), SAME.format("((1, 1), (1, 1))")),
    "same, wide strides": (lambda: Same(4, 6, 2, stride=4), (4, 9, 8), SAME.format("((0, 1), (0, 0))")),
    "same 1x1": (lambda: Same(4, 6, 1, stride=2), (4, 9, 8), ""),
    "standardised same": (
        lambda: StandardisedSame(4, 6, (3, 5), stride=(2, 1)), (4, 9, 8), f"{WEIGHT} and {SAME.format('((1, 1), (2, 2))')}",
    ),
    "standardised, groups": (lambda: Standardised(4, 6, 3, stride=2, padding=1, groups=2), (4, 9, 8), WEIGHT),
    "same strided, groups": (lambda: Same(4, 6, 3, stride=2, groups=2), (4, 9, 8), SAME.format("((1, 1), (0, 1))")),
    "same strided, depthwise": (lambda: Same(4, 4, 5, stride=2, groups=4), (4, 9, 8), SAME.format("((2, 2), (1, 2))")),
    "standardised same, groups": (
        lambda: StandardisedSame(4, 6, 3, stride=2, groups=2), (4, 9, 8), f"{WEIGHT} and {SAME.format('((1, 1), (0, 1))')}",
    ),
    "twice as large": (lambda: Twice(4, 6, 3, stride=2, padding=1), (4, 3, 4), ""),
    "zeros before": (lambda: Padded(4, 6, 3), (4, 9, 8), ""),
    "half a bias": (lambda: Halved(4, 6, 3, padding=1, padding_mode="reflect"), (4, 9, 8), ""),
    "cast": (lambda: Cast(9, 6), (9,), ""),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Conv2d(4, 6, 3)), (4, 9, 8), WEIGHT),
    "weight norm, reflected": (
        lambda: parametrizations.weight_norm(nn.Conv2d(4, 6, (2, 3), padding="same", padding_mode="reflect")), (4, 9, 8), WEIGHT,
    ),
    "weight norm 1d": (lambda: parametrizations.weight_norm(nn.Conv1d(4, 6, 3, stride=2)), (4, 11), WEIGHT),
    "weight norm of a matrix": (lambda: parametrizations.weight_norm(nn.Linear(9, 6)), (7, 9), WEIGHT),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Conv2d(4, 6, 3)), (4, 9, 8), WEIGHT),
    "fewer parameters": (low, (6,), WEIGHT),
    "old weight norm": (lambda: normalised(nn.Conv2d(4, 6, 3)), (4, 9, 8), WEIGHT),
    "old spectral norm": (lambda: nn.utils.spectral_norm(nn.Conv3d(2, 4, 3)), (2, 5, 6, 4), WEIGHT),
    "pruned": (lambda: pruned(nn.Conv2d(4, 6, 3)), (4, 9, 8), WEIGHT),
    "weight norm, transposed": (
        lambda: parametrizations.weight_norm(nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1)), (4, 3, 4), WEIGHT,
    ),
    "old weight norm, transposed, groups": (
        lambda: normalised(nn.ConvTranspose1d(4, 6, 5, stride=2, dilation=2, groups=2)), (4, 11), WEIGHT,
    ),
}  # fmt: skip
computed = pytest.mark.parametrize("name", COMPUTED)


def made(name):
    """A model of such a layer in float64, in eval mode, one input, and the layer."""
    make, size, _ = COMPUTED[name]
    torch.manual_seed(0)
    model, inputs = nn.Sequential(OrderedDict(layer=make())).double().eval(), normal(1, *size, seed=9)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=number))
    return model, inputs, inventory(model, inputs)["layer"]


def each(model, layer):
    """Each method with each of some ranks, and the compressed model."""
    for method in fitting(layer):
        for ranks in some_ranks(method, layer):
            yield method, ranks, factorize_(copied(model), {"layer": method.value(layer, ranks)})


@computed
def test_it_is_found_and_the_user_is_told_what_becomes_permanent(name):
    model, inputs, layer = made(name)
    found = inventory(model, inputs)
    assert not found.skipped
    assert found.permanent == ({"layer": COMPUTED[name][2]} if COMPUTED[name][2] else {})
    assert (layer.params, layer.macs) == (found.params, found.macs)


@computed
def test_the_full_rank_computes_the_layer(name):
    model, inputs, layer = made(name)
    several = torch.cat([inputs, normal(*inputs.shape, seed=5)])
    assert fitting(layer)
    for method in fitting(layer):
        full = factorize_(copied(model), {"layer": method.value(layer, method.bounds(layer.weight))})
        assert_close(full(several), model(several))


@computed
def test_costs_are_the_counted_ones(name):
    model, inputs, layer = made(name)
    for method, ranks, built in each(model, layer):
        assert method.params(layer, ranks) == sum(parameter.numel() for parameter in built.parameters())
        assert method.macs(layer, ranks) == counted_macs(built, inputs)


@computed
def test_a_compressed_model_is_the_same_after_saving_and_loading(name, tmp_path):
    model, inputs, layer = made(name)
    fresh = nn.Sequential(OrderedDict(layer=COMPUTED[name][0]())).double()
    for method, ranks, built in itertools.islice(each(model, layer), 4):
        plan = Plan.of({"layer": method.value(layer, ranks)})
        save_model(built, plan, tmp_path)
        assert torch.equal(load_model(fresh, tmp_path)(inputs), built(inputs))
        check_reloading(model, copied(fresh), plan, torch.cat([inputs, inputs]))


@computed
def test_factors_come_from_the_weight_of_eval_mode_on_the_inputs_that_torch_sees(name):
    model, inputs, layer = made(name)
    method = fitting(layer)[0]
    several = torch.cat([inputs, normal(*inputs.shape, seed=5)])
    found = profile(model, inventory(model, inputs), {"layer": [method]}, inputs=several)
    full = method.value(layer, method.bounds(layer.weight))
    factors = found.factors(Plan.of({"layer": full}))
    assert_close(factorize_(copied(model), {"layer": full}, factors=factors)(inputs), model(inputs))
    if layer.bias and math.prod(layer.calls[0].out_size) <= POSITIONS_PER_INPUT:
        # The kernel on the mean patch gives the mean output.
        means = [group.mean.flatten() for group in whitenings(model, {layer: [(1,)]}, several)["layer"]]
        outputs = model(several) - model(torch.zeros_like(several))
        outputs = outputs.movedim(-1 if len(layer.weight) == 2 else 1, 0).flatten(1).mean(1)
        kernels = found.layers["layer"].kernel.flatten(1).chunk(layer.groups)
        assert_close(torch.cat([kernel @ mean for kernel, mean in zip(kernels, means, strict=True)]), outputs)


@settings(max_examples=30, deadline=None)
@given(
    *(st.tuples(st.integers(low, high), st.integers(low, high)) for low, high in ((1, 5), (1, 4), (1, 2), (5, 9))),
    st.booleans(),
    st.integers(1, 2),
)
def test_padding_by_size_is_right_for_any_kernel_stride_and_size(kernel, stride, dilation, size, standardised, groups):
    layer = (StandardisedSame if standardised else Same)(4, 6, kernel, stride, dilation=dilation, groups=groups)
    model, inputs = nn.Sequential(OrderedDict(layer=layer)).double().eval(), normal(2, 4, *size)
    found = inventory(model, inputs[:1])["layer"]
    for method in fitting(found):
        ranks = method.bounds(found.weight)
        built = factorize_(copied(model), {"layer": method.value(found, ranks)})
        assert_close(built(inputs), model(inputs))
        assert method.macs(found, ranks) == counted_macs(built, inputs[:1])


def test_the_model_is_left_as_it_was():
    model, inputs, _ = made("spectral norm")
    state = {name: value.clone() for name, value in model.train().state_dict().items()}
    inventory(model, inputs)
    assert model.layer.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_only_the_layers_of_the_plan_become_permanent():
    model = nn.Sequential(OrderedDict(one=Standardised(4, 4, 3), two=Standardised(4, 4, 3)))
    factorize_(model, {"one": Tucker2(4, 4)})
    assert (type(model.one), type(model.two)) == (nn.Sequential, Standardised)
    assert model.one.made_permanent


@pytest.mark.parametrize("frozen", ["gain", "weight", "both"])
def test_factors_can_be_trained_if_anything_behind_the_weight_can(frozen):
    model, _, _ = made("standardised")
    for name in ("gain", "weight") if frozen == "both" else (frozen,):
        model.layer.get_parameter(name).requires_grad_(False)
    built = factorize_(model, {"layer": Tucker2(2, 2)}).layer
    assert {parameter.requires_grad for name, parameter in built.named_parameters() if "bias" not in name} == {frozen != "both"}


def test_a_model_can_be_copied_after_a_pass_that_leaves_a_weight_of_autograd():
    for make in (normalised, nn.utils.spectral_norm, pruned):
        model = nn.Sequential(make(nn.Conv2d(4, 3, 3)))
        model(torch.ones(1, 4, 6, 5))
        assert not model[0].weight.is_leaf
        twin = deep_copy(model.eval())
        assert torch.equal(twin(torch.ones(1, 4, 6, 5)), model(torch.ones(1, 4, 6, 5)))
        assert not {id(value) for value in twin.parameters()} & {id(value) for value in model.parameters()}
        twin(torch.ones(1, 4, 6, 5)).sum().backward()


REFUSED = {
    "no padding": (
        Same(4, 6, 3, stride=2), CP(2),
        "A plan must name the padding of a layer that pads by the size of its input, but has none for 'layer'; write "
        "padding=((before, after), ...), one pair for each axis.",
    ),
    "too few axes": (
        Same(4, 6, 3, stride=2), CP(2, padding=((0, 1),)),
        "Layer 'layer' needs padding of 2 axes, but the plan has padding=((0, 1),); it was made for another model.",
    ),
    "padding of a plain layer": (
        nn.Conv2d(4, 6, 3), CP(2, padding=((0, 1), (0, 1))),
        "Layer 'layer' does not pad by the size of its input and needs no padding, but the plan has padding=((0, 1), (0, 1)); it "
        "was made for another model.",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("layer", "value", "message"), REFUSED.values(), ids=REFUSED)
def test_a_plan_whose_padding_does_not_fit_is_refused(layer, value, message):
    with pytest.raises(PlanError, match=f"^{re.escape(message)}$"):
        factorize_(nn.Sequential(OrderedDict(layer=layer)), {"layer": value})


@pytest.mark.parametrize("name", ["same", "zeros before"])
def test_a_plan_leaves_out_a_padding_that_does_not_depend_on_the_size(name):
    model, inputs, layer = made(name)
    full = BY_NAME["tucker2"].bounds(layer.weight)
    assert layer.padding is None
    assert_close(factorize_(copied(model), {"layer": Tucker2(*full)})(inputs), model(inputs))


def test_a_layer_that_became_permanent_is_not_merged():
    model, _, layer = made("standardised")
    plan = Plan.of({"layer": BY_NAME["cp"].value(layer, (2,))})
    message = (
        "Only layers that were plain can be merged, but 'layer' computed its weight or its padding in each pass, as the layer "
        "of the dense model still does; leave it factorized."
    )
    with pytest.raises(PlanError, match=f"^{re.escape(message)}$"):
        merge_(factorize_(model, plan), plan, ["layer"])


def test_the_padding_of_a_plan_survives_json():
    plan = Plan.of({"layer": CP(2, padding=((0, 1), (2, 0)))})
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.to_dict()["layers"]["layer"]["padding"] == [[0, 1], [2, 0]]


@pytest.mark.parametrize("padding", [3, (), ((0, 1), 2), ((0, -1),), ((0, 1, 2),), "01"])
def test_a_padding_is_pairs_of_whole_numbers(padding):
    message = f"A padding must be pairs of whole numbers of at least 0, one for each axis, but cp got padding={padding!r}."
    with pytest.raises(PlanError, match=f"^{re.escape(message)}$"):
        CP(2, padding=padding)


def test_zeros_are_put_where_the_part_needs_them():
    model, inputs, layer = made("same strided")
    built = factorize_(copied(model), {"layer": BY_NAME["cp4"].value(layer, (2,))}).layer
    assert [type(part) for part in built] == [nn.Conv2d, nn.ZeroPad2d, nn.Conv2d, nn.ZeroPad2d, nn.Conv2d, nn.Conv2d]
    assert built[3](built[2](built[1](built[0](inputs)))).shape == (1, 2, 5, 9)


class InPlace(nn.Conv2d):
    """A convolution that changes a tensor in place, before or after it is computed."""

    def __init__(self, change):
        super().__init__(3, 4, 3)
        self.change = change

    def forward(self, inputs):
        inputs = inputs + 0 if self.change == "own input" else inputs
        if "input" in self.change:
            nn.functional.relu_(inputs)
        outputs = super().forward(inputs)
        if self.change == "output":
            outputs.mul_(2)
        elif self.change == "part of the output":
            outputs[:, :1] = 0
        elif self.change == "input of the caller, afterwards":
            inputs.mul_(2)
        return outputs


class BySize(nn.Conv2d):
    """A convolution whose weight depends on the size of its input."""

    def forward(self, inputs):
        return self._conv_forward(inputs, self.weight / inputs.shape[-1], self.bias)


class EveryAxis(nn.Conv2d):
    """A convolution that pads along every axis, by no channels, as ports from TensorFlow do."""

    def forward(self, inputs):
        return self._conv_forward(nn.functional.pad(inputs, (1, 1, 1, 1, 0, 0)), self.weight, self.bias)


@pytest.mark.parametrize("change", ["own input", "input", "output", "part of the output", "input of the caller, afterwards"])
def test_a_layer_that_changes_a_tensor_in_place_is_not_plain(change):
    assert plain_of(InPlace(change)) is None


def test_a_weight_that_depends_on_the_size_of_the_input_is_not_plain():
    assert plain_of(BySize(3, 4, 3)) is None


def test_zeros_may_be_put_along_every_axis():
    model, inputs = nn.Sequential(EveryAxis(3, 4, 3)).double(), normal(2, 3, 8, 8)
    expected = model(inputs)
    assert "0" in {each.name for each in inventory(model, inputs[:1]).layers}
    assert_close(factorize_(model, {"0": Tucker2(3, 4)})(inputs), expected)


def test_a_weight_of_nan_equals_itself():
    layer = parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    assert plain_of(layer) is not None
