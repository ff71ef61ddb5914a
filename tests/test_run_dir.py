"""Which directory a run gets, and who may use it."""

import subprocess
import sys

import pytest

from rlpost.errors import RunError
from rlpost.run_dir import finish, open_run_dir


def test_a_new_name_is_taken_as_it_is(tmp_path):
    run = open_run_dir(str(tmp_path), "a", resume="auto")
    assert run.path == tmp_path / "a" and run.note == ""


def test_an_unfinished_run_goes_on_and_a_finished_one_makes_room(tmp_path):
    first = open_run_dir(str(tmp_path), "a", resume="auto")
    (first.path / "checkpoints").mkdir()
    first.lock.close()
    again = open_run_dir(str(tmp_path), "a", resume="auto")
    assert again.path == first.path and "going on with the unfinished run" in again.note
    finish(again.path, {"steps": 1})
    again.lock.close()
    second = open_run_dir(str(tmp_path), "a", resume="auto")
    assert second.path == tmp_path / "a-2" and "a is taken; this one is a-2" in second.note
    second.lock.close()
    assert open_run_dir(str(tmp_path), "a", resume="never").path == tmp_path / "a-3"


def test_a_directory_in_use_is_refused_with_the_process_that_holds_it(tmp_path):
    code = (
        "import sys, time; from rlpost.run_dir import open_run_dir; "
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
