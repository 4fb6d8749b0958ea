"""Profiles are deterministic: the same factors and errors in every order of calls, from the cache or computed."""

import itertools
import threading
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from ranksearch import plan
from ranksearch.compress.inventory import inventory
from ranksearch.compress.preparing import kernel, vbmf_ranks
from ranksearch.compress.profile import profile
from ranksearch.compress.surgery import factorize_
from ranksearch.errors import StudyError
from ranksearch.methods import METHODS
from ranksearch.methods.base import MAX_CANDIDATES, MAX_RANK_VALUES
from ranksearch.support.files import write_whole
from ranksearch.tensors.matrix import unfold
from ranksearch.tensors.vbmf import vbmf

EXAMPLE = torch.ones(1, 3, 6, 6)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        OrderedDict(
            block=nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 6, 3, padding=1), point=nn.Conv2d(6, 5, 1))),
            flatten=nn.Flatten(),
            fc=nn.Linear(5 * 36, 8),
        )
    )


def suiting(found):
    return {
        layer.name: [m for m in METHODS.values() if m.applies(layer.weight, linear=layer.kind == "Linear")]
        for layer in found.layers
    }


def most(method, layer):
    return tuple(ranks[-1] for ranks in method.rank_ranges(layer))


def made(model=None, cache=None, example=EXAMPLE, **options):
    model = model or net()
    found = inventory(model, example)
    return profile(model, found, suiting(found), cache=cache, **options)


def values(layer_profile, *, every=False):
    """The values of every method at its prepared ranks; with `every` at all ranks up to its limits."""
    layer = layer_profile.layer
    for name in layer_profile.methods:
        method = METHODS[plan.KINDS[name]]
        anywhere = itertools.product(*(range(1, limit + 1) for limit in method.limits(layer.weight)))
        for ranks in anywhere if every else method.rank_grid(layer):
            yield method.value(layer, ranks)


def assert_same(one, other):
    """Assert that both profiles give the same factors bit for bit, at prepared ranks and between them."""
    assert one.layers.keys() == other.layers.keys()
    for name, mine in one.layers.items():
        theirs = other.layers[name]
        assert (mine.layer, mine.vbmf, mine.methods) == (theirs.layer, theirs.vbmf, theirs.methods)
        assert torch.equal(mine.kernel, theirs.kernel)
        tried = [*values(mine), *list(values(mine, every=True))[1::5]]
        assert tried
        for value in tried:
            assert all(torch.equal(a, b) for a, b in zip(mine.factors(value), theirs.factors(value), strict=True))


@pytest.fixture
def prepared(monkeypatch):
    """A list that records the method of each decomposition that runs."""
    ran = []

    def noting(name, run):
        def wrapper(*args, **kwargs):
            ran.append(name)
            return run(*args, **kwargs)

        return wrapper

    for kind, method in METHODS.items():
        monkeypatch.setattr(type(method), "prepare", noting(kind.method, type(method).prepare))
    monkeypatch.setattr("ranksearch.compress.preparing.vbmf", noting("vbmf", vbmf))
    return ran


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "profile"


def files(cache):
    return sorted(path for path in cache.rglob("*") if path.is_file())


# --- factors, candidates, errors ---


def test_two_builds_give_the_same_factors():
    assert_same(made(), made())


def test_a_seed_is_used():
    one, other = (made(seed=seed).layers["block.conv"] for seed in (1, 2))
    assert (one.groups[0].seed, other.groups[0].seed) == (1, 2)
    assert not torch.equal(one.factors(plan.CP(4))[0], other.factors(plan.CP(4))[0])
    assert torch.equal(one.factors(plan.Tucker2(2, 3))[0], other.factors(plan.Tucker2(2, 3))[0])


def test_the_largest_rank_that_pays_is_prepared():
    for layer in made().layers.values():
        for name in layer.methods:
            method = METHODS[plan.KINDS[name]]
            prepared = [candidate.value.ranks for candidate in layer.candidates() if candidate.value.method == name]
            assert tuple(map(max, zip(*prepared, strict=True))) == most(method, layer.layer)


def test_factors_do_not_depend_on_which_were_asked_before():
    one, other = made(), made()
    for name, layer in one.layers.items():
        asked = list(values(layer, every=True))
        list(layer.candidates())
        for value in asked[::-7]:
            layer.factors(value)
        assert all(
            torch.equal(a, b)
            for value in asked[::5]
            for a, b in zip(layer.factors(value), other.layers[name].factors(value), strict=True)
        )


