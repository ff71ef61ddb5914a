"""The system calls a program may make: an allow list, assembled into a seccomp filter. Standard library only.

Owns the tables (x86_64 and aarch64 numbers) and the assembly; ``linux.install_filter`` hands the result to the kernel,
inside the sandbox, in the child that is about to run a program. Anything not allowed fails with ENOSYS, which libraries
take for an old kernel, or with EPERM if a program should see that it was refused. Calls of a foreign architecture kill
the process. A program may start threads but no processes, and cannot replace itself with another program: the CPU and
memory limits of its one process are the limits of everything it does.

Deliberately not allowed although they seem harmless: memfd_create and shared memory (memory that no limit counts),
sendfile, splice and vmsplice (a history of security holes), sysinfo (reveals facts about the host).
"""

from __future__ import annotations

import struct

# name, number on x86_64, number on aarch64; "-" if the architecture has no such call.
ALLOWED = """
    read 0 63, write 1 64, close 3 57, stat 4 -, fstat 5 80, lstat 6 -, newfstatat 262 79, statx 332 291, poll 7 -,
    ppoll 271 73, select 23 -, pselect6 270 72, lseek 8 62, mmap 9 222, mprotect 10 226, munmap 11 215,
    mremap 25 216, msync 26 227, madvise 28 233, mincore 27 232, brk 12 214, rt_sigaction 13 134,
    rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136, rt_sigtimedwait 128 137,
    rt_sigsuspend 130 133, sigaltstack 131 132, restart_syscall 219 128, pause 34 -, alarm 37 -, getitimer 36 102,
    setitimer 38 103, pread64 17 67, pwrite64 18 68, readv 19 65, writev 20 66, preadv 295 69, pwritev 296 70,
    access 21 -, faccessat 269 48, faccessat2 439 439, pipe 22 -, pipe2 293 59, dup 32 23, dup2 33 -, dup3 292 24,
    sched_yield 24 124, sched_getaffinity 204 123, getcpu 309 168, nanosleep 35 101, clock_nanosleep 230 115,
    clock_gettime 228 113, clock_getres 229 114, gettimeofday 96 169, time 201 -, times 100 153, getrusage 98 165,
    getpid 39 172, gettid 186 178, getppid 110 173, getpgrp 111 -, getpgid 121 155, getsid 124 156, getuid 102 174,
    geteuid 107 175, getgid 104 176, getegid 108 177, getresuid 118 148, getresgid 120 150, getgroups 115 158,
    setpgid 109 154, setsid 112 157, umask 95 166, uname 63 160, exit 60 93, exit_group 231 94, wait4 61 260,
    waitid 247 95, kill 62 129, tkill 200 130, tgkill 234 131, futex 202 98, set_robust_list 273 99,
    set_tid_address 218 96, rseq 334 293, getrandom 318 278, open 2 -, openat 257 56, creat 85 -,
    close_range 436 436, fcntl 72 25, flock 73 32, fsync 74 82, fdatasync 75 83, truncate 76 45, ftruncate 77 46,
    fadvise64 221 223, getdents 78 -, getdents64 217 61, getcwd 79 17, chdir 80 49, fchdir 81 50, readlink 89 -,
    readlinkat 267 78, statfs 137 43, fstatfs 138 44, rename 82 -, renameat 264 38, renameat2 316 276, mkdir 83 -,
    mkdirat 258 34, rmdir 84 -, link 86 -, linkat 265 37, unlink 87 -, unlinkat 263 35, symlink 88 -,
    symlinkat 266 36, chmod 90 -, fchmod 91 52, fchmodat 268 53, utime 132 -, utimes 235 -, futimesat 261 -,
    utimensat 280 88, epoll_create 213 -, epoll_create1 291 20, epoll_ctl 233 21, epoll_wait 232 -,
    epoll_pwait 281 22, eventfd 284 -, eventfd2 290 19, sendto 44 206, recvfrom 45 207,
    shutdown 48 210, getsockname 51 204, getpeername 52 205, getsockopt 55 209, getrlimit 97 163, setrlimit 160 164,
    prlimit64 302 261, getpriority 140 141
"""

