"""The command line as a user sees it: output, exit codes, and a message of one sentence for every kind of bad input."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import ranksearch
from ranksearch.cli import _command_text, _storage_option, main
from ranksearch.console import Lines
from ranksearch.study.database import _storage_error
from tests.conftest import refuse, snapshot


@pytest.mark.slow
def test_a_study_from_start_to_export(study_file, tmp_path, capsys):
    command = ["study", str(study_file), "--trials", "4", "--workers", "0", "--set", "finalists.count=2", "--seed", "3"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"^trial \d+ \[", out, re.MULTILINE)) == 4
    assert len(re.findall(r"^finalist \d+ \[", out, re.MULTILINE)) == 2
    assert "ranksearch export runs/small --knee" in out
    folder = tmp_path / "runs" / "small"
    front = json.loads((folder / "front.json").read_text())
    assert front["seed"] == 3
    assert front["command"].startswith("ranksearch study ")

    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")

    number = front["front"][0]["trial"]
    assert main(["export", str(folder), "--trial", str(number), "--to", str(tmp_path / "mine")]) == 0
    assert f"trial {number}," in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {"plan.json", "weights.safetensors"}
    assert main(command) == 0
    assert "4 of them done by an earlier run" in capsys.readouterr().out


def test_layers_lists_shapes_and_costs_and_writes_nothing(study_file, tmp_path, capsys):
    assert main(["layers", str(study_file)]) == 0
    out = capsys.readouterr().out
    for words in ("conv1", "16x8x3x3", "32x16x4x4, flattened", "not trained yet"):
        assert words in out
    assert {path.name for path in tmp_path.iterdir()} == {"small.toml"}
    assert main(["layers", str(study_file), "--set", "dense.epochs=0"]) == 0
    assert "not trained yet" not in capsys.readouterr().out, "the study takes it as it is"


def test_layers_of_a_finished_study_shows_what_methods_cost(finished, study_file, capsys):
    assert main(["layers", str(study_file), "--out", str(finished[0])]) == 0
    out = capsys.readouterr().out
    assert "not trained yet" not in out
    assert re.search(r"Tucker-2 \d+x\d+: [\d,]+ \(\d+\.\dx\)", out)


def test_studies_names_the_built_in_ones(capsys):
    assert main(["studies"]) == 0
    assert re.search(r"^lenet\s+The thesis's LeNet", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.slow
def test_ctrl_c_prints_the_front_so_far_and_how_to_go_on(bare, study_file, capsys, monkeypatch):
    before = Lines.trial

    def impatient(self, record, trials):
        before(self, record, trials)
        if len(trials) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Lines, "trial", impatient)
    assert main(["study", "small.toml", "--workers", "0", "--fresh", "--seed", "1"]) == 130
    out = capsys.readouterr().out
    assert "the front so far" in out
    assert out.endswith("Stopped. Resume with:  ranksearch study small.toml --workers 0 --seed 1\n")


@pytest.mark.parametrize("choice", [["--knee"], ["--within", "1"], ["--min-score", "0.1"], ["--min-ratio", "1"]])
def test_export_chooses_from_the_front(finished, capsys, tmp_path, choice, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, record = finished
    assert main(["export", str(folder), *choice, "--to", str(tmp_path / "model")]) == 0
    number = int(re.search(r"trial (\d+),", capsys.readouterr().out)[1])
    assert number in {trial.number for trial in record.front}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["study", "lennet"], "A study is a built-in name or a .toml file, but 'lennet' is neither. Did you mean 'lenet'?"),
        (["study", "missing.toml"], "The study file missing.toml cannot be read: No such file or directory; check the path."),
        (["study", "small.toml", "--set", "search.trails=3"], "small.toml: search.trails is not a key of a study. Did you mean"),
        (["study", "small.toml", "--trials", "0"], "small.toml: search.trials must be at least 1, but got 0."),
        (["study", "small.toml", "--set", "search.min_score=inf"], "small.toml: search.min_score must be a finite number, but got inf."),
        (["study", "small.toml", "--set", "search.min_score=97"], "search.min_score must be at most 1 for accuracy, but got 97;"),
        (["study", "small.toml", "--set", "search.min_ratio=1000"], "search.min_ratio must be at most "),
        (["study", "small.toml", "--set", "search.max_params=3"], "search.max_params must be at least "),
        (["study", "small.toml", "--set", "search.max_macs=3"], "search.max_macs must be at least "),
        (["study", "small.toml", "--minutes", "-1"], "small.toml: search.minutes must be a finite number above 0, but got -1.0."),
        (["study", "small.toml", "--seed", "-1"], "small.toml: seed must be between 0 and 2147483647, but got -1."),
        (["study", "small.toml", "--workers", "-1"], "--workers must be at least 0, but got -1."),
        (["study", "small.toml", "--set", "space.methods=['tuker2']"], "space.methods must name known methods, but got 'tuker2'."),
        (["study", "small.toml", "--set", "space.skip=['conv9']"], "space.skip must name layers that can be decomposed, but"),
        (["study", "small.toml", "--set", "space.layers=['norm1']"], "space.layers must name layers that can be decomposed, but"),
        (["study", "small.toml", "--set", "task.model=tests.nets:smal"], "task.model: module 'tests.nets' has no 'smal'. Did you"),
        (["study", "small.toml", "--set", "task.model=nowhere:net"], "task.model must be importable, but 'nowhere:net' is not"),
        (["study", "small.toml", "--set", "task.model=tests.nets:NUMBER"], "task.model must name a callable, but"),
        (["study", "small.toml", "--set", "task.model=tests.nets:not_a_model"], "task.model must return an nn.Module, but"),
        (["study", "small.toml", "--set", "task.model=tests.nets:not_a_number"], "Weights must be finite, but 'conv1.weight' holds"),
        (["study", "small.toml", "--set", "task.model=tests.nets:nothing_to_decompose"], "The model must have a decomposable layer"),
        (["layers", "small.toml", "--set", "dense.weights=typo.pt"], "dense.weights must be a state dict of the model, but typo.pt does not"),
        (["study", "small.toml", "--set", "task.model_args.clases=3"], "task.model: tests.nets:small must take the arguments"),
        (["study", "small.toml", "--set", "task.model_args.classes=3"], "The model must return 10 outputs for each input, one per "),
        (["study", "small.toml", "--set", "task.model=ranksearch.models:lenet"], "The model must accept one input of shape (1, 1, 8, 8)"),
        (["study", "small.toml", "--set", "task.data=tests.nets:wrong_labels"], "Targets must lie in 0..9, but split 'validation' holds"),
        (["study", "small.toml", "--set", "task.data=tests.nets:small"], "task.data must return ranksearch.data.Splits, but"),
        (["study", "small.toml", "--set", "task.model=tests.nets:raises"], "task.model: tests.nets:raises must succeed with {}, but raised"),
        (["study", "small.toml", "--set", "task.model=.nets:small"], "small.toml: task.model must be 'package.module:name', but got"),
        (["study", "small.toml", "--set", "task.model=tests.torn:small"], "task.model must be importable, but 'tests.torn:small' raised "),
        (["study", "small.toml", "--set", "task.model_args.classes=ten"], "task.model: tests.nets:small must succeed with {'classes': 't"),
        (["study", "small.toml", "--set", "task.model=torchvision.models:resnet18", "--set", "task.model_args.weights=IMAGENET"],
         "task.model: torchvision.models:resnet18 must succeed with {'weights': 'IMAGENET'}, but raised KeyError"),
        (["study", "small.toml", "--set", "task.model_args.day=2024-01-02"], "small.toml: task.model_args.day must be a string, a number,"),
        (["study", "small.toml", "--set", "task.data_args.x=[1, nan]"], "small.toml: task.data_args.x.1 must be a number, but got nan."),
        (["study", "small.toml", "--set", "finetune.weight_decay=inf"], "small.toml: finetune.weight_decay must be at least 0, but got inf"),
        (["study", "small.toml", "--set", "task.model=tests.nets:uncopyable"], "It must be possible to copy the model, but copy.deepcopy"),
        (["study", "small.toml", "--set", "task.data=tests.nets:pictures"], "A split must be readable in batches, but 'train' raised Type"),
        (["study", "small.toml", "--set", "task.data=tests.nets:ragged"], "A split must be readable in batches, but 'train' raised Runt"),
        (["study", "small.toml", "--set", "task.data=tests.nets:larger_test"],
         "The model must accept the inputs of every split, but with inputs of 'test', of shape (1, 16, 16) (those of 'train': (1, 8, 8)), its"),
        (["study", "small.toml", "--storage", "sqlite://"], "A storage must be kept after the run, but sqlite:// is in memory; name"),
        (["study", "small.toml", "--engine", "ray", "--gpus-per-trial", "nan"], "--gpus-per-trial must be whole or a fraction of one"),
        (["study", "small.toml", "--engine", "ray", "--gpus-per-trial", "inf"], "--gpus-per-trial must be whole or a fraction of one"),
        (["study", "small.toml", "--storage", "nonsense"], "A storage must be a database URL such as sqlite:///study.db, but got"),
        (["study", "small.toml", "--storage", "sqlite:////no/such/folder/x.db"], "The storage sqlite:////no/such/folder/x.db cannot be"),
        (["study", "small.toml", "--storage", "oracel://u:secret@host/db"], "The storage oracel://u:***@host/db cannot be used:"),
        (["layers", "lennet"], "A study is a built-in name or a .toml file, but 'lennet' is neither."),
        (["report", "."], "A study's folder must hold spec.toml, but . does not; name a folder under runs/."),
        (["export", ".", "--knee"], "A study's folder must hold spec.toml, but . does not; name a folder under runs/."),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(study_file, tmp_path, capsys, arguments, message):
    before = snapshot(tmp_path)
    assert refuse(capsys, *arguments).startswith(message)
    assert snapshot(tmp_path) == before


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there(study_file, capsys, device):
    told = refuse(capsys, "study", "small.toml", "--device", device)
    assert re.fullmatch(rf"--device must be one that torch finds on this machine \(cpu(, mps)?\), but got {device}\.", told)


def test_a_misspelt_device(study_file, capsys):
    told = refuse(capsys, "study", "small.toml", "--device", "cdua")
    assert told == "--device must be auto, cpu, cuda, cuda:N or mps, but got 'cdua'."


def test_the_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"ranksearch {ranksearch.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "pt2", "--opset", "18"], "--opset is for --format onnx, but the format is pt2; leave one of them out."),
        (["--opset", "18"], "--opset is for --format onnx, but the format is plan; leave one of them out."),
        (["--format", "onnx", "--opset", "0"], r"--opset must be between 1 and \d+, the newest that the installed onnx knows, but got 0\."),
        (["--format", "onnx", "--opset", "99"], r"--opset must be between 1 and \d+, the newest that the installed onnx knows, but got 99\."),
        pytest.param(
            ["--format", "onnx", "--opset", "7"],
            r"--opset must be one that the installed exporter can write, but it could not convert this model from 18 to 7; choose 18 to",
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_impossible_opsets_are_refused(copied, capsys, arguments, message):
    assert re.match(message, refuse(capsys, "export", copied, "--knee", *arguments))
    assert not (copied / "export").exists()


@pytest.mark.slow
def test_an_export_of_a_given_opset(copied, capsys):
    import onnx

    assert main(["export", str(copied), "--knee", "--format", "onnx", "--opset", "19", "--to", str(copied / "a.onnx")]) == 0
    assert [known.version for known in onnx.load(copied / "a.onnx").opset_import] == [19]
    assert not capsys.readouterr().err


def test_the_password_of_a_storage_is_never_shown(study_file, capsys):
    for url in ("oracel://user:s3cret@host/db", "not a url:s3cret@host", "sqlite://user:s3cret@/x"):
        assert "s3cret" not in refuse(capsys, "study", "small.toml", "--storage", url)


@pytest.mark.parametrize("password", ["e", "s", "*", "p%40ss", "oracel", "a:b/c"])
def test_a_password_is_masked_where_it_stands_and_nowhere_else(study_file, capsys, password):
    assert refuse(capsys, "study", "small.toml", "--storage", f"oracel://user:{password}@host/db") == (
        "The storage oracel://user:***@host/db cannot be used: Can't load plugin: sqlalchemy.dialects:oracel; check its address "
        "and that its server is running."
    )


def test_an_address_in_a_drivers_words_is_masked():
    url = "oracel://user:p%40e@host/db?key=1"
    told = f"no {url}, nor oracel://user:p%40e@host/db?key=1 of user:p@e@host here: peep"
    assert str(_storage_error(url, RuntimeError(told))).startswith(
        "The storage oracel://user:***@host/db cannot be used: no oracel://user:***@host/db, nor oracel://user:***@host/db of "
        "user:***@host here: peep; check"
    )


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("postgresql://me:pa@ss@host/db", "An @ in a storage's password must be written as %40, but '***@host/db' has two."),
        ("postgresql://me:s@host:port/db", "A storage must be a database URL such as sqlite:///study.db, but got '***@host:port/db'."),
        ("me:s3cret@host?password=s3cret", "A storage must be a database URL such as sqlite:///study.db, but got '***@host'."),
    ],
)  # fmt: skip
def test_an_address_that_cannot_be_read_shows_no_password(study_file, capsys, url, told):
    assert refuse(capsys, "study", "small.toml", "--storage", url) == told
    assert url not in _command_text(["study", "--storage", url], url)


def test_a_file_that_is_not_toml(study_file, capsys):
    study_file.write_text("name = = 3")
    assert refuse(capsys, "study", "small.toml").startswith("A study file must be TOML, but small.toml is not:")


def test_a_command_is_shown_without_the_storages_password():
    url = "postgresql://me:s3cret@host/db?password=s3cret"
    for given in (["study", "lenet", "--storage", url], ["study", "lenet", f"--storage={url}"]):
        assert "s3cret" not in _command_text(given, url)
        assert "postgresql://me:***@host/db" in _command_text(given, url)
    assert _storage_option(url) == " --storage 'postgresql://me:***@host/db'"
    assert _storage_option(None) == ""


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("dense.weights='mine.pt'", """"dense.weights='mine.pt'\""""),
        ('dense.weights="mine.pt"', """'dense.weights="mine.pt"'"""),
        ("task.model_args={a='$HOME'}", None),
        ("space.layers=['a', \"b\"]", None),
        ("finetune.epochs=1", "finetune.epochs=1"),
    ],
)
def test_a_command_is_shown_as_a_shell_reads_it(word, shown):
    found = _command_text(["study", "lenet", "--set", word], None)
    assert shlex.split(found) == ["ranksearch", "study", "lenet", "--set", word]
    assert shown is None or found.endswith(f"--set {shown}")


