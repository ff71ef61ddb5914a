"""Reward workers: real processes, real kills. Nothing hangs, nothing is lost, nothing stays behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rlpost.config import RewardConfig
from rlpost.errors import ConfigError
from rlpost.rewards.functions import load_functions
from rlpost.rewards.outcomes import Outcome
from rlpost.rewards.scoring import RewardScorer
from rlpost.rewards.worker_pool import InlineCalls, RewardWorkers, _read_outcome
from rlpost.types import Prompt

HERE = Path(__file__).parent
PATIENCE_S = 60  # for what must come at all, on a busy machine


def exists(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)


def children():
    """Living children of this process."""
    out = subprocess.run(["ps", "-o", "pid=,stat=", "--ppid", str(os.getpid())], capture_output=True, text=True).stdout
    rows = [line.split() for line in out.splitlines()]
    return {int(pid) for pid, state, *_ in rows if "Z" not in state} - {None}


@pytest.fixture
def start(monkeypatch):
    """Starts workers for a function of ``worker_rewards``; all are closed at the end, and none may stay."""
    monkeypatch.syspath_prepend(str(HERE))
    started = []

    def make(function="by_word", **settings):
        settings = {"workers": 1, "timeout_s": 20.0, **settings}
        workers = RewardWorkers(RewardConfig(function=f"worker_rewards.{function}", **settings))
        started.append(workers)
        workers.wait_ready()
        return workers

    before = children()
    yield make
    for workers in started:
        workers.close()
    assert not {pid for pid in children() - before if "rlpost.rewards.worker_main" in command_of(pid)}


def command_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode()
    except OSError:
        return ""


def worker_pids():
    return {pid for pid in children() if "rlpost.rewards.worker_main" in command_of(pid)}


class Desk:
    """A scorer whose token ids are the characters of the response."""

    def __init__(self, workers, folder=".", reference="r", **settings):
        self.scorer = RewardScorer(workers, lambda parts: "".join(map(chr, parts[0])), **settings)
        self.columns, self.reference, self.count = {"folder": str(folder)}, reference, 0

    def ask(self, *texts):
        for index, text in enumerate(texts):
            self.count += 1
            prompt = Prompt(
                uid=f"0:{self.count}",
                token_ids=np.zeros(1, np.int32),
                text="?",
                reference=self.reference,
                columns=self.columns,
            )
            self.scorer.submit(prompt, index, [np.array([ord(c) for c in text], np.int32)], "stop")

    def answers(self):
        """Every verdict, in the order of submission."""
        assert self.scorer.drain(PATIENCE_S), "verdicts are missing"
        verdicts = sorted(self.scorer.poll(), key=lambda v: (int(v.uid.split(":")[1]), v.index))
        assert self.scorer.num_pending == 0
        return verdicts

    def judge(self, *texts):
        self.ask(*texts)
        return self.answers()


# ---- verdicts and failures -----------------------------------------------------------------------------------------


def test_verdicts_come_back_whole_and_failures_are_named(start, tmp_path):
    desk = Desk(start(workers=2), tmp_path)
    texts = ["fine", "raise x", "refuse not today\nat all", "nan", "none", "half \ud800 pair"]
    fine, raised, refused, nan, none, half = desk.judge(*texts)
    assert (fine.reward, fine.failure) == (1.0, None) and half.reward == 1.0
    assert raised.failure == "reward_error: KeyError: 'x'"
    assert refused.failure == "no_judge: not today at all"
    assert nan.failure.startswith("reward_error: ValueError: a reward must be finite")
    assert none.failure == "none: no function of the reward gave a result"
    assert all(v.reward is None for v in (raised, refused, nan, none))


def test_a_large_response_passes_through_pipes_of_64_kib(start):
    desk = Desk(start("length", workers=2))
    assert [v.reward for v in desk.judge("x" * 3_000_000, "é" * 1_000_000)] == [3e6, 1e6]


def test_a_worker_imports_nothing_heavy(start):
    (verdict,) = Desk(start()).judge("modules")
    assert verdict.parts == {"heavy": 0.0}


def test_what_a_reward_prints_is_no_message(start, capfd):
    assert Desk(start()).judge("print", "fine")[0].reward == 1.0
    out, err = capfd.readouterr()
    assert "said by a reward" in err and not out


# ---- deadlines -----------------------------------------------------------------------------------------------------


def test_a_call_past_its_deadline_is_killed_and_others_go_on(start):
    workers = start(timeout_s=0.5)
    desk = Desk(workers)
    began = time.monotonic()
    late, *others = desk.judge("sleep 600", "fine", "fine")
    assert late.failure == "timeout: no result within 0.5 s" and [v.reward for v in others] == [1.0, 1.0]
    assert time.monotonic() - began < 30 and workers.take_replaced() == 1


def test_a_call_that_never_lets_go_of_the_interpreter_is_killed_too(start, tmp_path):
    """No Python signal handler and no thread in the worker could do that."""
    desk = Desk(start(timeout_s=0.5), tmp_path)
    late, other = desk.judge("hold_the_gil 10", "fine")
    assert late.failure.startswith("timeout") and other.reward == 1.0
    (marker,) = tmp_path.glob("holds-*")
    assert not exists(int(marker.name.removeprefix("holds-")))


def test_what_a_killed_call_had_started_dies_with_it_daemons_too(start, tmp_path):
    desk = Desk(start(timeout_s=2.0), tmp_path)
    desk.ask("daemon")
    wait_until(lambda: (tmp_path / "daemon").exists() and (tmp_path / "daemon").read_text())
    pid = int((tmp_path / "daemon").read_text())
    assert exists(pid)
    (verdict,) = desk.answers()
    assert verdict.failure.startswith("timeout")
    wait_until(lambda: not exists(pid))


def test_an_answer_that_takes_for_ever_to_compare_is_a_timeout():
    workers = RewardWorkers(RewardConfig(function="math", workers=1, timeout_s=5.0, memory_bytes=4 << 30))
    try:
        workers.wait_ready()
        endless, right = Desk(workers, reference="5").judge(r"\boxed{10^{10^{10}}}", r"\boxed{10/2}")
        assert endless.failure == "timeout: no result within 5 s" and right.reward == 1.0
    finally:
        workers.close()


def test_a_function_may_have_a_deadline_of_its_own(start, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(HERE))
    target = {"_target_": "worker_rewards.Closing", "folder": str(tmp_path)}
    workers = RewardWorkers(RewardConfig(function=target, workers=1, timeout_s=600.0))
    try:
        workers.wait_ready()
        assert workers.facts[0].timeout_s == 0.5
        assert Desk(workers).judge("9")[0].failure == "timeout: no result within 0.5 s"
    finally:
        workers.close()


# ---- crashes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("word", "how"), [("crash", "signal SIGKILL"), ("exit", "exit status 0")])
def test_a_crash_is_a_failure_of_that_call_only(start, word, how):
    workers = start(workers=2)
    verdicts = Desk(workers).judge("fine", word, "fine", "fine", "fine")
    assert [v.reward for v in verdicts] == [1.0, None, 1.0, 1.0, 1.0]
    assert verdicts[1].failure == f"crash: the reward's process ended during the call ({how})"
    assert workers.take_replaced() == 1


def test_a_call_that_failed_is_made_again_where_the_policy_says_so(start, tmp_path):
    workers = start(timeout_s=0.5)
    patient = Desk(workers, tmp_path, retries=1)
    once, late = patient.judge("once a", "sleep 600")
    assert once.reward == 1.0 and late.failure.startswith("timeout")
    counts = patient.scorer.take_counts()
    assert (counts.calls, counts.retried, counts.replaced_workers) == (4, 2, 2)
    assert Desk(workers, tmp_path).judge("once b")[0].failure.startswith("reward_error")


def test_an_idle_worker_that_is_killed_is_replaced(start):
    desk = Desk(start())
    (pid,) = worker_pids()
    assert desk.judge("pid")[0].reward == pid
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: worker_pids() - {pid})
    assert desk.judge("pid")[0].reward in worker_pids() - {pid}


def test_a_replacement_finds_the_environment_of_the_start(start, monkeypatch):
    """The run writes there what its own libraries need: no GPU, a number of threads."""
    monkeypatch.setenv("WRITTEN", "1")
    desk = Desk(start())
    monkeypatch.setenv("WRITTEN", "2")
    assert [v.reward for v in desk.judge("env WRITTEN", "crash", "env WRITTEN")] == [1.0, None, 1.0]


def test_memory_beyond_the_limit_is_an_error_of_the_call(start):
    verdicts = Desk(start(memory_bytes=512 << 20)).judge(f"eat {1 << 30}", f"eat {1 << 20}")
    assert verdicts[0].failure.startswith("reward_error: MemoryError") and verdicts[1].reward == 1 << 20


# ---- rewards that start processes of their own ---------------------------------------------------------------------


def test_a_rewards_own_time_limit_ends_its_child(start):
    """At once after the start too, when the child has had no time to set up anything."""
    desk = Desk(start("with_time_limit"))
    began = time.monotonic()
    assert [v.reward for v in desk.judge("0.3", *["0"] * 50)] == [-signal.SIGTERM] * 51
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_process_pools_work_every_time(start, method):
    desk = Desk(start("in_a_pool"))
    rounds = 10 if method == "fork" else 1
    assert [v.reward for v in desk.judge(*[f"pool {method}", f"executor {method}"] * rounds)] == [6.0, 6.0] * rounds
    assert [v.reward for v in desk.judge(f"thread {method}")] == [12.0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_rewards_children_have_the_default_handlers(start, number):
    """Also in the moment of the fork. Ctrl-C is a KeyboardInterrupt (exit status 1) once the child runs."""
    verdicts = Desk(start("interrupted")).judge(*[str(int(number))] * 10)
    assert {v.reward for v in verdicts} <= {-number, 1.0 if number == signal.SIGINT else -number}


def test_a_handler_that_a_reward_installs_itself_is_inherited(start):
    assert Desk(start("keeps_its_own_handler")).judge("")[0].reward == 7.0


def test_the_worker_itself_ignores_the_signals_of_the_terminal(start):
    desk = Desk(start())
    (pid,) = worker_pids()
    desk.ask("sleep 0.5")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(pid, number)
    assert desk.answers()[0].reward == 1.0 and desk.judge("pid")[0].reward == pid


def test_a_reward_in_the_runs_process_starts_children_with_default_handlers(monkeypatch):
    """The run handles SIGTERM and Ctrl-C itself; other children of the run inherit that, as ever."""
    monkeypatch.syspath_prepend(str(HERE))
    before = {number: signal.signal(number, lambda number, frame: None) for number in (signal.SIGTERM, signal.SIGINT)}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(PATIENCE_S)  # without the fix it waits forever
    try:
        calls = InlineCalls(load_functions(RewardConfig(function="worker_rewards.with_time_limit", workers=0)))
        assert [v.reward for v in Desk(calls).judge("0.2", "0")] == [-signal.SIGTERM] * 2
        pid = os.fork()
        if pid == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(5)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5
    finally:
        signal.alarm(0)
        for child in multiprocessing.active_children():
            child.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def give_up(number, frame):
    raise TimeoutError


# ---- async functions -----------------------------------------------------------------------------------------------


def test_async_calls_share_a_worker(start):
    desk = Desk(start("slowly"))
    desk.judge("warm")
    began = time.monotonic()
    assert all(v.reward == 1.0 for v in desk.judge(*["sleep 0.5"] * 8))
    assert time.monotonic() - began < 3.0, "eight waits of half a second, four at a time"


def test_an_async_call_past_its_deadline_takes_no_other_with_it(start):
    workers = start("slowly", timeout_s=1.0)
    late, *others = Desk(workers).judge("sleep 600", "sleep 0.1", "sleep 0.1")
    assert late.failure == "timeout: no result within 1 s" and [v.reward for v in others] == [1.0, 1.0]
    assert workers.take_replaced() == 0


def test_an_async_function_that_blocks_its_loop_is_killed(start):
    late, other = Desk(start("slowly", timeout_s=0.5)).judge("block 600", "fine")
    assert late.failure == "timeout: no result within 0.5 s" and other.reward == 1.0


def test_a_crash_among_async_calls_is_found_out(start):
    """Which of the calls it was cannot be seen, so each is made again alone."""
    verdicts = Desk(start("slowly")).judge("fine", "fine", "crash", "fine")
    assert [v.reward for v in verdicts] == [1.0, 1.0, None, 1.0] and verdicts[2].failure.startswith("crash")


# ---- starting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "why"),
    [
        ("no_such", "reward.function.*no_such"),
        ("Unmakeable", "OSError: no model file"),
        ("DiesWhenMade", "exit status 3"),
    ],
)
def test_a_reward_that_cannot_be_loaded_is_told_at_the_start(start, function, why):
    with pytest.raises(ConfigError, match=why):
        start(function)


def test_a_reward_that_takes_too_long_to_load(start):
    with pytest.raises(ConfigError, match="reward.start_timeout_s"):
        start("SlowToMake", start_timeout_s=0.5)


def test_a_python_object_cannot_travel():
    with pytest.raises(ConfigError, match="reward.workers=0"):
        RewardWorkers(RewardConfig(function=lambda response: 1.0, workers=1))


def test_a_reward_that_cannot_be_loaded_any_more_fails_its_calls_instead_of_waiting(tmp_path, monkeypatch):
    """Somebody edits the file while the run goes on, and a crash needs a new worker."""
    source = tmp_path / "edited_rewards.py"
    source.write_text("import os\ndef f(response, **_):\n    os._exit(1) if response else None\n    return 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    workers = RewardWorkers(RewardConfig(function="edited_rewards.f", workers=1))
    try:
        workers.wait_ready()
        assert Desk(workers).judge("")[0].reward == 1.0
        source.write_text("def f(:\n")
        crashed, after = Desk(workers).judge("x", "")
        assert "ended during the call" in crashed.failure
        assert after.failure.startswith("crash: reward.function") and "SyntaxError" in after.failure
    finally:
        workers.close()


@pytest.mark.parametrize(
    "message",
    [
        {"reward": float("nan"), "parts": {}, "failure": None},
        {"reward": 1.0, "parts": {"a": "x"}, "failure": None},
        {"reward": 1.0, "parts": {}, "failure": "and a failure"},
        {"reward": "1.0", "parts": {}, "failure": None},
        "reward",
    ],
)
def test_only_numbers_and_text_are_taken_from_a_worker(message):
    assert _read_outcome(message) is None
    assert _read_outcome({"reward": 1, "parts": {"a": 0.5}, "failure": None}) == Outcome(reward=1.0, parts={"a": 0.5})


# ---- never in the way ----------------------------------------------------------------------------------------------


def test_submitting_and_polling_never_wait_for_a_slow_reward(start):
    desk = Desk(start())
    began = time.monotonic()
    desk.ask("sleep 1", *["fine"] * 200)
    assert desk.scorer.poll() == [] and desk.scorer.num_pending == 201
    assert time.monotonic() - began < 1.0
    assert not desk.scorer.drain(0.1) and desk.scorer.num_pending == 201
    desk.scorer.wait(PATIENCE_S)
    assert desk.scorer.poll()
    desk.answers()


def test_verdicts_arrive_while_the_caller_does_something_else(start):
    desk = Desk(start(workers=2))
    desk.ask(*["sleep 0.01"] * 10)
    time.sleep(1.0)  # an optimizer step, say; nobody polls
    assert len(desk.scorer.poll()) == 10


# ---- the end -------------------------------------------------------------------------------------------------------


def test_closing_ends_calls_under_way_and_lets_idle_functions_close(start, monkeypatch, tmp_path):
    target = {"_target_": "worker_rewards.Closing", "folder": str(tmp_path)}
    monkeypatch.syspath_prepend(str(HERE))
    workers = RewardWorkers(RewardConfig(function=target, workers=2))
    workers.wait_ready()
    wait_until(lambda: len(workers._workers) == 2 and all(worker.ready for worker in workers._workers))
    Desk(workers).judge("0", "0", "0", "0")
    Desk(workers).ask("0.4")
    pids = worker_pids()
    workers.close()
    workers.close()
    assert not any(exists(pid) for pid in pids)
    assert list(tmp_path.glob("closed-*")), "an idle worker closes what its function holds"


PROGRAM = """
import signal, sys, time, threading
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits that it is ignored
sys.path.insert(0, {here!r})
import numpy as np
from rlpost.config import RewardConfig
from rlpost.rewards.worker_pool import RewardWorkers
from rlpost.rewards.scoring import RewardScorer
from rlpost.types import Prompt

