"""What a hostile program tries, each contained, each judged within its deadline, and the sandbox as good as before.

Scripts report what they achieved on standard output; the expected report is that they achieved nothing.
"""

from __future__ import annotations

import os
import platform
import re
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from rlpost.sandbox.box import FunctionTests, Sandbox
from rlpost.sandbox.limits import Limits

from .conftest import QUICK, processes_of

DEADLINE_S = 8.0  # of one verdict on a machine that is busy with other tests; on an idle one each takes under a second


@pytest.fixture(autouse=True)
def nothing_is_left(sandbox: Sandbox):
    """After each attack: as many processes as before, no file, and the next program runs as if nothing had been."""
    before = processes_of(sandbox)
    yield
    assert processes_of(sandbox) == before
    outcome = sandbox.run_script("import os; print(sorted(os.listdir('/tmp')), len(os.environ))", b"", QUICK)
    assert (outcome.kind, outcome.output) == ("passed", b"[] 0\n")


def run(sandbox: Sandbox, source: str, limits: Limits = QUICK, stdin: bytes = b""):
    started = time.monotonic()
    outcome = sandbox.run_script(source, stdin, limits)
    assert time.monotonic() - started < DEADLINE_S
    return outcome


def report(sandbox: Sandbox, source: str, limits: Limits = QUICK) -> str:
    outcome = run(sandbox, source, limits)
    assert outcome.kind == "passed", outcome
    return outcome.output.decode()


# ---- using up the machine ------------------------------------------------------------------------------------------


def read_programs(name: str) -> dict[str, tuple[str, str]]:
    """Name -> (source, outcome) of the programs in a file of ``programs/``."""
    text = (Path(__file__).parent / "programs" / f"{name}.txt").read_text()
    found = re.findall(r"^### ([^\n:]+): ([^\n]+)\n(.*?)(?=^### |\Z)", text, re.DOTALL | re.MULTILINE)
    return {name: (source, outcome) for name, outcome, source in found}


EXHAUSTING = read_programs("exhausting") | {
    "nests too deeply for the parser": ("(" * 5000 + ")" * 5000, "syntax"),
    "a lone surrogate as source": ("x = '\ud800'", "syntax"),
    "a zero byte as source": ("x = 1\0", "syntax"),
}


@pytest.mark.parametrize("name", EXHAUSTING)
def test_a_program_cannot_use_up_the_machine(sandbox: Sandbox, name: str) -> None:
    source, kind = EXHAUSTING[name]
    assert run(sandbox, source).kind == kind


