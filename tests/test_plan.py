"""Plans: JSON gives the same plan back, and invalid plans are refused in one sentence."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranksearch.errors import PlanError
from ranksearch.plan import CP, CP4, KINDS, SVD, Dense, Plan, Spatial, Tucker2

rank = st.integers(1, 500)
kernel = st.none() | st.tuples(rank, rank)
values = st.one_of(
    st.builds(SVD, rank),
    st.builds(Spatial, rank),
    st.builds(Tucker2, rank, rank, kernel=kernel),
    st.builds(CP, rank, kernel=kernel),
    st.builds(CP4, rank),
    st.just(Dense()),
)
widths = st.sampled_from([1.0, 0.7, 0.35])
plans = st.builds(Plan.of, st.dictionaries(st.text(min_size=1, max_size=8), values, max_size=6), widths)


@given(plans)
def test_json_gives_the_plan_back(plan):
    assert Plan.from_json(plan.to_json()) == plan
    assert hash(Plan.from_dict(plan.to_dict())) == hash(plan)


@given(st.dictionaries(st.text(min_size=1, max_size=3), values, min_size=1))
def test_order_and_dense_layers_make_no_difference(layers):
    assert Plan.of(layers) == Plan.of(dict(reversed(layers.items())))
    assert all(Plan.of(layers)[name] == value for name, value in layers.items())
    assert Plan.of(layers)["a layer of no plan"] == Dense()


def test_a_plan_reads_as_text():
    assert str(Plan.of({"fc": CP(16, kernel=(6, 6)), "conv": Tucker2(4, 8)})) == "conv Tucker-2 4x8, fc CP 16"
    assert str(Plan()) == "dense"
    assert str(Plan.of({"fc": SVD(4)}, width=0.5)) == "width 0.5: fc SVD 4"


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "8"])
def test_ranks_are_positive_whole_numbers(bad):
    with pytest.raises(PlanError, match=r"A rank must be a whole number of at least 1, but cp got rank="):
        CP(bad)


def test_numbers_may_be_those_of_numpy():
    assert Tucker2(np.int64(3), 4) == Tucker2(3, 4)
    assert json.loads(Plan.of({"fc": CP(np.int32(2), kernel=[np.int64(3), 3])}).to_json()) == json.loads(
        Plan.of({"fc": CP(2, kernel=(3, 3))}).to_json()
    )
    assert hash(CP(2, kernel=[3, 3])) == hash(CP(2, kernel=(3, 3)))


@pytest.mark.parametrize("kernel", [3, "33", (0, 6), ()])
def test_kernels_are_rows_of_positive_whole_numbers(kernel):
    with pytest.raises(PlanError, match="A kernel must be whole numbers of at least 1, but cp got kernel="):
        CP(2, kernel=kernel)


def test_kernels_are_positive_whole_numbers():
    with pytest.raises(PlanError, match=r"A kernel must be whole numbers of at least 1, but cp got kernel=\(0, 6\)"):
        CP(4, kernel=(0, 6))


def entry(**layer):
    return json.dumps({"format": "ranksearch-plan/1", "layers": {"conv": layer}})


def narrowed(indices, **parts):
    narrowing = {"kept": [{"size": 4, "indices": indices}], "tensors": {}, "attributes": {}} | parts
    return json.dumps({"format": "ranksearch-plan/1", "layers": {}, "narrowing": narrowing})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "A plan must be JSON, but line 1 is not"),
        ("[]", 'A plan needs "format": "ranksearch-plan/1" and a "layers" object, but got \'list\''),
        ('{"format": "other/9", "layers": {}}', "but got 'other/9'"),
        (
            entry(method="tuker2", rank_in=1, rank_out=1),
            "Layer 'conv' must name a known method, but got 'tuker2'. Did you mean 'tucker2'",
        ),
        (
            '{"format": "ranksearch-plan/1", "width": 1.5, "layers": {}}',
            "A plan's width must be above 0 and at most 1, but got 1.5",
        ),
        (narrowed(None, kept=3), "A narrowing's kept channels must be a list, but are 3"),
        (narrowed(None, kept=[3]), 'Kept channels must be an object of "size" and "indices", but got 3'),
        (
            narrowed([1, 0]),
            "Kept channels must be ascending numbers from 0 to below their size, but got Kept(size=4, indices=(1, 0))",
        ),
        (narrowed([4]), "Kept channels must be ascending numbers from 0 to below their size, but got"),
        (narrowed([]), "Kept channels must be ascending numbers from 0 to below their size, but got"),
        (narrowed(["a"]), "Kept channels must be ascending numbers from 0 to below their size, but got"),
        (narrowed([0], tensors=[]), "A narrowing's tensors must be an object of objects, but are []"),
        (narrowed([0], attributes={"conv": 3}), "A narrowing's attributes must be an object of objects, but are {'conv': 3}"),
        (
            narrowed([0], tensors={"conv.weight": {"0": 1}}),
            "A narrowing must give each dimension of tensor 'conv.weight' one of its 1 sets of kept channels, but gives dimension 0 1",
        ),
        (narrowed([0], tensors={"w": {"x": 0}}), "but gives dimension x 0"),
        (
            narrowed([0], attributes={"conv": {"groups": 1.5}}),
            "A narrowing's attributes must be whole numbers, but conv.groups is 1.5",
        ),
        (
            '{"format": "ranksearch-plan/1", "layers": {}, "narrowing": {"kept": []}}',
            'A narrowing needs "kept", "tensors" and "attributes", but got kept',
        ),
        (entry(method="cp"), "Layer 'conv': method 'cp' takes rank, but got none"),
        (entry(method="cp", rank=3, extra=1), "Layer 'conv': method 'cp' takes rank, but got extra, rank"),
        (entry(method="cp", rank=0), "A rank must be a whole number of at least 1, but cp got rank=0"),
    ],
)
def test_nonsense_is_refused(text, message):
    with pytest.raises(PlanError) as caught:
        Plan.from_json(text)
    assert message in str(caught.value)


def test_every_kind_has_its_own_method_name():
    assert all(kind.method == name for name, kind in KINDS.items())
