"""The filter's tables against the kernel's headers, and its code against a slow, obvious interpreter of it."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from rlpost.sandbox import seccomp

HEADERS = {
    "x86_64": (Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), r"#define __NR_(\w+)\s+(\d+)"),
    "aarch64": (Path("/usr/include/asm-generic/unistd.h"), r"#define __NR(?:3264)?_(\w+)\s+(\d+)"),
}
# The generic header names the 32-bit ancestors of these; on 64 bits the numbers are those of the names we use.
RENAMED = {"newfstatat": "fstatat", "mmap": "mmap", "lseek": "lseek"}


@pytest.mark.parametrize("machine", HEADERS)
def test_numbers_are_the_kernels(machine: str) -> None:
    header, pattern = HEADERS[machine]
    if not header.is_file():
        pytest.skip(f"{header} is not installed (linux-libc-dev)")
    known = {name: int(number) for name, number in re.findall(pattern, header.read_text())}
    for table in seccomp.TABLES.values():
        for name, number in seccomp.read_table(table, machine).items():
            found = known.get(name, known.get(RENAMED.get(name, name)))
            assert found == number, (name, number, found)


def test_no_call_stands_in_two_tables() -> None:
    for machine in HEADERS:
        numbers = [n for table in seccomp.TABLES.values() for n in seccomp.read_table(table, machine).values()]
        assert len(numbers) == len(set(numbers))


def interpret(code: bytes, *, arch: int, number: int, arguments: tuple[int, ...] = ()) -> int:
    """What the filter returns for a call."""
    padded = (*arguments, 0, 0, 0, 0, 0, 0)[:6]
    data = struct.pack("=IIQ6Q", number, arch, 0, *padded)
    accumulator, position = 0, 0
    while True:
        operation, yes, no, operand = struct.unpack_from("=HBBI", code, 8 * position)
        position += 1
        if operation == seccomp.LOAD:
            (accumulator,) = struct.unpack_from("=I", data, operand)
        elif operation == seccomp.RETURN:
            return operand
        else:
            compare = {
                seccomp.EQUAL: accumulator == operand,
                seccomp.AT_LEAST: accumulator >= operand,
                seccomp.ANY_BIT: bool(accumulator & operand),
            }[operation]
            position += yes if compare else no


@pytest.mark.parametrize("machine", HEADERS)
def test_every_number_gets_what_the_tables_say(machine: str) -> None:
    code, arch = seccomp.assemble(machine), seccomp.AUDIT_ARCH[machine]
    allowed = set(seccomp.read_table(seccomp.ALLOWED, machine).values())
    refused = set(seccomp.read_table(seccomp.REFUSED, machine).values())
    checked = seccomp.read_table(seccomp.CHECKED, machine)
    for number in set(range(600)) - set(checked.values()):
        verdict = interpret(code, arch=arch, number=number)
        expected = seccomp.ALLOW if number in allowed else 0x50000 | (1 if number in refused else 38)
        assert verdict == expected, number
    assert interpret(code, arch=arch, number=seccomp.X32_BIT) == seccomp.KILL
    assert interpret(code, arch=0x40000003, number=1) == seccomp.KILL  # 32-bit x86
    assert len(code) // 8 < 4096  # the kernel's most


@pytest.mark.parametrize("machine", HEADERS)
def test_calls_are_judged_by_their_arguments(machine: str) -> None:
    code, arch = seccomp.assemble(machine), seccomp.AUDIT_ARCH[machine]
    numbers = seccomp.read_table(seccomp.CHECKED, machine)

    def allowed(name: str, *arguments: int) -> bool:
        return interpret(code, arch=arch, number=numbers[name], arguments=arguments) == seccomp.ALLOW

    thread = 0x3D0F00  # what glibc's pthread_create passes
    assert allowed("clone", thread)
    assert not allowed("clone", 17) and not allowed("clone", 0x1200011)  # fork, glibc's fork
    assert not any(allowed("clone", thread | 1 << bit) for bit in (17, 25, 26, 27, 28, 29, 30))  # each namespace
    assert not allowed("clone3", thread)
    assert allowed("ioctl", 0, 0x5401) and not allowed("ioctl", 0, 0x5412)  # TCGETS; TIOCSTI
    assert allowed("socketpair", 1) and not allowed("socketpair", 2)
    assert allowed("prctl", 15) and not allowed("prctl", 4) and not allowed("prctl", 22)


def test_a_machine_without_tables_is_refused() -> None:
    with pytest.raises(KeyError):
        seccomp.assemble("riscv64")