workers = RewardWorkers(RewardConfig(function="worker_rewards.by_word", workers=2, timeout_s=600.0))
workers.wait_ready()
scorer = RewardScorer(workers, lambda parts: "sleep 600")
for index in range(5):
    scorer.submit(Prompt(uid="0:0", token_ids=np.zeros(1, np.int32), text=""), index, [np.zeros(1, np.int32)], "stop")
time.sleep(0.3)
print(*[w.process.pid for w in workers._workers], flush=True)
try:
    sys.stdin.readline()  # until somebody has looked
    {then}
finally:
    if {close}:
        workers.close()
"""


def run_program(then, *, close):
    program = PROGRAM.format(here=str(HERE), then=then, close=close)
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    pids = [int(word) for word in process.stdout.readline().split()]
    assert len(pids) == 2 and all(map(exists, pids))
    return process, pids


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_no_worker_outlives_its_run(number):
    process, pids = run_program("time.sleep(600)", close=number == signal.SIGINT)
    os.killpg(process.pid, number)  # as the terminal does with Ctrl-C
    process.wait(PATIENCE_S)
    wait_until(lambda: not any(map(exists, pids)))


@pytest.mark.parametrize("then", ["raise ValueError('bad luck')", "sys.exit(0)", "__import__('os')._exit(70)"])
def test_no_worker_outlives_a_run_that_forgets_to_close(then):
    process, pids = run_program(then, close=False)
    process.communicate("\n", PATIENCE_S)
    wait_until(lambda: not any(map(exists, pids)))


def test_ctrl_c_leaves_the_workers_to_the_run():
    """A worker that died first would turn the last verdicts into crashes."""
    process, pids = run_program("time.sleep(600)", close=True)
    for pid in pids:
        assert os.getpgid(pid) == os.getsid(pid) == pid, "the terminal's signals go to its own processes only"
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(pid, number)
    time.sleep(0.3)
    assert all(map(exists, pids))
    process.send_signal(signal.SIGINT)
    process.wait(PATIENCE_S)
    wait_until(lambda: not any(map(exists, pids)))