@pytest.mark.slow
def test_a_study_made_from_python_is_not_exported_by_the_command_line(bare, trained, tmp_path, capsys):
    out = tmp_path / "mine"
    ranksearch.search(
        trained, out=out, search=ranksearch.Search(trials=1), finetune=ranksearch.Recipe(1), finalists=ranksearch.Finalists(1),
        engine=ranksearch.Local(0),
    )  # fmt: skip
    told = refuse(capsys, "export", out, "--knee")
    assert (
        told
        == "This study was run from Python, so only Python has its dense model; there use ranksearch.load_model, and ranksearch.export_model for ONNX."
    )


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (["--trial", "999"], "Only finalists can be exported, but trial 999 is not one of them; they are"),
        (
            ["--within", "-1"],
            "No finalist is within -1 of the dense net's score with a chance of at least 70 %; the best has 0 %; allow more.",
        ),
        (["--min-score", "1.1"], "No finalist has a validation score of at least 1.1; the best has"),
        (["--min-ratio", "1e6"], "No finalist has a compression ratio of at least 1e+06; the smallest model has"),
    ],
)
def test_impossible_exports_are_refused(finished, capsys, choice, message):
    assert refuse(capsys, "export", finished[0], *choice).startswith(message)


def test_an_export_of_damaged_weights(copied, capsys, finished):
    number = finished[1].front[0].number
    weights = copied / "models" / str(number) / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    told = refuse(capsys, "export", copied, "--trial", number)
    assert re.search(r"The weights in .* are damaged \(.*\); run the study again\.", told)


