"""`ranksearch init` writes a study file that is valid, and names what is in the model."""

from __future__ import annotations

import pytest

from ranksearch.cli import main
from ranksearch.study_file import load_spec
from tests.conftest import refuse

SMALL = ("init", "tests.nets:small", "--example", "1,1,8,8")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_study_file_is_written_once(here, capsys):
    assert main([*SMALL, "--arg", "classes=12"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "small.toml", "Name your data and weights in it, then run:  ranksearch study small.toml",
    ]  # fmt: skip
    spec = load_spec("small.toml")
    assert (spec.name, spec.task.model, spec.task.model_args) == ("small", "tests.nets:small", {"classes": 12})
    assert (spec.task.data, spec.dense.weights, spec.dense.epochs) == ("tests.nets:make_data", "small.safetensors", 0)
    text = (here / "small.toml").read_text()
    assert text.startswith(
        "# Written by: ranksearch init tests.nets:small --example 1,1,8,8 --arg classes=12\n"
        "# docs/reference/study-file.md explains every key.\n"
        "# Run this study by: ranksearch study small.toml\n"
    )
    assert "# 9,884 parameters, and 86,912 multiply-accumulates for one input of 1x8x8.\n" in text
    assert "#   fc1           32x16x4x4         8,224 parameters   83.2%\n" in text
    assert refuse(capsys, *SMALL) == "A study file must not be overwritten, but small.toml exists; choose another --to."
    assert (here / "small.toml").read_text() == text


def test_layers_that_stay_dense_are_listed_by_reason(here):
    assert main(["init", "torchvision.models:swin_t", "--example", "1,3,64,64", "--to", "sub/net.toml"]) == 0
    text = (here / "sub" / "net.toml").read_text()
    assert 'data = "my_pkg:make_data"' in text
    assert (
        "# Layers that stay dense: 24\n#   features.1.0.attn.qkv, features.1.0.attn.proj, features.1.1.attn.qkv and 21 more: the"
        in text
    )


def test_a_model_of_several_inputs(here):
    assert main(["init", "tests.nested:TwoInputs", "--example", "1,2,8,8", "--example", "1,5", "--to", "two.toml"]) == 0
    assert "multiply-accumulates for one input of 2x8x8 and 5." in (here / "two.toml").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tests.nets:small", "--example", "1,8,8"], "The model must accept one input of shape (1, 8, 8), but its forward raised"),
        (["tests.nets:small", "--example", "3,8,8"], "--example must be the shape of a batch of one input, such as 1,3,224,224, but got '3,8,8'; write 1,3,8,8."),
        (["tests.nets:small", "--example", "8x8"], "--example must be the shape of a batch of one input, such as 1,3,224,224, but got '8x8'."),
        (["tests.nets", "--example", "1,1,8,8"], "MODEL must be 'package.module:name', but got 'tests.nets'."),
        (["tests.nested:TwoInput", "--example", "1,5"], "MODEL: module 'tests.nested' has no 'TwoInput'. Did you mean 'TwoInputs'?"),
        (["tests.nets:not_a_model", "--example", "1,1,8,8"], "MODEL must return an nn.Module, but 'tests.nets:not_a_model' returned a int."),
        (["tests.nets:small", "--example", "1,1,8,8", "--arg", "classes"], "--arg must read name=value, but got 'classes'."),
        (["tests.nets:small", "--example", "1,1,8,8", "--arg", "size=3"], "MODEL: tests.nets:small must take the arguments {'size': 3}, but: got an"),
        (["tests.nets:small", "--example", "1,1,8,8", "--to", "file/x.toml"], "The study file file/x.toml cannot be written: "),
    ],
)  # fmt: skip
def test_what_is_refused(arguments, message, here, capsys):
    (here / "file").touch()
    assert refuse(capsys, "init", *arguments).startswith(message)
    assert [path.name for path in here.iterdir()] == ["file"]
