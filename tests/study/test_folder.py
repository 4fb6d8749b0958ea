"""A study's folder and storage: other programs' are left alone, and a study resumes only in its own."""

from __future__ import annotations

import re
from dataclasses import replace

import optuna
import pytest
from sqlalchemy.exc import OperationalError

from ranksearch.errors import SpecError, StudyError
from ranksearch.results.objectives import Objectives
from ranksearch.study import database, folder
from ranksearch.study.database import check_storage, study_lock
from ranksearch.study.options import Local, Options
from ranksearch.study.study import run_study
from tests.conftest import essence, least_spec, refuse

pytestmark = pytest.mark.usefixtures("bare")


def test_folders_may_share_a_storage_but_not_a_study(tmp_path):
    options = Options(Local(0), storage=f"sqlite:///{tmp_path / 'shared.db'}")
    run_study(least_spec(), tmp_path / "a", options)
    with pytest.raises(
        StudyError, match=r"The storage's study 'small' is another study \(finetune.epochs is 1 there and 2 here\)"
    ):
        run_study(least_spec("finetune.epochs=2"), tmp_path / "b", options)
    assert not (tmp_path / "b").exists()


def foreign(url, *, directions):
    """Make a study of another program with the same name."""
    study = optuna.create_study(study_name="small", storage=url, directions=directions)
    if "maximize" in directions:  # other directions suffice to tell the study from ours
        study.optimize(lambda trial: [trial.suggest_float("x", 0, 1)] * len(directions), n_trials=2)


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("directions", [["minimize"], ["maximize", "maximize"], ["minimize", "minimize"]])
def test_a_study_of_another_program_is_left_alone(tmp_path, directions, fresh):
    url, out = f"sqlite:///{tmp_path / 'theirs.db'}", tmp_path / "small"
    foreign(url, directions=directions)
    with pytest.raises(
        StudyError,
        match="The storage's study 'small' must belong to ranksearch, but belongs to another program; choose another name",
    ):
        run_study(least_spec(), out, Options(Local(0), storage=url, fresh=fresh))
    theirs = optuna.load_study(study_name="small", storage=url)
    assert len(theirs.trials) == 2 * ("maximize" in directions)
    assert theirs.user_attrs == {}
    assert not out.exists()


def test_a_refused_run_leaves_nothing_in_its_storage(tmp_path):
    options = Options(Local(0), storage=f"sqlite:///{tmp_path / 'shared.db'}")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StudyError, match="The output must be a folder"):
        run_study(least_spec(), tmp_path / "file", options)
    run_study(least_spec("finetune.epochs=2"), tmp_path / "small", options)


@pytest.mark.slow
def test_a_study_goes_on_where_its_record_is(tmp_path):
    out, spec = tmp_path / "small", least_spec()
    elsewhere, other = (Options(Local(0), storage=f"sqlite:///{tmp_path / name}.db") for name in ("one", "other"))
    before = run_study(spec, out, elsewhere)
    fix = rf"must continue in its storage, sqlite:///{tmp_path}/one.db, but {{}} does not hold it; give --storage "
    with pytest.raises(StudyError, match=fix.format("the folder's own")):
        run_study(spec, out, Options(Local(0)))
    with pytest.raises(StudyError, match=fix.format(other.storage)):
        run_study(spec, out, other)
    assert essence(run_study(spec, out, elsewhere).trials) == essence(before.trials)
    optuna.copy_study(from_study_name="small", from_storage=elsewhere.storage, to_storage=other.storage)
    assert essence(run_study(spec, out, other).trials) == essence(before.trials)
    run_study(spec, out, replace(other, storage=None, fresh=True))
    with pytest.raises(
        StudyError,
        match=r"must continue in its storage, the folder's own, but sqlite.* does not hold it; leave out --storage, or",
    ):
        run_study(spec, out, Options(Local(0), storage=f"sqlite:///{tmp_path / 'third'}.db"))


@pytest.mark.slow
def test_a_storage_is_the_same_only_from_the_same_folder(tmp_path, monkeypatch):
    spec, options = least_spec(), Options(Local(0), storage="sqlite:///mine.db")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "one")
    run_study(spec, tmp_path / "small", options)
    run_study(spec, tmp_path / "small", options)
    monkeypatch.chdir(tmp_path / "two")
    with pytest.raises(StudyError, match=rf"must continue in its storage, sqlite:///{tmp_path}/one/mine.db, but"):
        run_study(spec, tmp_path / "small", options)


