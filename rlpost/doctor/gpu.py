"""What ``nvidia-smi`` says of the GPUs, before anything of ours runs on them.

The formats are those of ``nvidia-smi --query-...=... --format=csv,noheader,nounits``: one line for each GPU or process,
columns separated by ", ", sizes in MiB, "[N/A]" or "[Not Supported]" for what is not known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlpost.doctor.findings import Finding, ok, problem, skipped, warning
from rlpost.doctor.programs import Ended, run_program
from rlpost.preflight.device_plan import format_bytes
from rlpost.preflight.memory_plan import pinned

MIB = 1 << 20
COLUMNS = ("index", "uuid", "name", "driver_version", "memory.total", "memory.free", "compute_cap")
DRIVERS = {13: 580, 12: 525}  # CUDA's major version -> the first driver that runs its programs
LEAST_CAPABILITY = (8, 0)  # bfloat16, and vLLM's attention
SMI_LIMIT_S = 20.0  # a driver that is not kept loaded takes seconds
PEAK_BYTES = 24  # per parameter, at an optimizer step with ZeRO stage 1 in bfloat16; measured on a CPU
# What sleeps in pinned host memory, bytes per parameter: master copy and two moments in float32, parameters, gradients.
PINNED_BLOCKS = (4, 4, 4, 2, 2)
USED_BY_NOBODY = 1 << 30  # memory in use that no process in sight holds


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """One GPU. Sizes in bytes; None: the driver does not say."""

    index: int
    uuid: str
    name: str
    driver: str
    total: int | None
    free: int | None
    capability: tuple[int, int] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Occupant:
    """Another process on a GPU."""

    pid: int
    name: str
    used: int | None  # bytes


def ask_cards() -> Ended:
    """Drivers of 2021 and before do not know the last column."""
    ended = _ask("--query-gpu=" + ",".join(COLUMNS))
    if COLUMNS[-1] in ended.failure:
        older = _ask("--query-gpu=" + ",".join(COLUMNS[:-1]))
        return Ended(out="".join(f"{line}, [N/A]\n" for line in older.out.splitlines()), failure=older.failure)
    return ended


def ask_occupants() -> Ended:
    return _ask("--query-compute-apps=pid,process_name,used_memory")


def _ask(query: str) -> Ended:
    return run_program(["nvidia-smi", query, "--format=csv,noheader,nounits"], SMI_LIMIT_S)


def read_cards(out: str) -> list[Card]:
    cards = []
    for line in out.splitlines():
        words = [word.strip() for word in line.split(",")]
        if len(words) != len(COLUMNS) or not words[0].isdigit():
            continue
        major, dot, minor = words[6].partition(".")
        cards.append(
            Card(
                index=int(words[0]),
                uuid=words[1],
                name=words[2],
                driver=words[3],
                total=_bytes(words[4]),
                free=_bytes(words[5]),
                capability=(int(major), int(minor)) if dot and major.isdigit() and minor.isdigit() else None,
            )
        )
    return cards


def read_occupants(out: str) -> list[Occupant]:
    occupants = []
    for line in out.splitlines():
        pid, _, rest = line.partition(",")
        name, _, used = rest.rpartition(",")
        if pid.strip().isdigit():
            occupants.append(Occupant(pid=int(pid), name=name.strip(), used=_bytes(used.strip())))
    return occupants


def visible_cards(cards: Sequence[Card], visible: str | None) -> list[Card]:
    """Those that ``CUDA_VISIBLE_DEVICES`` leaves, by number or by the beginning of a UUID; None: all."""
    if visible is None:
        return list(cards)
    chosen = []
    for word in (word.strip() for word in visible.split(",")):
        found = [card for card in cards if str(card.index) == word or (word and card.uuid.startswith(word))]
        if not found:
            break  # CUDA sees none of those after an invalid one
        chosen += found[:1]
    return chosen


# ---- checks --------------------------------------------------------------------------------------------------------


def check_smi(ended: Ended, cards: Sequence[Card], *, works: bool) -> Finding:
    """``works``: torch uses a GPU all the same; then only what nvidia-smi would tell is missing."""
    if ended.failure or not cards:
        found = ended.failure or f"no GPU in {ended.out.strip()[:80]!r}"
        if works:
            do = "put nvidia-smi on PATH, so that driver, memory and other processes can be looked at"
            return warning("nvidia-smi", found, do)
        do = "install NVIDIA's driver; in a container, start it with --gpus all; or use device=cpu"
        return problem("nvidia-smi", found, do)
    names = ", ".join(f"{card.index} {card.name}" for card in cards)
    return ok("nvidia-smi", names)


def check_driver(driver: str, cuda: str | None) -> Finding:
    """``cuda``: the version torch was built for; None: a torch for CPUs, or none."""
    if cuda is None:
        return skipped("driver", f"{driver}; there is no torch for CUDA to compare it with")
    least = DRIVERS.get(int(cuda.partition(".")[0]))
    major = driver.partition(".")[0]
    if least is None or not major.isdigit():
        return skipped("driver", f"{driver} for CUDA {cuda}: not known here")
    if int(major) < least:
        found = f"{driver}; torch is built for CUDA {cuda}, which needs {least} or newer"
        return problem("driver", found, f"install driver {least} or newer")
    return ok("driver", f"{driver} for CUDA {cuda}")


def check_count(have: int | None, workers: int, address: str | None) -> Finding:
    """``address``: of a Ray cluster, which has GPUs elsewhere."""
    if have is None:
        return skipped("number of GPUs", "not known")
    if have < workers and address is None:
        found = f"{have} for cluster.num_workers={workers}"
        do = f"set cluster.num_workers={have}, or cluster.address to use more machines" if have else "use device=cpu"
        return problem("number of GPUs", found, do)
    return ok("number of GPUs", f"{have} for {workers} {'worker' if workers == 1 else 'workers'}")


def check_capability(card: Card) -> Finding:
    name = f"GPU {card.index}: capability"
    if card.capability is None:
        return skipped(name, "the driver does not say")
    text = ".".join(map(str, card.capability))
    if card.capability < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        found = f"{text}, below {least}: no bfloat16 and no FlashAttention"
        return problem(name, found, f"use a GPU of {least} or newer, such as an A100")
    return ok(name, text)


def check_occupants(cards: Sequence[Card], ended: Ended) -> Finding:
    """Processes that were on the GPUs before us."""
    occupants = read_occupants(ended.out)
    if occupants:
        who = [f"{one.name} ({one.pid}) {_size(one.used)}" for one in occupants]
        found = f"{'; '.join(who[:3])}{f' and {len(who) - 3} more' if len(who) > 3 else ''}"
        return warning("other processes", found, "end them, or choose a free GPU with CUDA_VISIBLE_DEVICES=N")
    held = [card for card in cards if card.total and card.free is not None and card.total - card.free > USED_BY_NOBODY]
    if held:
        taken = ", ".join(f"GPU {card.index}: {_size(card.total - card.free)}" for card in held)  # type: ignore[operator]
        found = f"{taken} in use, by no process in sight (another container, or one that was killed)"
        return warning("other processes", found, "look with nvidia-smi on the host; end what holds it")
    if ended.failure:
        return skipped("other processes", ended.failure)
    return ok("other processes", "none")


def check_free(card: Card, params: int | None, elsewhere: str) -> Finding:
    """``params``: of the named model. ``elsewhere``: why its states are not all on one GPU; empty: they are."""
    name = f"GPU {card.index}: memory"
    if card.free is None:
        return skipped(name, "the driver does not say")
    found = f"{_size(card.free)} free of {_size(card.total)}"
    if params is None:
        return ok(name, found)
    if elsewhere:
        return ok(name, f"{found}; {elsewhere}: `rlpost check` has the plan")
    needed = PEAK_BYTES * params
    found += f"; an update of the model takes about {format_bytes(needed)}"
    if needed > card.free:
        do = "use train=zero3_offload, more workers (cluster.num_workers), a larger GPU or a smaller model"
        return problem(name, found, do)
    return ok(name, f"{found}, and activations")


def pinned_bytes(params: int) -> int:
    """Host memory of a trainer that sleeps: each block of pinned memory takes a power of two."""
    return sum(pinned(size * params) for size in PINNED_BLOCKS)


def check_pinned(available: int, params: int | None, sleeps: bool) -> Finding:
    """``available``: host memory, bytes."""
    name = "pinned host memory"
    if params is None or not sleeps:
        why = "no model is named" if params is None else "train.sleep_offload=false: the trainer stays on the GPU"
        return skipped(name, why)
    needed = pinned_bytes(params)
    found = f"the sleeping trainer takes {format_bytes(needed)} of {format_bytes(available)} available"
    if needed > available:
        return problem(name, found, "set train.sleep_offload=false if the GPU has room, or use a smaller model")
    return ok(name, found)


def _bytes(word: str) -> int | None:
    return int(word) * MIB if word.isdigit() else None


def _size(num_bytes: int | None) -> str:
    return "?" if num_bytes is None else format_bytes(num_bytes)