def test_a_report_without_its_storage(copied, capsys):
    (copied / "study.db").unlink()
    assert "study.db does not exist; run `ranksearch study` first, or give --storage." in refuse(capsys, "report", copied)
    (copied / "study.db").write_bytes(b"this is no database" * 100)
    assert "cannot be used:" in refuse(capsys, "report", copied)


def test_a_report_names_the_storage_that_the_study_was_begun_in(copied, capsys):
    for path in copied.glob("study.db*"):  # with the write-ahead log
        path.rename(copied.parent / path.name.replace("study", "else"))
    url = f"sqlite:///{copied.parent / 'else.db'}"
    spec = copied / "spec.toml"
    mark, rest = spec.read_text().split("\n", 1)
    spec.write_text(f"{mark}\n# storage: {url}\n{rest}")
    told = refuse(capsys, "report", copied)
    assert told == f"The record of the study in {copied} is in {url}; give --storage {url}."
    assert main(["report", str(copied), "--storage", url]) == 0


def test_a_report_of_another_optuna_study(copied, capsys):
    import optuna

    (copied / "study.db").unlink()
    optuna.create_study(study_name="other", storage=f"sqlite:///{copied / 'study.db'}")
    assert "holds no study 'small'; run `ranksearch study` first." in refuse(capsys, "report", copied)
    optuna.create_study(study_name="small", storage=f"sqlite:///{copied / 'study.db'}")
    assert "Study 'small' holds no ranksearch record yet" in refuse(capsys, "report", copied)


def test_a_bug_is_a_traceback(study_file, monkeypatch):
    def broken(*args, **kwargs):
        raise ZeroDivisionError("a bug of ours")

    monkeypatch.setattr("ranksearch.study_file.load_spec", broken)
    with pytest.raises(ZeroDivisionError, match="a bug of ours"):
        main(["study", "small.toml"])


@pytest.mark.slow
def test_report_does_not_import_torch(finished):
    code = f"import sys; from ranksearch.cli import main; main(['report', {str(finished[0])!r}]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.slow
def test_a_report_that_cannot_be_written_is_one_sentence(copied, study_file, capsys):
    page = copied / "front.csv"
    page.unlink()
    page.mkdir()
    for words in (["study", "small.toml", "--workers", "0"], ["report", "runs/small"]):
        assert refuse(capsys, *words) == (
            "The report's runs/small/front.csv cannot be written: Is a directory; fix this and run `ranksearch report`."
        )


def test_a_byte_order_mark_is_read_over(study_file, capsys):
    file = Path("small.toml")
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert main(["layers", "small.toml"]) == 0