def test_a_source_of_100_mb_is_refused_at_once(sandbox: Sandbox) -> None:
    assert run(sandbox, "x = 1\n" * (100 * 2**20 // 6)).kind == "syntax"


def test_threads_are_limited(sandbox: Sandbox) -> None:
    source = """
import threading
started, hold = 0, threading.Event()
try:
    while started < 1000:
        threading.Thread(target=hold.wait, daemon=True).start()
        started += 1
except RuntimeError:
    pass
print(started)
"""
    roomy = replace(QUICK, memory_bytes=512 << 20)  # a thread reserves 8 MiB for its stack
    assert QUICK.threads - 8 <= int(report(sandbox, source, roomy)) < QUICK.threads


def test_open_files_are_limited(sandbox: Sandbox) -> None:
    source = "import os\nn = 0\ntry:\n  while True: os.open('/dev/null', 0); n += 1\nexcept OSError: print(n)"
    assert 1 <= int(report(sandbox, source)) < QUICK.open_files


def test_the_disk_cannot_be_filled(sandbox: Sandbox) -> None:
    source = """
import os
total, files = 0, 0
try:
    while True:
        fd = os.open(f"/tmp/{files}", os.O_CREAT | os.O_WRONLY)
        files += 1
        for _ in range(8):
            total += os.write(fd, bytes(4096))
        os.close(fd)
except OSError:
    pass
try:
    for more in range(10**6):
        os.symlink("x", f"/tmp/s{more}")
except OSError:
    pass
print(total, files + more)
"""
    written, inodes = map(int, report(sandbox, source).split())
    assert 0 < written <= QUICK.tmp_bytes and inodes < 5000


# ---- processes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    ["os.fork()", "os.forkpty()", "multiprocessing.get_context('fork').Process(target=print).start()"],
)
def test_a_fork_bomb_or_a_daemon_cannot_begin(sandbox: Sandbox, source: str) -> None:
    source = f"import os, multiprocessing\ntry: {source}\nexcept OSError: print('refused')"
    assert report(sandbox, source) == "refused\n"


def test_no_other_program_can_be_started(sandbox: Sandbox) -> None:
    source = """
import os, subprocess
for attempt in (
    lambda: os.execv("/python/bin/python", ["python", "-c", "print('started')"]),
    lambda: os.posix_spawn("/python/bin/python", ["python", "-c", "print('started')"], {}),
    lambda: subprocess.run(["/python/bin/python", "-c", "print('started')"]),
    lambda: os.system("/python/bin/python -c 'print(1)'") and (_ for _ in ()).throw(PermissionError()),
):
    try: attempt()
    except PermissionError: print("refused")
"""
    assert report(sandbox, source) == "refused\n" * 4


def test_signals_reach_nobody_else(sandbox: Sandbox) -> None:
    source = """
import os, signal
reached = []
for pid in (-1, 0, *range(2, 2000), os.getppid() or 2):
    try:
        os.kill(pid, signal.SIGKILL)
        if pid > 1: reached.append(pid)
    except OSError: pass
print(os.getpid(), os.getppid(), reached)
"""
    assert report(sandbox, source) == "1 0 []\n"


# ---- looking around and reaching out -------------------------------------------------------------------------------


def test_nothing_of_the_host_can_be_seen(sandbox: Sandbox) -> None:
    source = """
import os
print(sorted(os.listdir("/")))
for root, folders, files in os.walk("/"):
    if root.startswith("/python/lib/python3") and not root.endswith("-packages"): continue
    if root in ("/", "/python", "/python/lib", "/python/bin", "/python/libraries", "/dev"): continue
    print(root, folders, files)
for path in ("/etc/passwd", "/root", "/home", "/proc/self/environ", "/proc/1/cmdline", "/sys", "/usr", "/run", "/var"):
    if os.path.exists(path): print("found", path)
print(os.listdir("/guardian"), os.listdir("/tmp"), sorted(os.listdir("/dev")), dict(os.environ), os.uname().nodename)
"""
    lines = report(sandbox, source).splitlines()
    assert lines[0] in (f"['dev', 'guardian', {lib}'python', 'tmp']" for lib in ("", "'lib', ", "'lib64', "))
    assert lines[-1] == "[] [] ['null', 'random', 'urandom', 'zero'] {} sandbox"
    allowed = ("/tmp [] []", "/guardian [] []", "/lib", "/python/lib/python3")
    assert all(line.startswith(allowed) and "found" not in line for line in lines[1:-1]), lines
    packages = [line for line in lines if "-packages" in line and not line.endswith("[] []")]
    assert not packages


def test_nothing_can_be_written_but_in_tmp(sandbox: Sandbox) -> None:
    source = """
import os
written = []
for folder, _, _ in os.walk("/"):
    try:
        open(f"{folder}/x", "w").close()
        written.append(folder)
    except OSError: pass
for path in ("/python/bin/python", "/python/lib", "/tmp/../python/libraries"):
    for change in (lambda: os.rename(path, path + "2"), lambda: os.unlink(path), lambda: os.chmod(path, 0o777),
                   lambda: os.utime(path, (0, 0)), lambda: os.symlink("x", path + "/y"), lambda: os.truncate(path, 0)):
        try:
            change()
            written.append(path)
        except OSError: pass
print(written)
"""
    assert report(sandbox, source) == "['/tmp']\n"


def test_links_lead_nowhere(sandbox: Sandbox) -> None:
    source = """
import os
opened = []
for number, target in enumerate(("/etc/passwd", "/../../etc/passwd", "/proc/1/root", "/guardian/proc", "/dev/mem")):
    os.symlink(target, f"/tmp/{number}")
    try: opened.append(open(f"/tmp/{number}").name)
    except OSError: pass
try: os.link("/python/bin/python", "/tmp/python"); opened.append("link")
except OSError: pass
print(opened)
"""
    assert report(sandbox, source) == "[]\n"


def test_there_is_no_network(sandbox: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as hidden:
        hidden.bind("\0rlpost-test")  # abstract: no file, reachable wherever the network namespace is the same
        hidden.listen()
        source = f"""
import socket, urllib.request
reached = []
for family, address in (
    (socket.AF_INET, ("127.0.0.1", {server.getsockname()[1]})),
    (socket.AF_INET6, ("::1", {server.getsockname()[1]})),
    (socket.AF_UNIX, "\\0rlpost-test"),
):
    try:
        with socket.socket(family) as s: s.connect(address)
        reached.append(address)
    except OSError: pass
try: reached.append(urllib.request.urlopen("http://127.0.0.1:{server.getsockname()[1]}", timeout=1))
except OSError: pass
try: reached.append(socket.getaddrinfo("localhost", 80))
except OSError: pass
print([r for r in reached if not isinstance(r, list)])
"""
        assert report(sandbox, source) == "[]\n"


SYSTEM_CALLS = """
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
allowed = []
for name, number, arguments in {calls!r}:
    ctypes.set_errno(0)
    if libc.syscall(number, *arguments) != -1 or ctypes.get_errno() not in (errno.EPERM, errno.ENOSYS):
        allowed.append((name, ctypes.get_errno()))
print(allowed)
"""
X86 = {
    "ptrace a parent": (101, 16, 1, 0, 0),
    "ptrace traceme": (101, 0, 0, 0, 0),
    "process_vm_readv": (310, 1, 0, 0, 0, 0, 0),
    "process_vm_writev": (311, 1, 0, 0, 0, 0, 0),
    "unshare user": (272, 0x10000000),
    "clone user": (56, 0x10000000 | 17, 0, 0, 0, 0),
    "clone pid": (56, 0x20000000 | 0x10F00, 0, 0, 0, 0),
    "clone3": (435, 0, 0),
    "setns": (308, 0, 0),
    "mount": (165, b"tmpfs", b"/tmp", b"tmpfs", 0, 0),
    "umount": (166, b"/guardian", 2),
    "move_mount": (429, 0, 0, 0, 0, 0),
    "pivot_root": (155, b"/", b"/tmp"),
    "chroot": (161, b"/tmp"),
    "bpf": (321, 0, 0, 0),
    "perf_event_open": (298, 0, 0, -1, -1, 0),
    "userfaultfd": (323, 0),
    "keyctl": (250, 0, -3, 0),
    "add_key": (248, b"user", b"x", b"y", 1, -3),
    "io_uring_setup": (425, 8, 0),
    "memfd_create": (319, b"x", 0),
    "shmget": (29, 1, 4096, 0o1600),
    "kexec_load": (246, 0, 0, 0, 0),
    "setuid": (105, 0),
    "capset": (126, 0, 0),
    "personality": (135, 0x0040000),
    "seccomp": (317, 1, 0, 0),
    "prctl no dumpable": (157, 4, 1, 0, 0, 0),
    "splice": (275, 0, 0, 1, 0, 1, 0),
    "sysinfo": (99, 0),
    "pidfd_open": (434, 1, 0),
    "name_to_handle_at": (303, -100, b"/", 0, 0, 0),
    "open_by_handle_at": (304, 0, 0, 0),
    "mknod": (133, b"/tmp/disk", 0o60666, 0x0800),
    "a number of no call": (999,),
}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of x86_64")
def test_dangerous_system_calls_are_refused(sandbox: Sandbox) -> None:
    calls = [(name, number, arguments) for name, (number, *arguments) in X86.items()]
    assert report(sandbox, SYSTEM_CALLS.format(calls=calls)) == "[]\n"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="machine code of x86_64")
@pytest.mark.parametrize(
    "code",
    [b"\xb8\x14\x00\x00\x00\xcd\x80\xc3", b"\xb8\x27\x00\x00\x40\x0f\x05\xc3"],  # int 0x80: getpid; x32: getpid
    ids=["32 bit", "x32"],
)
def test_other_architectures_system_calls_kill(sandbox: Sandbox, code: bytes) -> None:
    source = f"""
import ctypes, mmap
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write({code!r})
print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))())
"""
    outcome = run(sandbox, source)
    assert (outcome.kind, outcome.output) == ("crashed", b"")


# ---- between programs ----------------------------------------------------------------------------------------------


def test_nothing_survives_a_program(sandbox: Sandbox) -> None:
    change = """
import builtins, json, os, random, sys, decimal
builtins.open = None; builtins.print_ = print; json.loads = None; sys.modules["planted"] = sys
os.environ["PLANTED"] = "1"; open_ = os.open("/tmp/planted", os.O_CREAT | os.O_WRONLY); os.umask(0)
random.seed(1); sys.setrecursionlimit(50000); sys.path.append("/tmp"); decimal.getcontext().prec = 3
print("done")
"""
    look = """
import builtins, json, os, random, sys, decimal
print(builtins.open is not None, hasattr(builtins, "print_"), json.loads is not None, "planted" in sys.modules)
print(dict(os.environ), os.listdir("/tmp"), oct(os.umask(0)), sys.getrecursionlimit(), "/tmp" in sys.path)
print(decimal.getcontext().prec)
"""
    expected = "True False True False\n{} [] 0o77 1000 False\n28\n"
    assert report(sandbox, look) == expected
    assert report(sandbox, change) == "done\n"
    assert report(sandbox, look) == expected


def test_programs_draw_different_random_numbers(sandbox: Sandbox) -> None:
    source = "import random; print(random.random())"
    assert report(sandbox, source) != report(sandbox, source)


# ---- forging a verdict ---------------------------------------------------------------------------------------------

SECRET = 918273645546372819  # an expected value that no program can guess
TESTS = FunctionTests(tests=[f"def check(candidate):\n    assert candidate(1) == {SECRET}\n"], entry_points=["f"])

FORGERIES = read_programs("forgeries")


@pytest.mark.parametrize("name", FORGERIES)
def test_a_verdict_cannot_be_forged(sandbox: Sandbox, name: str) -> None:
    source, kind = FORGERIES[name]
    started = time.monotonic()
    outcome = sandbox.run_functions(source, TESTS, QUICK)
    assert time.monotonic() - started < DEADLINE_S
    assert outcome.kind in kind.split(" or "), outcome


def test_the_honest_program_passes(sandbox: Sandbox) -> None:
    assert sandbox.run_functions(f"def f(x): return {SECRET}", TESTS, QUICK).kind == "passed"


SPACES = ("user", "pid", "mnt", "ipc", "net", "uts", "cgroup")


def test_every_layer_holds_by_itself(sandbox: Sandbox) -> None:
    """The host looks at a running program: what one layer lets through another may refuse, and no attack would tell."""
    at_rest = processes_of(sandbox)
    thread = threading.Thread(target=sandbox.run_script, args=("import time; time.sleep(1.2)", b"", QUICK))
    thread.start()
    time.sleep(0.6)
    (program,) = processes_of(sandbox) - at_rest
    guardian = max(at_rest)
    status = dict(re.findall(r"^(\w+):\t(.*)$", Path(f"/proc/{program}/status").read_text(), re.MULTILINE))
    spaces = {n: [os.readlink(f"/proc/{pid}/ns/{n}") for pid in (program, guardian, os.getpid())] for n in SPACES}
    open_files = [os.readlink(f"/proc/{program}/fd/{fd}") for fd in os.listdir(f"/proc/{program}/fd")]
    limits = Path(f"/proc/{program}/limits").read_text()
    mounts = [line.split() for line in Path(f"/proc/{program}/mountinfo").read_text().splitlines()]
    oom_score = int(Path(f"/proc/{program}/oom_score_adj").read_text())
    thread.join()
    assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert set(status["Uid"].split()) == {str(os.getuid() or 65534)}
    for name, (of_program, of_guardian, of_host) in spaces.items():
        assert of_program != of_host, name
        assert (of_program != of_guardian) == (name in ("pid", "mnt", "ipc")), name
    assert sorted(open_files) == ["/dev/null", "/memfd:rlpost (deleted)", "/memfd:rlpost (deleted)"]
    writable = {mount[4] for mount in mounts if "ro" not in mount[5].split(",")}
    assert writable - {f"/dev/{name}" for name in ("null", "zero", "random", "urandom")} == {"/tmp", "/guardian/proc"}
    assert mounts[-1][4] == "/guardian" and "ro" in mounts[-1][5]  # covers that /proc
    assert oom_score == 1000
    for name, value in (("cpu time", 2), ("file size", QUICK.output_bytes), ("open files", 64), ("processes", 32)):
        assert re.search(rf"Max {name} +{value} +{value} ", limits), limits
    assert re.search(r"Max core file size +0 +0 ", limits)


def test_expected_values_are_in_no_memory_but_the_testers(sandbox: Sandbox) -> None:
    """The host looks into every process of the sandbox while a program waits in its call."""
    marker = "expected-" + os.urandom(12).hex()
    tests = FunctionTests(tests=[f"def check(candidate):\n    assert candidate(1) == {marker!r}\n"], entry_points=["f"])
    at_rest = processes_of(sandbox)
    for _ in range(3):  # what earlier runs of the same tests leave in the guardian would be found, too
        sandbox.run_functions("def f(x): return 'x'", tests, QUICK)
    source = "import time\ndef f(x): time.sleep(1.2); return 'x'"
    thread = threading.Thread(target=sandbox.run_functions, args=(source, tests, QUICK))
    thread.start()
    time.sleep(0.6)
    holders = {pid: marker.encode() in read_memory(pid) for pid in processes_of(sandbox)}
    thread.join()
    children = sorted(set(holders) - at_rest)  # started in this order
    assert len(children) == 2
    candidate, tester = children
    assert holders == {**dict.fromkeys(at_rest, False), candidate: False, tester: True}


def read_memory(pid: int) -> bytes:
    """Everything a process can read and write, as the host sees it."""
    parts = []
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            addresses, rights, *_ = line.split()
            if rights.startswith("rw"):
                start, end = (int(address, 16) for address in addresses.split("-"))
                try:
                    parts.append(os.pread(memory.fileno(), end - start, start))
                except OSError:  # pages that were never touched
                    continue
    return b"\0".join(parts)