@pytest.mark.slow
def test_fresh_starts_over_whatever_the_folder_says(tmp_path):
    out, spec = tmp_path / "small", least_spec()
    run_study(spec, out, Options(Local(0)))
    older = (out / "spec.toml").read_text().replace("[search]", "[search]\nhalving = true")
    (out / "spec.toml").write_text(older)
    with pytest.raises(
        SpecError, match=r"search.halving is not a key of a study.*by another release; choose another --out, or --fresh"
    ):
        run_study(spec, out, Options(Local(0)))
    assert (out / "spec.toml").read_text() == older
    assert run_study(spec, out, Options(Local(0), fresh=True)).trials


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attributes", "elsewhere"),
    [
        ({"ranksearch:identity": {}}, False),
        ({folder.IDENTITY: {"format": folder.RECORD_FORMAT + 1}}, False),
        ({folder.IDENTITY: {"format": folder.RECORD_FORMAT + 1}}, True),
        ({folder.IDENTITY: {"identity": {}}}, True),
    ],
)
def test_a_record_of_another_release_is_refused_until_it_is_started_over(tmp_path, capsys, attributes, elsewhere):
    out, spec = tmp_path / "small", least_spec()
    options = Options(Local(0), storage=f"sqlite:///{tmp_path / 'shared.db'}" if elsewhere else None)
    url = folder.storage_url(out, options.storage)
    out.mkdir()
    folder.write_spec(out, spec, options.storage)
    study = folder.create_study(spec.name, url, Objectives())
    for name, value in attributes.items():
        study.set_user_attr(name, value)
    before = {path for path in tmp_path.rglob("*") if path.name != ".lock"}
    words = (
        "The storage's study 'small' must have a format that this release of ranksearch reads, but another release wrote it; "
    )
    with pytest.raises(StudyError, match=f"^{words}choose another --out or name, or --fresh to start over.$"):
        run_study(spec, out, options)
    for command in (["report"], ["export", "--knee"]):
        told = refuse(capsys, command[0], out, *command[1:], *(["--storage", url] if elsewhere else []))
        assert told == f"{words}use that release, or start over by `ranksearch study` with --fresh."
    assert before <= {path for path in tmp_path.rglob("*") if path.name != ".lock"}
    assert run_study(spec, out, replace(options, fresh=True)).trials


def test_a_spec_of_another_release_is_refused_by_every_command(copied, capsys):
    path = copied / "spec.toml"
    path.write_text(path.read_text().replace("[search]", "[search]\nnewer = true"))
    for command in (["report", copied], ["export", copied, "--knee"]):
        assert refuse(capsys, *command).startswith(f"{path}: search.newer is not a key of a study.")
        assert refuse(capsys, *command).endswith(
            "The file is damaged or was written by another release; use that release, or start over by `ranksearch study` with --fresh."
        )


@pytest.mark.slow
def test_one_run_at_a_time_holds_a_study_of_a_shared_storage(tmp_path):
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    words = rf"Only one run at a time may use a study, but 'small' in {url} is in use; wait for that run, give it more --workers, or"
    out, spec = tmp_path / "small", least_spec()
    run_study(spec, out, Options(Local(0), storage=url))
    kept = sorted(out.iterdir())
    for fresh in (False, True):
        with study_lock("small", url), study_lock("other", url), pytest.raises(StudyError, match=words):
            run_study(spec, out, Options(Local(0), storage=url, fresh=fresh))
        assert sorted(out.iterdir()) == kept
    run_study(spec, out, Options(Local(0), storage=url, fresh=True))


def test_the_folders_own_study_is_held_by_whatever_name_it_goes(tmp_path):
    out, spec = tmp_path / "small", least_spec()
    run_study(spec, out, Options(Local(0)))
    (tmp_path / "link.db").symlink_to(out / "study.db")
    for path in (out / "study.db", tmp_path / "link.db"):
        with study_lock("small", f"sqlite:///{path}"), pytest.raises(StudyError, match=r"'small' in sqlite.*is in use"):
            run_study(spec, out, Options(Local(0), fresh=True))
    assert (out / "study.db").exists()


def test_a_study_that_cannot_be_held_is_told(tmp_path):
    (tmp_path / ".shared.db.small.lock").mkdir()
    with (
        pytest.raises(StudyError, match=r"The storage sqlite:.*shared.db cannot be used: .*Is a directory"),
        study_lock("small", f"sqlite:///{tmp_path / 'shared.db'}"),
    ):
        pass


@pytest.mark.parametrize(
    "told",
    [
        "table studies already exists",
        'duplicate key value violates unique constraint "pg_type_typname_nsp_index"\nDETAIL:  Key (typname, typnamespace)='
        "(studies, 2200) already exists.",
    ],
)
def test_a_storage_whose_tables_another_run_makes_is_tried_again(tmp_path, monkeypatch, told):
    connected, left = database._connect, [1, 1]

    def racing(*arguments):
        if left:
            left.pop()
            raise OperationalError("CREATE TABLE studies", {}, Exception(told))
        return connected(*arguments)

    monkeypatch.setattr(database, "_connect", racing)
    monkeypatch.setattr(database.time, "sleep", lambda seconds: None)
    assert check_storage(f"sqlite:///{tmp_path / 'new.db'}")
    left += [1] * database.OPEN_ATTEMPTS
    with pytest.raises(StudyError, match=re.escape(f"cannot be used: {told.splitlines()[0]}; check its address")):
        check_storage(f"sqlite:///{tmp_path / 'new.db'}")