def test_candidates_are_smaller_and_their_errors_the_measured_ones():
    for layer in made().layers.values():
        candidates = list(layer.candidates())
        assert {candidate.value.method for candidate in candidates} == set(layer.methods)
        assert len({candidate.value for candidate in candidates}) == len(candidates)
        for candidate in candidates:
            method, ranks = METHODS[type(candidate.value)], candidate.value.ranks
            assert method.shrinks(layer.layer, ranks)
            assert candidate.params == method.params(layer.layer, ranks) < layer.layer.params
            assert candidate.macs == method.macs(layer.layer, ranks)
            rebuilt = method.reconstruct(layer.factors(candidate.value), layer.layer.weight).double()
            dense = layer.kernel.double()
            assert candidate.error == pytest.approx(float((rebuilt - dense).norm() / dense.norm()), rel=1e-4, abs=1e-6)


def test_the_factors_of_a_plan_are_those_of_its_layers_and_fit_the_model():
    model = net()
    found = made(model)
    chosen = plan.Plan.of({"block.conv": plan.CP(3), "fc": plan.Tucker2(2, 3, kernel=(6, 6)), "block.point": plan.SVD(2)})
    factors = found.factors(chosen)
    assert factors.keys() == {name for name, _ in chosen}
    for name, value in chosen:
        assert all(torch.equal(a, b) for a, b in zip(factors[name], found.layers[name].factors(value), strict=True))
    before = sum(parameter.numel() for parameter in model.parameters())
    factorize_(model, chosen, factors=factors)
    assert torch.equal(model.block.point.expand.weight, factors["block.point"][1].reshape(5, 2, 1, 1))
    assert sum(parameter.numel() for parameter in model.parameters()) < before


def test_every_value_of_every_method_fits_the_model():
    """Every candidate can be built. A fully connected layer behind a map gets the map where its method needs it."""
    model = net()
    for name, layer in made(model).layers.items():
        for value in {candidate.value.method: candidate.value for candidate in layer.candidates()}.values():
            assert factorize_(net(), {name: value}).eval()(EXAMPLE).shape == (1, 8)


def test_the_grid_pays_and_spans_the_limits():
    model = net()
    for layer in inventory(model, EXAMPLE).layers:
        for method in suiting(inventory(model, EXAMPLE))[layer.name]:
            grid, limits = method.rank_grid(layer), most(method, layer)
            assert grid[0] == (1,) * len(limits)
            assert len(set(grid)) == len(grid) <= min(MAX_RANK_VALUES ** len(limits), MAX_CANDIDATES)
            assert all(method.shrinks(layer, ranks) for ranks in grid)
            assert all(rank <= limit for ranks in grid for rank, limit in zip(ranks, limits, strict=True))
            assert method.shrinks(layer, limits) == (limits in grid)


def test_vbmf_ranks_are_those_of_the_unfoldings():
    planted = torch.randn(12, 2, generator=torch.Generator().manual_seed(0)) @ torch.randn(2, 90)
    weight = (planted + 0.01 * torch.randn(12, 90)).reshape(12, 10, 3, 3)
    assert vbmf_ranks(weight) == (vbmf(unfold(weight, 1)).rank, vbmf(unfold(weight, 0)).rank)
    assert vbmf_ranks(weight)[1] == 2
    assert vbmf_ranks(weight[:, :3]) == (None, vbmf(unfold(weight[:, :3], 0)).rank)
    assert vbmf_ranks(weight[:3])[1] is None
    assert vbmf_ranks(torch.zeros(12, 10, 3, 3)) == (None, None)