REFUSED = """
    fork 57 -, vfork 58 -, execve 59 221, execveat 322 281, ptrace 101 117, process_vm_readv 310 270,
    process_vm_writev 311 271, socket 41 198, connect 42 203, bind 49 200, listen 50 201, accept4 288 242,
    sendmsg 46 211, recvmsg 47 212, mount 165 40, umount2 166 39, pivot_root 155 41, chroot 161 51, unshare 272 97,
    setns 308 268, setuid 105 146, setgid 106 144, setreuid 113 145, setregid 114 143, setresuid 117 147,
    setresgid 119 149, setgroups 116 159, capset 126 91, fchown 93 55, fchownat 260 54, lchown 94 -, chown 92 -,
    mknod 133 -, mknodat 259 33, keyctl 250 219, add_key 248 217, request_key 249 218, bpf 321 280,
    perf_event_open 298 241, userfaultfd 323 282, kexec_load 246 104, io_uring_setup 425 425, memfd_create 319 279,
    shmget 29 194, semget 64 190, msgget 68 186, mq_open 240 180, pidfd_open 434 434, pidfd_getfd 438 438,
    sched_setaffinity 203 122, setpriority 141 140, seccomp 317 277
"""

# Calls that are allowed with certain arguments only.
CHECKED = """
    clone 56 220, clone3 435 435, ioctl 16 29, prctl 157 167, socketpair 53 199
"""

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32_BIT = 0x40000000  # x86_64's second set of numbers
EPERM, ENOSYS, ENOTTY = 1, 38, 25
CLONE_THREAD = 0x00010000
CLONE_NAMESPACES = 0x7E020000  # NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
PRCTLS = (15, 16)  # PR_SET_NAME, PR_GET_NAME
AF_UNIX = 1  # asyncio wakes itself through a pair of such sockets

# Classic BPF: load a word of seccomp_data, compare, return.
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCHITECTURE, ARGUMENT_0, ARGUMENT_1 = 0, 4, 16, 24
ALLOW, KILL = 0x7FFF0000, 0x80000000

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, operand


def read_table(table: str, machine: str) -> dict[str, int]:
    """Name -> number on ``machine``, without the calls it does not have."""
    column = 1 if machine == "x86_64" else 2
    rows = [entry.split() for entry in table.split(",")]
    return {row[0]: int(row[column]) for row in rows if row[column] != "-"}


def assemble(machine: str) -> bytes:
    """The filter as an array of ``struct sock_filter``. Raises KeyError for a machine without tables."""
    numbers = {name: read_table(table, machine) for name, table in TABLES.items()}
    allowed, checked = numbers["allowed"], numbers["checked"]
    code: list[Instruction] = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, AUDIT_ARCH[machine]), (RETURN, 0, 0, KILL)]
    code += [(LOAD, 0, 0, NUMBER), (AT_LEAST, 0, 1, X32_BIT), (RETURN, 0, 0, KILL)]
    code += _on(checked["clone"], CHECK_CLONE)
    code += _on(checked["clone3"], [fail(ENOSYS)])  # its flags are in memory, out of reach; libraries then use clone
    code += _on(checked["ioctl"], _check_value(ARGUMENT_1, IOCTLS, ENOTTY))
    code += _on(checked["prctl"], _check_value(ARGUMENT_0, PRCTLS, EPERM))
    code += _on(checked["socketpair"], _check_value(ARGUMENT_0, (AF_UNIX,), EPERM))
    for number in allowed.values():
        code += _on(number, [(RETURN, 0, 0, ALLOW)])
    for number in numbers["refused"].values():
        code += _on(number, [fail(EPERM)])
    code.append(fail(ENOSYS))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


TABLES = {"allowed": ALLOWED, "refused": REFUSED, "checked": CHECKED}


def fail(errno: int) -> Instruction:
    return (RETURN, 0, 0, 0x00050000 | errno)


# Threads, never processes or namespaces. Argument 0 holds the flags on both machines.
CHECK_CLONE = [
    (LOAD, 0, 0, ARGUMENT_0),
    (ANY_BIT, 2, 0, CLONE_NAMESPACES),
    (ANY_BIT, 0, 1, CLONE_THREAD),
    (RETURN, 0, 0, ALLOW),
    fail(EPERM),
]


def _on(number: int, then: list[Instruction]) -> list[Instruction]:
    """``then`` (which returns) for the call ``number``; otherwise continue after it."""
    return [(EQUAL, 0, len(then), number), *then]


def _check_value(argument: int, values: tuple[int, ...], errno: int) -> list[Instruction]:
    """Allowed if the low half of an argument is one of ``values``; the kernel reads no more of these either."""
    code: list[Instruction] = [(LOAD, 0, 0, argument)]
    for value in values:
        code += [(EQUAL, 0, 1, value), (RETURN, 0, 0, ALLOW)]
    return [*code, fail(errno)]
