"""Which directory a run gets, and who may use it."""

import subprocess
import sys

import pytest

from rlpost.durable import checkpoint, run_dir
from rlpost.durable.run_dir import finish, note_going_back, peek
from rlpost.errors import ConfigError, RunError


def open_run_dir(runs_dir, name, *, resume):
    """The real one; a look beforehand must name the same run and create nothing."""
    path, start_from = peek(runs_dir, name, resume=resume)
    before = sorted(path.parent.rglob("*")) if path.parent.is_dir() else []
    assert path.exists() == (path in before)
    run = run_dir.open_run_dir(runs_dir, name, resume=resume)
    assert (run.path, run.start_from) == (path, start_from)
    return run


def make_checkpoint(run, step):
    parts = {"x": lambda file: file.write_text("x")}
    return checkpoint.save(run / checkpoint.FOLDER, checkpoint.Name(step), parts)


def test_a_new_name_is_taken_as_it_is(tmp_path):
    run = open_run_dir(str(tmp_path), "a", resume="auto")
    assert run.path == tmp_path / "a" and run.note == ""


def test_an_unfinished_run_goes_on_and_a_finished_one_makes_room(tmp_path):
    first = open_run_dir(str(tmp_path), "a", resume="auto")
    make_checkpoint(first.path, 2)
    first.lock.close()
    again = open_run_dir(str(tmp_path), "a", resume="auto")
    assert again.path == first.path and "resuming the unfinished run" in again.note
    finish(again.path, {"steps": 1})
    again.lock.close()
    second = open_run_dir(str(tmp_path), "a", resume="auto")
    assert second.path == tmp_path / "a-2" and "a is taken; this one is a-2" in second.note
    second.lock.close()
    assert open_run_dir(str(tmp_path), "a", resume="never").path == tmp_path / "a-3"


def test_a_directory_in_use_is_refused_with_the_process_that_holds_it(tmp_path):
    code = (
        "import sys, time; from rlpost.durable.run_dir import open_run_dir; "
        f"run = open_run_dir({str(tmp_path)!r}, 'a', resume='auto'); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=f"wait for process {holder.pid}"):
            open_run_dir(str(tmp_path), "a", resume="auto")
    finally:
        holder.kill()
        holder.wait()
    assert open_run_dir(str(tmp_path), "a", resume="auto").note == "", "the lock goes with its process"


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="may write"):
        open_run_dir(str(tmp_path / "file"), "a", resume="auto")


def test_a_named_checkpoint_of_the_run_itself_is_gone_back_to_once(tmp_path):
    """The same command, given again after a kill, goes on; given again to a finished run it goes back again."""
    run = open_run_dir(str(tmp_path), "a", resume="auto")
    older, _ = make_checkpoint(run.path, 2), make_checkpoint(run.path, 4)
    finish(run.path, {"steps": 4})
    run.lock.close()

    def open_again():
        again = open_run_dir(str(tmp_path), "a", resume=str(older))
        again.lock.close()
        assert again.path == run.path
        return again

    assert open_again().start_from == older.resolve() and (run.path / "finished.json").exists(), "nothing changed yet"
    note_going_back(run.path, older)
    assert not (run.path / "finished.json").exists(), "it is not finished any more"
    assert open_again().start_from is None and "resuming the unfinished run" in open_again().note
    finish(run.path, {"steps": 4})
    assert open_again().start_from == older.resolve()


def test_a_checkpoint_of_a_numbered_run_is_that_runs_own(tmp_path):
    first = open_run_dir(str(tmp_path), "a", resume="auto")
    finish(first.path, {"steps": 1})
    second = open_run_dir(str(tmp_path), "a", resume="auto")
    older, _ = make_checkpoint(second.path, 2), make_checkpoint(second.path, 4)
    second.lock.close()
    again = open_run_dir(str(tmp_path), "a", resume=str(older))
    assert again.path == second.path and again.start_from == older.resolve()


def test_another_runs_checkpoint_is_where_a_new_one_begins_until_it_has_its_own(tmp_path):
    other = open_run_dir(str(tmp_path), "other", resume="auto")
    make_checkpoint(other.path, 2)
    newest = make_checkpoint(other.path, 4)
    run = open_run_dir(str(tmp_path), "a", resume=str(other.path))
    assert run.path == tmp_path / "a" and run.start_from == newest.resolve()
    make_checkpoint(run.path, 6)
    run.lock.close()
    again = open_run_dir(str(tmp_path), "a", resume=str(other.path))
    assert again.start_from is None and "resuming the unfinished run" in again.note


def test_resume_must_name_something(tmp_path):
    (tmp_path / "empty").mkdir()
    for path, what in (("empty", "a folder without checkpoints"), ("typo", "nothing there")):
        with pytest.raises(ConfigError, match=f"resume: .*{what}"):
            open_run_dir(str(tmp_path), "a", resume=str(tmp_path / path))
