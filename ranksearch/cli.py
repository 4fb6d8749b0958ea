"""The command line: parse, call, print, exit code. `--help`, `studies` and `report` never import torch."""

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
FULL = (errno.ENOSPC, errno.EDQUOT)
METAVARS = {"address": "HOST:PORT", "storage": "URL"}
ENGINE_OPTIONS = tuple(dict.fromkeys(name for engine in ENGINES.values() for name in fields(engine)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. 0: done; 2: bad input, one sentence on stderr; 130: Ctrl-C. A bug is a traceback."""
    _escape_what_streams_lack()
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    # Torch and a long record are a million objects that stay, which Python would search for garbage again and again: that took
    # half of the time in which 5,000 trials are read.
    gc.set_threshold(50_000, 20, 50)
    # A user's `package.module:name` is looked for in the folder the command runs in, as `python -m` does.
    sys.path.insert(0, str(Path.cwd()))
    try:
        done = int(options.run(options, given) or 0)
        sys.stdout.flush()  # here, where a full disk or a reader that is gone is answered
        return done
    except RankSearchError as error:
        sys.stderr.write(f"ranksearch: {error}\n")
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away (`| head`): nothing is left to say, nor a place to say it.
        _close_output()
        return 1
    except OSError as error:
        if error.errno not in FULL:
            raise
        _close_output()  # it may be what has no room: what it still holds would fail again at exit
        where = f" ({error.filename})" if error.filename else ""
        with suppress(OSError):
            sys.stderr.write(f"ranksearch: The disk is full{where}: {error.strerror}; {RESUME_HINT}.\n")
        return 2


def _close_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _escape_what_streams_lack() -> None:
    """A character that an output lacks is written as its code: a name must not end a finished study in a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class _Parser(argparse.ArgumentParser):
    """Takes whole options only: a command that is shown again must say what it does."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ranksearch",
        description="Finds, layer by layer, the tensor decomposition and rank that make a trained CNN many times smaller.",
    )
    parser.add_argument("--version", action="version", version=f"ranksearch {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    study = commands.add_parser("study", help="run a study, or go on with it", description="Run a study, or go on with it.")
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
        "report", help="make a study's report again", description="Make a study's report again, from its storage."
    )
    report.add_argument("folder", type=Path, metavar="DIR")
    report.add_argument("--storage", metavar="URL", help="Optuna storage, if it is not the folder's own")
    report.set_defaults(run=_report)

    export = commands.add_parser(
        "export",
        help="take a model of the front home",
        description="Write a finalist as plan and weights, ONNX or torch.export; reload it and compare its outputs.",
    )
    export.add_argument("folder", type=Path, metavar="DIR")
    which = export.add_mutually_exclusive_group(required=True)
    which.add_argument("--trial", type=int, metavar="N", help="the finalist of that trial number")
    which.add_argument("--knee", action="store_true", help="the elbow of the front")
    which.add_argument("--min-score", type=float, metavar="S", help="the smallest with at least this validation score")
    which.add_argument("--min-ratio", type=float, metavar="R", help="the best with at least this compression ratio")
    export.add_argument("--format", choices=("plan", "onnx", "pt2"), default="plan")
    export.add_argument("--opset", type=int, metavar="N", help="ONNX operator set, for --format onnx (the exporter's default)")
    export.add_argument(
        "--merge", action="store_true", help="put dense layers back where they are faster than their factors: the same outputs"
    )
    export.add_argument("--device", metavar="DEVICE", help="where --merge times the layers, as of `ranksearch study` (auto)")
    export.add_argument(
        "--to", type=Path, metavar="PATH", help="where to write (DIR/export/TRIAL or TRIAL-merged, with the format's ending)"
    )
    export.add_argument("--storage", metavar="URL", help="Optuna storage, if it is not the folder's own")
    export.set_defaults(run=_export)
    return parser


def _add_option(parser: argparse.ArgumentParser, name: str, *owners: type[Any], note: str = "") -> None:
    """An option for a setting, None where it is not given; `note` is told instead of the default."""
    entry, kind = fields(owners[0])[name], kind_of(owners[0], name)
    metavar = METAVARS.get(name) or {int: "N", float: "X"}.get(kind) or name.upper()
    words = [("on Ray: " if owner is Ray else "") + plain_help(fields(owner)[name]) for owner in owners]
    note = note or ("" if entry.default is None else str(entry.default))
    told = "; ".join(words) + (f" ({note})" if note else "")
    parser.add_argument(option_of(name), type=kind, metavar=metavar, help=told.replace("%", "%%"))


def _overrides(parser: argparse.ArgumentParser) -> None:
    _add_option(parser, "seed", StudySpec, note="seed")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a key"
    )


def _all_overrides(options: argparse.Namespace) -> list[str]:
    flags = {"seed": "seed", "trials": "search.trials", "minutes": "search.minutes"}
    given = ((key, getattr(options, flag, None)) for flag, key in flags.items())
    return [*options.overrides, *(f"{key}={value}" for key, value in given if value is not None)]


def _study(options: argparse.Namespace, given: list[str]) -> int:
    from ranksearch.spec import load_spec

    spec = load_spec(options.source, overrides=_all_overrides(options))
    out = options.out or Path("runs") / spec.name
    # Read by OpenMP when torch loads. Threads that sleep at a barrier instead of spinning cost nothing on a quiet machine,
    # and keep the training of the dense net from slowing down threefold when one other process runs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import optuna

    from ranksearch import console as views
    from ranksearch.study.study import Stopped, run_study

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    screen = _screen()
    view = views.Terminal(screen) if screen.is_terminal else views.Plain(screen)
    command = _shown(given, options.storage)
    given_to_engine = {name: value for name in ENGINE_OPTIONS if (value := getattr(options, name)) is not None}
    run = Options(engine_of(options.engine, given_to_engine), options.storage, options.fresh, command)
    try:
        found = run_study(spec, out, run, view=view)
    except KeyboardInterrupt as stop:
        # Before what --fresh deletes is gone it is a plain one, and the same command does so.
        if isinstance(stop, Stopped):
            given = [word for word in given if word != "--fresh"]
            if stop.record:
                screen.print(views.front_table(stop.record.shown, stop.record.facts, title="the front so far"))
        screen.out(f"\nStopped. Go on with:  {_shown(given, options.storage)}", highlight=False)
        return INTERRUPTED
    screen.print(views.front_table(found.shown, found.facts, title="the front"))
    for note in found.notes:
        screen.out(note, highlight=False)
    screen.out(views.final_words(out, found, _storage_option(options.storage)), highlight=False)
    return 0


def _studies(options: argparse.Namespace, given: list[str]) -> int:
    from rich.table import Table

    from ranksearch.spec import builtin_studies, load_spec

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("study")
    table.add_column("what it is")
    for name in builtin_studies():
        table.add_row(name, load_spec(name).about)
    _screen().print(table)
    return 0


def _layers(options: argparse.Namespace, given: list[str]) -> int:
    from ranksearch import console as views
    from ranksearch.spec import load_spec
    from ranksearch.study.facts import look

    spec = load_spec(options.source, overrides=_all_overrides(options))
    found = look(spec, options.out or Path("runs") / spec.name)
    screen = _screen()
    screen.print(views.layers_table(found))
    screen.out(views.layers_words(found), highlight=False)
    return 0


def _storage_option(storage: str | None) -> str:
    """The option that names a storage, without its password; empty where it is the folder's own."""
    from ranksearch.study.database import masked

    return f" --storage {shlex.quote(masked(storage))}" if storage else ""


def _shown(given: Sequence[str], storage: str | None) -> str:
    """A command as it may be shown and kept: without the storage's password."""
    from ranksearch.study.database import masked

    words = (word.replace(storage, masked(storage)) if storage else word for word in given)
    return " ".join(["ranksearch", *map(_quoted, words)])


def _quoted(word: str) -> str:
    """A word for the shell, readable where it holds TOML's quotes: "dense.weights='mine.pt'"."""
    return f'"{word}"' if "'" in word and not set(word) & set('"$`\\!\n') else shlex.quote(word)


def _screen() -> Console:
    """The standard output; wide off a terminal, where nothing else tells how long a line may be."""
    from rich.console import Console

    screen = Console()
    return screen if screen.is_terminal else Console(width=180)


def _report(options: argparse.Namespace, given: list[str]) -> int:
    from ranksearch.report import write_report
    from ranksearch.results.attributes import read_study

    sys.stdout.write(f"{write_report(read_study(_stored(options)), options.folder)}\n")
    return 0


def _export(options: argparse.Namespace, given: list[str]) -> int:
    if options.opset is not None and options.format != "onnx":
        raise StudyError(f"--opset is for --format onnx, but the format is {options.format}; leave one of them out.")
    if options.device and not options.merge:
        raise StudyError("--device is for --merge, which times the layers, but --merge was not given; leave --device out.")
    from ranksearch.results.attributes import read_study
    from ranksearch.results.record import choose
    from ranksearch.study import folder

    record = read_study(_stored(options))
    trial = choose(
        record.trials, record.facts.objectives, number=options.trial, min_score=options.min_score, min_ratio=options.min_ratio,
        limits=record.facts.limits,
    )  # fmt: skip
    spec = folder.read_spec(options.folder)

    from ranksearch.compress.export import export_model, load_model
    from ranksearch.data import batches
    from ranksearch.study.merging import Merged, merge_faster
    from ranksearch.study.run import choose_device
    from ranksearch.task.task import FROM_PYTHON, load_task

    if spec.task.model == FROM_PYTHON:
        raise StudyError("This study was made from Python, which alone has the dense model; use ranksearch.load_model there.")
    task = load_task(spec)
    model = load_model(task.model, options.folder / "models" / str(trial.number))
    inputs = next(batches(task.data.validation, 64))[0]
    found = Merged(model, trial.plan, trial)
    if options.merge:
        found = merge_faster(spec, task, trial, model, choose_device(options.device or "auto"))
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
        f"{len(inputs)} real inputs after reloading: {difference:.1e}"
    )
    sys.stdout.write("".join(f"{line}\n" for line in (target, found.words, words) if line))
    return 0


def _stored(options: argparse.Namespace) -> optuna.Study:
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
