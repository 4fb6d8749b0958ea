"""`factorize_` changes the layers that the plan names and nothing else; if it fails, it changes nothing."""

import copy
import itertools
import re
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from ranksearch.compress.surgery import factorize_, kernel_of, skeleton_
from ranksearch.errors import PlanError
from ranksearch.methods import METHODS
from ranksearch.plan import CP, CP4, SVD, Dense, Plan, Spatial, Tucker2
from tests.compress.test_inventory_skipped import SMALL_DEPTHWISE
from tests.layers import Noisy

PLAN = Plan.of(
    {"stem": CP4(3), "block.0.conv": Tucker2(2, 3), "block.1": Spatial(4), "fc": CP(5, kernel=(4, 4)), "last": SVD(2)}
)
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
INPUTS = torch.linspace(-1, 1, 2 * 2 * 4 * 4).reshape(2, 2, 4, 4)


class Standardised(nn.Conv2d):
    """A convolution with its own forward."""

    def forward(self, inputs):
        return super().forward(inputs) / self.weight.std()


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(2, 4, 3, padding=1),
            block=nn.Sequential(
                nn.Sequential(OrderedDict(conv=nn.Conv2d(4, 5, 3, padding=1), norm=nn.BatchNorm2d(5))),
                nn.Conv2d(5, 4, 3, padding=1),
                nn.Conv2d(4, 4, 3, padding=1, groups=2),
            ),
            flatten=nn.Flatten(),
            fc=nn.Linear(64, 6),
            relu=nn.ReLU(),
            last=nn.Linear(6, 3),
        )
    )


def factors(plan, seed=0):
    """Random factors of the right shapes, which approximate no dense model."""
    model, generator = net(), torch.Generator().manual_seed(seed)
    found = {}
    for name, value in plan:
        kernel = kernel_of(name, model.get_submodule(name), value)
        shapes = METHODS[type(value)].factor_shapes(tuple(kernel.shape), value.ranks)
        found[name] = [torch.randn(shape, generator=generator) for shape in shapes]
    return found


def subplans():
    return [Plan.of(dict(some)) for count in range(len(PLAN.layers) + 1) for some in itertools.combinations(PLAN, count)]


def assert_same_state(model, state):
    found = model.state_dict()
    assert list(found) == list(state)
    assert all(torch.equal(found[name], value) for name, value in state.items())


# --- changed and unchanged modules ---


@pytest.mark.parametrize("plan", subplans(), ids=str)
def test_only_the_layers_named_change(plan):
    dense = net()
    before = dict(dense.named_modules())
    state = copy.deepcopy(dense.state_dict())
    model = factorize_(dense, plan)
    assert model is dense
    named = {name for name, _ in plan}
    for name, module in before.items():
        assert (model.get_submodule(name) is module) == (name not in named)
    kept = {name: value for name, value in model.state_dict().items() if not name.startswith(tuple(f"{n}." for n in named))}
    assert kept.keys() == {name for name in state if name.rpartition(".")[0] not in named}
    assert all(torch.equal(value, state[name]) for name, value in kept.items())
    assert [name for name, _ in model.named_children()] == [name for name, _ in net().named_children()]
    assert model.eval()(INPUTS).shape == (2, 3)


def test_layers_change_independently():
    """A layer gets the same new modules whether the plan names it alone or with others."""
    together = factorize_(net(), PLAN).state_dict()
    for name, value in PLAN:
        alone = factorize_(net(), {name: value}).get_submodule(name).state_dict()
        assert len(alone) > 2
        assert all(torch.equal(together[f"{name}.{key}"], tensor) for key, tensor in alone.items())


def test_a_mapping_is_a_plan_and_dense_layers_stay():
    model = net()
    kept = model.stem
    wanted = factorize_(net(), Plan.of({"last": SVD(2)})).state_dict()
    assert_same_state(factorize_(model, {"last": SVD(2), "stem": Dense()}), wanted)
    assert model.stem is kept


BAD = {"fc": CP(9999, kernel=(4, 4)), "last": CP(2), "block.2": Tucker2(3, 1), "nowhere": SVD(1), "block.0.norm": SVD(1)}


