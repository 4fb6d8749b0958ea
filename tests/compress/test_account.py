"""The account of a model holds each of its parameters and multiply-accumulates once."""

import functools
from dataclasses import asdict, replace

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations

from ranksearch import console
from ranksearch.compress.inventory import count_macs, count_params, inventory
from ranksearch.results.account import Entry, Part, account_by_kind, account_by_layer
from ranksearch.results.attributes import read_facts, write_facts
from tests.nets import IMAGE, Net, Pyramid, Recurrent, Siamese, computed
from tests.report_study import study_facts

SENTENCE = torch.ones(1, 5, 8)


class Tokens(nn.Module):
    """A net with bare parameters, embeddings, attention and recurrence."""

    def __init__(self):
        super().__init__()
        self.token, self.places = nn.Parameter(torch.ones(1, 1, 8)), nn.Embedding(6, 8)
        self.attention, self.norm = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8)
        self.lstm, self.head = nn.LSTM(8, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, inputs):
        inputs = torch.cat([self.token.expand(len(inputs), -1, -1), inputs], 1) + self.places(torch.arange(6))
        return self.head(self.lstm(self.norm(self.attention(inputs, inputs, inputs)[0]))[0][:, -1])


class Auxiliary(nn.Module):
    """A net with a head that only training uses, and one that nothing uses."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(4, 5, 3), nn.Linear(5, 2)
        self.training_head, self.spare, self.norm = nn.Linear(5, 2), nn.Sequential(nn.Linear(5, 2)), nn.BatchNorm2d(7)
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, inputs):
        features = self.conv(inputs).mean((2, 3))
        return self.head(features) + (self.training_head(features) if self.training else 0)


def tied():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 1))
    model[1].weight = model[0].weight
    return model


def raising(n, x):
    try:
        n.fails(x)
    except ValueError:
        return n.last(x)


class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, inputs):
        self.conv(inputs)
        raise ValueError("on purpose")


MODELS = {
    "tokens": (Tokens(), SENTENCE),
    "encoder": (nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 3)), SENTENCE),
    "auxiliary": (Auxiliary(), IMAGE),
    "tied": (tied(), IMAGE),
    "depthwise": (torchvision.models.mobilenet_v2(weights=None, num_classes=3), torch.ones(1, 3, 32, 32)),
    "siamese": (Siamese(), torch.ones(1, 2, 3, 6, 5)),
    "pyramid": (Pyramid(), torch.ones(1, 3, 12, 8)),
    "recurrent": (Recurrent(), torch.ones(1, 2, 3, 6, 5)),
    "computed": (computed(), torch.ones(1, 1, 8, 8)),
    "a module that raises": (Net(raising, fails=Fails(), last=nn.Conv2d(4, 2, 1)), IMAGE),
}
models = pytest.mark.parametrize("name", MODELS)


@functools.cache
def inventory_of(name):
    return inventory(*MODELS[name])


@models
def test_it_adds_up_to_the_model(name):
    (model, example), found = MODELS[name], inventory_of(name)
    assert sum(entry.params for entry in found.account) == found.params == count_params(model)
    assert sum(entry.macs for entry in found.account) == found.macs == count_macs(model, example)
    assert found == inventory(model, torch.cat([example] * 2))


@models
def test_it_names_every_layer_and_each_module_once(name):
    found = inventory_of(name)
    names = [entry.name for entry in found.account]
    assert len(set(names)) == len(names)
    assert {entry.name for entry in found.account if entry.layer} == {layer.name for layer in found.layers}
    assert {entry.name: entry.skipped for entry in found.account if entry.skipped} == found.skipped
    for entry in found.account:
        if entry.layer:
            assert (entry.params, entry.macs) == (found[entry.name].params, found[entry.name].macs)


@models
def test_its_parts_add_up_too_and_survive_a_record(name, study):
    account = inventory_of(name).account
    for parts in (account_by_kind(account), account_by_layer(account)):
        for cost in ("params", "macs", "unused"):
            assert sum(getattr(part, cost) for part in parts) == sum(getattr(entry, cost) for entry in account)
    facts = replace(study_facts(), account=account_by_kind(account))
    write_facts(study, facts)
    assert read_facts(study).account == facts.account
    assert [Part.from_dict(asdict(part)) for part in facts.account] == list(facts.account)


@pytest.fixture
def study():
    import optuna

    return optuna.create_study(directions=["maximize", "maximize"])


def test_a_record_without_an_account_is_read(study):
    write_facts(study, study_facts())
    stored = {key: value for key, value in study.user_attrs["ranksearch:facts"].items() if key not in ("account", "permanent")}
    study.set_user_attr("ranksearch:facts", stored)
    assert (read_facts(study).account, read_facts(study).permanent) == ((), {})


def test_weights_of_attention_recurrence_and_embeddings_are_told():
    model = Tokens()
    found = {entry.name: entry for entry in inventory(model, SENTENCE).account}
    assert found[""] == Entry("", "Tokens", 8, 0)
    assert found["places"] == Entry("places", "Embedding", 48, 0)
    # The products of three projections and of the output projection, and those of queries, keys and values.
    assert found["attention"] == Entry("attention", "MultiheadAttention", 3 * 64 + 24, 4 * 6 * 64 + 2 * 36 * 8)
    assert found["attention.out_proj"].params == 72
    assert "without calling it" in found["attention.out_proj"].skipped
    assert found["norm"] == Entry("norm", "LayerNorm", 16, 0)
    assert (found["lstm"].kind, found["lstm"].macs) == ("LSTM", 6 * 4 * 4 * (8 + 4))


def test_parameters_that_no_pass_uses_are_told():
    found = inventory(Auxiliary(), IMAGE)
    unused = {entry.name: entry.unused for entry in found.account if entry.unused}
    assert unused == {"": 3, "spare.0": 12, "norm": 14}
    look = console.Look(
        layers=(), account=account_by_layer(found.account), permanent={}, params=found.params, macs=found.macs, costs={},
        trained=True,
    )  # fmt: skip
    lines = console.layers_summary(look).splitlines()
    assert "no pass uses 29 parameters, 12.2% of all: spare.0, the model itself, norm" in lines
    assert "skipped spare.0: it is never called by the forward pass (5.0% of the parameters, 0.0% of the MACs)" in lines
    assert "BatchNorm2d, not used: 5.9% of the parameters, 0.0% of the MACs (norm)" in lines


def test_the_report_says_which_parameters_no_pass_uses():
    from tests.report_study import study_record

    record = study_record()
    spare = Part(title="Linear, not used", modules=("spare", "more", "others", "last"), params=10, macs=0, unused=10)
    share = 10 / record.facts.dense.params
    noted = replace(record, facts=replace(record.facts, account=(*record.facts.account, spare))).notes
    assert f"No pass uses {share:.1%} of the parameters (spare, more, others and 1 more); remove them from the model." in noted


def test_the_work_of_a_computed_weight_counts_nowhere():
    model = nn.Sequential(parametrizations.orthogonal(nn.Linear(8, 8), orthogonal_map="cayley"))
    found = inventory(model, torch.ones(1, 8))
    assert found.macs == found["0"].macs == sum(entry.macs for entry in found.account) == 64
