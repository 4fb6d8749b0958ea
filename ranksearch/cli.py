"""The command line: parse, call the package, print, return the exit code.

`--help`, `studies` and `report` do not import torch.
"""

from __future__ import annotations

import argparse
import errno
import gc
import io
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ranksearch import __version__
from ranksearch.errors import RankSearchError, StudyError
from ranksearch.settings import fields, kind_of, plain_help
from ranksearch.spec import Search, StudySpec
from ranksearch.study.options import ENGINES, Options, Ray, engine_of, option_of
from ranksearch.support.files import RESUME_HINT, writing

if TYPE_CHECKING:
    import optuna
    from rich.console import Console

INTERRUPTED = 130
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
METAVARS = {"address": "HOST:PORT", "storage": "URL"}
ENGINE_OPTIONS = tuple(dict.fromkeys(name for engine in ENGINES.values() for name in fields(engine)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code.

    0: done. 1: the reader of the output is gone. 2: bad input or a full disk, with one sentence on stderr. 130: Ctrl-C.
    A bug ends in a traceback.
    """
    _escape_unencodable()
    argv = list(sys.argv[1:] if arguments is None else arguments)
    options = make_parser().parse_args(argv)
    # Torch and a long record make a million lasting objects. With the default thresholds the garbage collector scans them again
    # and again, which took half of the time to read 5,000 trials.
    gc.set_threshold(50_000, 20, 50)
    # Find a user's `package.module:name` in the current folder, as `python -m` does.
    sys.path.insert(0, str(Path.cwd()))
    try:
        code = int(options.run(options, argv) or 0)
        sys.stdout.flush()  # inside the try: a full disk or a closed pipe may show up only here
        return code
    except RankSearchError as error:
        sys.stderr.write(f"ranksearch: {error}\n")
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output is gone (`| head`), so there is nowhere to write an error.
        _close_output()
        return 1
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        _close_output()  # stdout may be on the full disk, and flushing it at exit would fail again
        where = f" ({error.filename})" if error.filename else ""
        with suppress(OSError):
            sys.stderr.write(f"ranksearch: The disk is full{where}: {error.strerror}; {RESUME_HINT}.\n")
        return 2


def _close_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _escape_unencodable() -> None:
    """Write characters that an output cannot encode as escapes: a name must not end a finished study in a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class _Parser(argparse.ArgumentParser):
    """Refuses abbreviated options, because the command is stored and shown again and must be readable."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; docs/reference/command-line.md is made from it."""
    parser = _Parser(
        prog="ranksearch",
        description="Finds, layer by layer, the tensor decomposition and rank that make a trained CNN many times smaller.",
    )
    parser.add_argument("--version", action="version", version=f"ranksearch {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    study = commands.add_parser("study", help="run or resume a study", description="Run or resume a study.")
    study.add_argument("source", metavar="NAME|FILE", help="a built-in study, or a TOML file")
    _overrides(study)
    study.add_argument("--out", type=Path, metavar="DIR", help="the study's folder (runs/NAME)")
    _add_option(study, "trials", Search, note="search.trials")
    _add_option(study, "minutes", Search, note="search.minutes")
    study.add_argument(
        "--engine", choices=tuple(ENGINES), default="local", help=f"{plain_help(fields(Options)['engine'])} (local)"
    )
    for name in ENGINE_OPTIONS:
        _add_option(study, name, *(engine for engine in ENGINES.values() if name in fields(engine)))
    _add_option(study, "storage", Options)
    study.add_argument("--fresh", action="store_true", help=plain_help(fields(Options)["fresh"]))
    study.set_defaults(run=_study)

    init = commands.add_parser(
        "init",
        help="write a study file for a model of yours",
        description="Write a study file for a model of yours, with comments and a list of its layers. Refuses to overwrite.",
    )
    init.add_argument("model", metavar="MODEL", help="the function that returns the model, package.module:name")
    init.add_argument(
        "--example", action="append", required=True, metavar="SHAPE",
        help="the shape of a batch of one input, as 1,3,224,224; once for each argument of the model",
    )  # fmt: skip
    init.add_argument(
        "--arg", dest="model_args", action="append", default=[], metavar="NAME=VALUE", help="an argument of the function"
    )
    init.add_argument("--to", type=Path, metavar="FILE", help="the file to write (NAME.toml, for the function NAME)")
    init.set_defaults(run=_init)

    studies = commands.add_parser("studies", help="list the built-in studies", description="List the built-in studies.")
    studies.set_defaults(run=_studies)

    layers = commands.add_parser(
        "layers",
        help="list a model's layers and what each method would cost",
        description="List a model's layers: shape, parameters, MACs, VBMF ranks, cost of each method at those ranks.",
    )
    layers.add_argument("source", metavar="NAME|FILE", help="a built-in study, or a TOML file")
    _overrides(layers)
    layers.add_argument("--out", type=Path, metavar="DIR", help="the folder with the trained dense net (runs/NAME)")
    layers.set_defaults(run=_layers)

    report = commands.add_parser(
        "report", help="write a study's report again", description="Write a study's report again, from its storage."
    )
    report.add_argument("folder", type=Path, metavar="DIR", help="the study's folder")
    report.add_argument("--storage", metavar="URL", help="Optuna storage, if the study is not stored in its folder")
    report.set_defaults(run=_report)

    export = commands.add_parser(
        "export",
        help="export a model of the front",
        description="Export a finalist as plan and weights, ONNX or torch.export; reload it and compare its outputs.",
    )
    export.add_argument("folder", type=Path, metavar="DIR", help="the study's folder")
    which = export.add_mutually_exclusive_group(required=True)
    which.add_argument("--trial", type=int, metavar="N", help="the finalist with this trial number")
    which.add_argument("--knee", action="store_true", help="the knee of the front")
    which.add_argument("--within", type=float, metavar="X", help="the smallest finalist at most X below dense, by its interval")
    which.add_argument("--min-score", type=float, metavar="S", help="the smallest finalist with at least this validation score")
    which.add_argument("--min-ratio", type=float, metavar="R", help="the best finalist with at least this compression ratio")
    export.add_argument(
        "--format", choices=("plan", "onnx", "pt2"), default="plan",
        help="plan and weights for ranksearch.load_model, ONNX, or an archive of torch.export (plan)",
    )  # fmt: skip
    export.add_argument("--opset", type=int, metavar="N", help="ONNX operator set, for --format onnx (the exporter's default)")
    export.add_argument(
        "--merge", action="store_true", help="put dense layers back where they are faster than their factors: the same outputs"
    )
    export.add_argument("--device", metavar="DEVICE", help="where --merge times the layers, as of `ranksearch study` (auto)")
    export.add_argument(
        "--to", type=Path, metavar="PATH", help="where to write (DIR/export/TRIAL or TRIAL-merged, with the format's ending)"
    )
    export.add_argument("--storage", metavar="URL", help="Optuna storage, if the study is not stored in its folder")
    export.set_defaults(run=_export)
    return parser


def _add_option(parser: argparse.ArgumentParser, name: str, *owners: type[Any], note: str = "") -> None:
    """Add the option for a setting; its value is None if it is not given. Its help shows `note` instead of the default."""
    entry, kind = fields(owners[0])[name], kind_of(owners[0], name)
    metavar = METAVARS.get(name) or {int: "N", float: "X"}.get(kind) or name.upper()
    words = [("on Ray: " if owner is Ray else "") + plain_help(fields(owner)[name]) for owner in owners]
    note = note or ("" if entry.default is None else str(entry.default))
    text = "; ".join(words) + (f" ({note})" if note else "")
    parser.add_argument(option_of(name), type=kind, metavar=metavar, help=text.replace("%", "%%"))


def _overrides(parser: argparse.ArgumentParser) -> None:
    _add_option(parser, "seed", StudySpec, note="seed")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a key"
    )


def _all_overrides(options: argparse.Namespace) -> list[str]:
    flags = {"seed": "seed", "trials": "search.trials", "minutes": "search.minutes"}
    values = ((key, getattr(options, flag, None)) for flag, key in flags.items())
    return [*options.overrides, *(f"{key}={value}" for key, value in values if value is not None)]


def _study(options: argparse.Namespace, argv: list[str]) -> int:
    from ranksearch.study_file import load_spec

    spec = load_spec(options.source, overrides=_all_overrides(options))
    out = options.out or Path("runs") / spec.name
    # OpenMP reads this when torch loads. With it threads sleep at a barrier instead of spinning. That costs nothing on a quiet
    # machine; without it, one other process makes the training of the dense net three times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import optuna

    from ranksearch import console as views
    from ranksearch.report import summary
    from ranksearch.study.study import Stopped, run_study

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    screen = _screen()
    view = views.Terminal(screen) if screen.is_terminal else views.Lines(screen)
    command = _command_text(argv, options.storage)
    engine_options = {name: value for name in ENGINE_OPTIONS if (value := getattr(options, name)) is not None}
    run = Options(engine_of(options.engine, engine_options), options.storage, options.fresh, command)
    try:
        record = run_study(spec, out, run, view=view)
    except KeyboardInterrupt as stop:
        # `Stopped`: the study has begun and --fresh has deleted the old one, so the command to resume omits --fresh. A plain
        # KeyboardInterrupt comes before that, so the same command serves.
        if isinstance(stop, Stopped):
            argv = [word for word in argv if word != "--fresh"]
            if stop.record:
                screen.print(views.front_table(stop.record.shown, stop.record.facts, title="the front so far"))
        screen.out(f"\nStopped. Resume with:  {_command_text(argv, options.storage)}", highlight=False)
        return INTERRUPTED
    screen.print(views.front_table(record.shown, record.facts, title="the front"))
    for note in filter(None, [summary.headline(record), summary.against_controls(record), *record.notes]):
        screen.out(note, highlight=False)
    screen.out(views.next_steps(out, record, _storage_option(options.storage)), highlight=False)
    return 0


def _init(options: argparse.Namespace, argv: list[str]) -> int:
    from ranksearch.study.template import write_study
    from ranksearch.study_file import parse_arguments

    arguments = parse_arguments(options.model_args)
    path = write_study(options.model, arguments, options.example, options.to, _command_text(argv, None))
    sys.stdout.write(f"{path}\nName your data and weights in it, then run:  ranksearch study {_quoted(str(path))}\n")
    return 0


def _studies(options: argparse.Namespace, argv: list[str]) -> int:
    from rich.table import Table

    from ranksearch.study_file import builtin_studies, load_spec

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("study")
    table.add_column("what it is")
    for name in builtin_studies():
        table.add_row(name, load_spec(name).about)
    _screen().print(table)
    return 0


def _layers(options: argparse.Namespace, argv: list[str]) -> int:
    from ranksearch import console as views
    from ranksearch.study.facts import look
    from ranksearch.study_file import load_spec

    spec = load_spec(options.source, overrides=_all_overrides(options))
    layers = look(spec, options.out or Path("runs") / spec.name)
    screen = _screen()
    screen.print(views.layers_table(layers))
    screen.out(views.layers_summary(layers), highlight=False)
    return 0


def _storage_option(storage: str | None) -> str:
    """The option --storage, without the password; empty for the storage in the folder."""
    from ranksearch.study.database import masked

    return f" --storage {shlex.quote(masked(storage))}" if storage else ""


def _command_text(argv: Sequence[str], storage: str | None) -> str:
    """The command line for display and for the record, without the storage's password."""
    from ranksearch.study.database import masked

    words = (word.replace(storage, masked(storage)) if storage else word for word in argv)
    return " ".join(["ranksearch", *map(_quoted, words)])


def _quoted(word: str) -> str:
    """Quote a word for the shell; argv with TOML quotes stay readable: "dense.weights='mine.pt'"."""
    return f'"{word}"' if "'" in word and not set(word) & set('"$`\\!\n') else shlex.quote(word)


def _screen() -> Console:
    """The standard output as a rich console; 180 columns wide if it is not a terminal."""
    from rich.console import Console

    screen = Console()
    return screen if screen.is_terminal else Console(width=180)


def _report(options: argparse.Namespace, argv: list[str]) -> int:
    from ranksearch.report import write_report
    from ranksearch.results.attributes import read_study

    sys.stdout.write(f"{write_report(read_study(_open_study(options)), options.folder)}\n")
    return 0


def _export(options: argparse.Namespace, argv: list[str]) -> int:
    if options.opset is not None and options.format != "onnx":
        raise StudyError(f"--opset is for --format onnx, but the format is {options.format}; leave one of them out.")
    if options.device and not options.merge:
        raise StudyError("--device is for --merge, which times the layers, but --merge was not given; leave --device out.")
    from ranksearch.results.attributes import read_study
    from ranksearch.results.choosing import choose
    from ranksearch.study import folder

    record = read_study(_open_study(options))
    trial = choose(
        record.trials, record.facts.objectives, dense_score=record.facts.dense.score_validation, number=options.trial,
        within=options.within, min_score=options.min_score, min_ratio=options.min_ratio, limits=record.facts.limits,
    )  # fmt: skip
    spec = folder.read_spec(options.folder)

    from ranksearch.compress.export import export_model
    from ranksearch.compress.saved import load_model, read_plan
    from ranksearch.data import batches
    from ranksearch.spec import FROM_PYTHON
    from ranksearch.study.checking import choose_device
    from ranksearch.study.merging import Merged, merge_faster
    from ranksearch.support.batch import batch_size
    from ranksearch.task.task import load_task

    if spec.task.model == FROM_PYTHON:
        raise StudyError(
            "This study was run from Python, so only Python has its dense model; there use ranksearch.load_model, and "
            "ranksearch.export_model for ONNX."
        )
    task = load_task(spec)
    kept = options.folder / "models" / str(trial.number)
    model = load_model(task.model, kept)
    inputs = next(batches(task.data.validation, 64))[0]
    found = Merged(model, read_plan(kept), trial)
    if options.merge:
        found = merge_faster(spec, task, trial, found, choose_device(options.device or "auto"))
    suffix = ("-merged" if options.merge else "") + ("" if options.format == "plan" else f".{options.format}")
    target = options.to or options.folder / "export" / f"{trial.number}{suffix}"
    with writing(f"The export to {target}", "choose another --to"):
        difference = export_model(
            found.model, task.model, found.plan, inputs, target, form=options.format, opset=options.opset, original=model
        )
    limits = record.facts.limits
    outside = f", outside the study's limits ({limits})" if limits.excess(found.size, trial.score_validation) else ""
    words = (
        f"trial {trial.number}, {found.size.ratio:.1f}x smaller than dense{outside}; largest difference of outputs on "
        f"{batch_size(inputs)} real inputs after reloading: {difference:.1e}"
    )
    sys.stdout.write("".join(f"{line}\n" for line in (target, found.words, words) if line))
    return 0


def _open_study(options: argparse.Namespace) -> optuna.Study:
    """The Optuna study of a folder that `ranksearch study` made."""
    from ranksearch.study import folder

    spec = folder.read_spec(options.folder)
    noted = folder.storage_in_spec(options.folder)
    if noted and not options.storage and not (options.folder / folder.DATABASE).exists():
        raise StudyError(f"The record of the study in {options.folder} is in {noted}; give --storage {noted}.")
    url = folder.storage_url(options.folder, options.storage)
    return folder.open_study(spec.name, url, announce=_announce)


def _announce(text: str) -> None:
    sys.stderr.write(f"ranksearch: {text}\n")