@pytest.mark.parametrize(("name", "value"), BAD.items(), ids=BAD)
def test_all_or_nothing(name, value):
    model = net()
    modules, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    good = {layer: value for layer, value in PLAN if layer != name}
    with pytest.raises(PlanError, match=name):
        factorize_(model, {**good, name: value})
    assert dict(model.named_modules()) == modules
    assert_same_state(model, state)
    factorize_(model, good)
    assert dict(model.named_modules()) != modules


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_device_dtype_grad_and_mode_survive(device, dtype, grad, training):
    model = net().to(device, dtype).train(training)
    model.block[0].conv.requires_grad_(grad).train(not training)
    model.last.weight.requires_grad_(grad)
    model.last.bias.requires_grad_(not grad)
    factorize_(model, PLAN)
    assert {(value.device.type, value.dtype) for value in model.parameters()} == {(device, dtype)}
    assert {module.training for module in model.block[0].conv.modules()} == {not training}
    assert {module.training for module in model.fc.modules()} == {training}
    assert all(value.requires_grad for value in model.fc.parameters())
    assert {value.requires_grad for value in model.block[0].conv.parameters()} == {grad}
    assert [value.requires_grad for _, value in model.last.named_parameters()] == [grad, grad, not grad]


def test_new_parameters_are_leaves_of_their_own():
    dense = net()
    given = factors(PLAN)
    model = factorize_(copy.deepcopy(dense), PLAN, factors=given)
    state = copy.deepcopy(dense.state_dict())
    kept = copy.deepcopy(given)
    model(INPUTS).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.is_leaf
            assert parameter.is_contiguous()
            parameter.zero_()
    assert_same_state(dense, state)
    assert all(torch.equal(a, b) for name in kept for a, b in zip(given[name], kept[name], strict=True))


def test_hooks_on_other_modules_survive():
    model, seen = net(), []
    for module in (model, model.block, model.block[0].norm, model.relu):
        module.register_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    factorize_(model, PLAN)(INPUTS)
    assert seen == ["BatchNorm2d", "Sequential", "ReLU", "Sequential"]


def test_a_deep_copy_is_unharmed():
    model = net()
    other, state = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    factorize_(model, PLAN)
    assert_same_state(other, state)


# --- factors and seeds ---


def test_given_factors_are_used_and_the_others_decomposed():
    given = {"fc": factors(PLAN)["fc"]}
    model, decomposed = factorize_(net(), PLAN, factors=given), factorize_(net(), PLAN)
    parts = [part for part in model.fc if hasattr(part, "weight")]
    assert len(parts) == 3
    assert all(torch.equal(p.weight, f.reshape(p.weight.shape)) for p, f in zip(parts, given["fc"], strict=True))
    assert torch.equal(parts[-1].bias, net().fc.bias)
    rest = {name: value for name, value in decomposed.state_dict().items() if not name.startswith("fc.")}
    assert all(torch.equal(model.state_dict()[name], value) for name, value in rest.items())


def test_one_seed_one_model():
    one, same, other = (factorize_(net(), PLAN, seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    changed = {name.split(".")[0] for name, value in one.items() if not torch.equal(value, other[name])}
    assert changed == {"stem", "fc"}


def test_a_skeleton_takes_the_weights_of_a_factorized_model():
    model = factorize_(net(), PLAN).eval()
    skeleton = skeleton_(net(seed=1), PLAN).eval()
    assert not any(parameter.any() for name, parameter in skeleton.named_parameters() if "fc" in name and "weight" in name)
    assert not torch.equal(skeleton(INPUTS), model(INPUTS))
    skeleton.load_state_dict(model.state_dict())
    assert torch.equal(skeleton(INPUTS), model(INPUTS))
    assert_same_state(skeleton, model.state_dict())


def test_kernels_are_seen_in_float32_or_better():
    fc = net().fc
    for dtype, wanted in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)):
        layer = copy.deepcopy(fc).to(dtype)
        kernel = kernel_of("fc", layer, CP(1, kernel=(2, 8)))
        assert kernel.dtype == wanted
        assert not kernel.requires_grad
        assert torch.equal(kernel, layer.weight.detach().to(wanted).reshape(6, 4, 2, 8))


