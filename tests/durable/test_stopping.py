"""Signals to a real process: what a stop request does, when, and with what exit status."""

import signal
import subprocess
import sys
import time

import pytest

PROGRAM = """
import sys, time
from rlpost.durable.stopping import Stopped, StopRequest

def run(deadline_s, boundaries, seconds):
    with StopRequest(deadline_s, lambda text: print(text, flush=True)) as stop:
        if boundaries:
            stop.wait_for_boundaries()
        print("ready", flush=True)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.02)
        stop.raise_if_requested()
        print("not asked", flush=True)

try:
    run({deadline_s}, {boundaries}, {seconds})
except Stopped as stopped:
    print("stopped at once" if stopped.at_once else "stopped at a boundary", flush=True)
    sys.exit(stopped.exit_code)
"""


def ask(*numbers, deadline_s=5.0, boundaries=True, seconds=0.6):
    code = PROGRAM.format(deadline_s=deadline_s, boundaries=boundaries, seconds=seconds)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.1)
    output, errors = process.communicate(timeout=30)
    return process.returncode, output, errors


@pytest.mark.parametrize("number, word", [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_a_request_waits_for_a_boundary(number, word):
    status, output, _ = ask(number)
    assert status == 128 + number and f"{word}: saving, within 5 s" in output
    assert output.endswith("stopped at a boundary\n")


def test_a_second_ctrl_c_ends_at_once_and_a_second_sigterm_does_not():
    assert ask(signal.SIGINT, signal.SIGINT, seconds=20)[:2] == (
        130,
        "Ctrl-C: saving, within 5 s, then the run ends; press Ctrl-C again to exit immediately\nstopped at once\n",
    )
    assert ask(signal.SIGTERM, signal.SIGTERM)[1].endswith("stopped at a boundary\n")


def test_the_deadline_ends_a_process_that_does_not_reach_a_boundary():
    started = time.monotonic()
    status, output, errors = ask(signal.SIGTERM, deadline_s=0.3, seconds=30)
    assert status == 143 and time.monotonic() - started < 20
    assert "not saved within 0.3 s of SIGTERM" in errors and "the last checkpoint remains" in errors
    assert "stopped" not in output


def test_where_nothing_can_be_saved_yet_it_ends_at_once():
    status, output, _ = ask(signal.SIGTERM, boundaries=False, seconds=20)
    assert (status, output) == (143, "stopped at once\n")


def test_a_reader_that_went_away_with_the_same_signal_changes_nothing():
    """Ctrl-C ends a whole pipe, the reader first: the request counts all the same, and so does its deadline."""
    code = PROGRAM.format(deadline_s=5.0, boundaries=True, seconds=0.6)
    code = code.replace('print("stopped at once" if stopped.at_once else "stopped at a boundary", flush=True)', "pass")
    code = code.replace("lambda text: print(text, flush=True)", "say").replace("def run(", SAY + "def run(", 1)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130


SAY = """
def say(text):
    import os
    os.write(1, text.encode())

"""


def test_a_run_that_ends_in_time_is_not_ended_by_its_deadline():
    code = PROGRAM.format(deadline_s=0.8, boundaries=True, seconds=0.3)
    code = code.replace("    sys.exit(stopped.exit_code)", "    time.sleep(1.2)\n    sys.exit(5)")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 5


def test_afterwards_the_handlers_are_what_they_were():
    from rlpost.durable.stopping import SIGNALS, StopRequest

    before = [signal.getsignal(number) for number in SIGNALS]
    with StopRequest(1.0, print):
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