def test_a_layer_of_zeros_is_exact():
    model = net()
    with torch.no_grad():
        model.fc.weight.zero_()
    layer = made(model).layers["fc"]
    candidates = list(layer.candidates())
    assert len({candidate.value.method for candidate in candidates}) == 6
    assert {candidate.error for candidate in candidates} == {0.0}
    assert layer.vbmf == (None, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_kernels_are_float32_or_better_and_of_the_layers_shape(dtype, cache):
    model = net().to(dtype)
    found = inventory(model, EXAMPLE.to(dtype))
    for layer in found.layers:
        weight = kernel(model, layer)
        assert weight.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(weight, model.get_parameter(f"{layer.name}.weight").to(weight.dtype).reshape(layer.weight))
    assert_same(made(model, cache, EXAMPLE.to(dtype)), made(model, cache, EXAMPLE.to(dtype)))


# --- its cache ---


def test_the_cache_is_read_back(cache, prepared):
    first = made(cache=cache)
    assert set(prepared) == {"vbmf", *(kind.method for kind in METHODS)}
    written = {path: path.read_bytes() for path in files(cache)}
    assert len(written) == 3
    prepared.clear()
    again = made(cache=cache)
    assert not prepared
    assert {path: path.read_bytes() for path in files(cache)} == written
    assert_same(first, again)
    assert_same(first, made())


def test_each_layer_is_reported_once(cache):
    for _ in range(2):
        seen = []
        made(cache=cache, on_layer=seen.append)
        assert sorted(seen) == ["block.conv", "block.point", "fc"]


def valid_but_foreign():
    return safetensors.torch.save({"vbmf": torch.tensor([1, 1]), "svd/left": torch.zeros(1)})


DAMAGE = {
    "empty": lambda content: b"",
    "header cut": lambda content: content[:5],
    "cut": lambda content: content[: len(content) // 2],
    "last byte": lambda content: content[:-1],
    "garbage": lambda content: b"garbage" * 99,
    "zeros": lambda content: bytes(len(content)),
    "foreign": lambda content: valid_but_foreign(),
    "of no tensors": lambda content: safetensors.torch.save({}),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_torn_or_foreign_file_is_made_again(cache, prepared, damage):
    first = made(cache=cache)
    path = next(path for path in files(cache) if path.name.startswith("block.conv"))
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert path.read_bytes() != whole
    prepared.clear()
    again = made(cache=cache)
    assert sorted(set(prepared)) == ["cp", "cp4", "spatial", "tt", "tucker2", "vbmf"]
    assert path.read_bytes() == whole
    assert_same(first, again)


def test_a_file_under_another_ones_name_is_made_again(cache, prepared):
    made(cache=cache)
    conv, point, _ = files(cache)
    whole = conv.read_bytes()
    conv.write_bytes(point.read_bytes())
    prepared.clear()
    made(cache=cache)
    assert prepared
    assert conv.read_bytes() == whole


def changed_weight():
    model = net()
    with torch.no_grad():
        model.fc.weight[0, 0] += 1e-3
    return model


def test_what_the_content_depends_on_changes_the_file(cache):
    made(cache=cache)
    before = set(files(cache))
    made(changed_weight(), cache)
    assert [path.name.split("-")[0] for path in sorted(set(files(cache)) - before)] == ["fc"]
    for number, options in enumerate(({"seed": 1}, {"model": net().double(), "example": EXAMPLE.double()}), 1):
        made(cache=cache, **options)
        assert len(files(cache)) == 4 + 3 * number
    made(net(), cache)
    assert len(files(cache)) == 10


def test_other_methods_are_another_file(cache):
    model = net()
    found = inventory(model, EXAMPLE)
    few = {"block.conv": [METHODS[plan.Tucker2]]}
    made(model, cache)
    before = set(files(cache))
    layers = profile(model, found, few, cache=cache).layers
    assert {name: set(layer.methods) for name, layer in layers.items()} == {
        "block.conv": {"tucker2"},
        "block.point": set(),
        "fc": set(),
    }
    assert len(set(files(cache)) - before) == 3
    assert not list(layers["fc"].candidates())


@pytest.mark.parametrize("name", ["a/b", "/a", "a\\b", "~", "a b:*?", "é" * 150, "x" * 300])
def test_no_name_of_a_layer_leads_out_of_the_cache(tmp_path, name):
    model, cache = nn.Sequential(), tmp_path / "deep" / "cache"
    model.add_module(name, nn.Sequential(OrderedDict([("inner/", nn.Conv2d(3, 6, 3))])))
    first = made(model, cache)
    assert list(first.layers) == [f"{name}.inner/"]
    assert [path.parent for path in files(tmp_path)] == [cache]
    assert_same(first, made(model, cache))
    assert len(files(tmp_path)) == 1


def test_readers_never_see_a_part_of_a_file(tmp_path):
    path, contents = tmp_path / "file", [bytes([number]) * (50_000 * number) for number in (1, 2, 3)]
    write_whole(path, contents[0])
    done, seen = threading.Event(), []

    def read():
        while not done.is_set():
            seen.append(path.read_bytes())

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for content in contents * 20:
        write_whole(path, content)
    done.set()
    for reader in readers:
        reader.join()
    assert len(seen) > 2
    assert set(seen) <= set(contents)
    assert files(tmp_path) == [path]


@pytest.mark.slow
def test_profiles_at_once_share_a_cache(cache):
    model, results, start = net(), [], threading.Barrier(3)
    found = inventory(model, EXAMPLE)

    def build():
        start.wait()
        results.append(profile(model, found, suiting(found), cache=cache))

    threads = [threading.Thread(target=build) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    for result in results:
        assert_same(result, made())
    assert len(files(cache)) == 3


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    blocked = Path(tmp_path / "file")
    blocked.write_text("not a folder")
    with pytest.raises(
        StudyError, match=r"The layer's factors .*/file/profile/.* cannot be written: .*; fix this and run the same"
    ):
        made(cache=blocked / "profile")