# --- messages ---


def with_layers(**layers):
    return nn.Sequential(OrderedDict(layers))


def not_finite(value):
    model = with_layers(conv=nn.Conv2d(2, 2, 3))
    with torch.no_grad():
        model.conv.weight[0, 0, 0, 0] = value
    return model


def hooked():
    conv = nn.Conv2d(2, 2, 3)
    conv.register_forward_hook(lambda module, args, output: output.relu())
    return conv


NOT_SUITED = "A plan may only name layers that can be factorized, but names {!r}: "
NOT_FINITE = "Weights must be finite, but layer 'conv' holds NaN or infinity; load or train it again."
ANOTHER_MAP = "is not a fully connected layer after a map of size {}; the plan was made for another model or input size."
# name: (model, layer, value, message)
MESSAGES = {
    "near name": (
        net(), "block.0.cov", SVD(1),
        "A plan must name layers of the model, but 'block.0.cov' is none. Did you mean 'block.0.conv'?",
    ),
    "far name": (
        with_layers(a=nn.Linear(2, 2), relu=nn.ReLU()), "zzz", SVD(1),
        "A plan must name layers of the model, but 'zzz' is none. Valid: a.",
    ),
    "no name": (nn.Linear(3, 3), "", SVD(1), "A plan must name layers of the model, but '' is none."),
    "type": (net(), "relu", SVD(1), NOT_SUITED.format("relu") + "ReLU is not supported."),
    "rank of groups": (net(), "block.2", Tucker2(3, 1), "Layer 'block.2': rank_in of Tucker-2 must be at most 2, but got 3."),
    "method of groups": (
        net(), "block.2", SVD(1), "Layer 'block.2' of shape (2, 2, 3, 3) in each of 2 groups cannot be stored as SVD.",
    ),
    "depthwise": (
        with_layers(conv=nn.Conv2d(2, 2, 3, groups=2)), "conv", Spatial(1), NOT_SUITED.format("conv") + SMALL_DEPTHWISE + ".",
    ),
    "forward": (
        with_layers(conv=Standardised(2, 2, 3)), "conv", CP(1),
        NOT_SUITED.format("conv") + "Standardised has a forward of its own.",
    ),
    "complex": (
        with_layers(fc=nn.Linear(2, 2, dtype=torch.complex64)), "fc", SVD(1),
        NOT_SUITED.format("fc") + "its weight is complex64, which is not real.",
    ),
    "hooks": (
        with_layers(conv=hooked()), "conv", CP(1),
        NOT_SUITED.format("conv") + "it has forward hooks, which its replacement would not have; remove them first.",
    ),
    "lazy": (
        with_layers(conv=nn.LazyConv2d(2, 3)), "conv", CP(1),
        NOT_SUITED.format("conv") + "its weight has no shape yet; run the model once on its data first.",
    ),
    "nan": (not_finite(float("nan")), "conv", CP(1), NOT_FINITE),
    "infinity": (not_finite(float("inf")), "conv", CP(1), NOT_FINITE),
    "rank": (net(), "last", SVD(4), "Layer 'last': rank of SVD must be at most 3, but got 4."),
    "second rank": (net(), "block.1", Tucker2(5, 5), "Layer 'block.1': rank_out of Tucker-2 must be at most 4, but got 5."),
    "plain linear": (
        net(), "last", CP(2),
        "Layer 'last' of shape (3, 6) cannot be stored as CP; name the map its input is flattened from, as in "
        "CP(16, kernel=(6, 6)).",
    ),
    "svd of a kernel": (net(), "stem", SVD(2), "Layer 'stem' of shape (4, 2, 3, 3) cannot be stored as SVD."),
    "a column": (net(), "fc", CP4(2, kernel=(4, 1)), "Layer 'fc' of shape (6, 16, 4, 1) cannot be stored as CP-4."),
    "kernel": (net(), "fc", CP(2, kernel=(5, 5)), "Layer 'fc' of shape (6, 64) " + ANOTHER_MAP.format("(5, 5)")),
    "long kernel": (
        net(), "fc", CP(2, kernel=(2, 2, 2, 2)),
        "Layer 'fc' of shape (6, 64) " + ANOTHER_MAP.format("(2, 2, 2, 2)"),
    ),
    "kernel of a convolution": (
        net(), "stem", CP(2, kernel=(3, 3)),
        "Layer 'stem' of shape (4, 2, 3, 3) " + ANOTHER_MAP.format("(3, 3)"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("verb", [factorize_, skeleton_])
@pytest.mark.parametrize(("model", "name", "value", "message"), MESSAGES.values(), ids=MESSAGES)
def test_a_plan_that_does_not_fit_is_refused(verb, model, name, value, message):
    if verb is skeleton_ and message == NOT_FINITE:
        assert not skeleton_(model, Plan.of({name: value})).conv[0].weight.any(), (
            "weights that are to be loaded over do not matter"
        )
        return
    with pytest.raises(PlanError, match=f"^{re.escape(message)}$"):
        verb(model, Plan.of({name: value}))


PARAMETRISED = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "of the bias": lambda layer: parametrize.register_parametrization(layer, "bias", nn.ReLU()),
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
    "old spectral norm": nn.utils.spectral_norm,
}


@pytest.mark.parametrize("verb", [factorize_, skeleton_])
@pytest.mark.parametrize("change", PARAMETRISED.values(), ids=PARAMETRISED)
def test_a_layer_with_a_parametrised_weight_is_factorized_and_the_rest_stays(verb, change):
    model = net().eval()
    change(model.last)
    inputs, others = torch.ones(2, 6), [module for name, module in model.named_modules() if not name.startswith("last")]
    wanted = model.last(inputs)
    verb(model, Plan.of({"last": SVD(3)}))
    assert [type(part) for part in model.last] == [nn.Linear]
    assert [module for name, module in model.named_modules() if not name.startswith("last")] == others
    if verb is factorize_:
        torch.testing.assert_close(model.last(inputs), wanted)


@pytest.mark.parametrize("verb", [factorize_, skeleton_])
def test_a_weight_that_differs_each_time_is_refused(verb):
    model = net().train()
    parametrize.register_parametrization(model.last, "weight", Noisy())
    modules, state, buffers = dict(model.named_modules()), copy.deepcopy(model.state_dict()), len(list(model.buffers()))
    message = (
        NOT_SUITED.format("last")
        + "its weight is parametrised or pruned; make that permanent first, by remove_parametrizations or prune.remove."
    )
    with pytest.raises(PlanError, match=f"^{re.escape(message)}$"):
        verb(model, Plan.of({"last": SVD(2), "stem": CP(2)}))
    assert dict(model.named_modules()) == modules
    assert len(list(model.buffers())) == buffers
    assert_same_state(model, state)


def test_what_the_message_says_makes_a_parametrised_weight_one_that_is_factorized():
    model = net()
    parametrizations.weight_norm(model.last)
    prune.l1_unstructured(model.stem, "weight", amount=0.5)
    parametrize.remove_parametrizations(model.last, "weight")
    prune.remove(model.stem, "weight")
    factorize_(model, {"last": SVD(2), "stem": CP(2)})
    assert len(model.last) == 2


@pytest.mark.parametrize("wrong", [((2, 6), (3, 3)), ((2, 6),), ((2, 6), (3, 2), (1,)), ((6, 2), (2, 3))])
def test_factors_of_other_shapes_are_refused(wrong):
    message = f"Layer 'last': the factors of SVD 2 must have shapes ((2, 6), (3, 2)), but have {wrong}."
    with pytest.raises(PlanError, match=f"^{re.escape(message)}$"):
        factorize_(net(), {"last": SVD(2)}, factors={"last": [torch.zeros(shape) for shape in wrong]})


def test_a_layer_under_two_names_is_refused():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"one": shared, "two": nn.Sequential(shared)})
    with pytest.raises(PlanError, match=r"A layer must have one name, but 'one' is also two\.0\."):
        factorize_(model, {"one": SVD(2)})
    assert model["one"] is shared


def test_a_weight_that_another_module_shares_is_refused():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    with pytest.raises(PlanError, match=r"A layer must not share its weight, but that of '0' is also 2.weight; leave it out"):
        factorize_(model, {"0": SVD(2)})
    assert len(model) == 3
