"""Peak memory of the logprob pass, forward and backward with the head's gradient, above the model's own.

    OMP_NUM_THREADS=1 python benchmarks/logprob_memory.py [--vocab V] [--tokens N] [--hidden H] [--chunk C] [--whole]

Measured as a fresh process's peak resident memory less what it held once hidden states, head and targets existed.
The head's gradient alone is vocab x hidden x 4 bytes (594 MiB by default). Target: below 1.5 GB in float32. ``--whole``
also measures a plain log softmax over all tokens, which needs about 7 GB at the default size.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--whole", action="store_true", help="measure the plain log softmax too")
    parser.add_argument("--measure", choices=["chunked", "entropy", "whole"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments)
        return
    print(
        f"vocab {arguments.vocab}, {arguments.tokens} tokens, hidden {arguments.hidden}, float32, "
        f"chunks of {arguments.chunk} tokens; head's gradient {arguments.vocab * arguments.hidden * 4 / 2**20:.0f} MiB"
    )
    for name in ("chunked", "entropy", *(["whole"] if arguments.whole else [])):
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--measure", name], check=True)


def measure(arguments: argparse.Namespace) -> None:
    import torch

    torch.manual_seed(0)
    hidden = torch.randn(arguments.tokens, arguments.hidden).requires_grad_()
    # In place: a temporary of the weight's size would itself be the peak.
    weight = torch.empty(arguments.vocab, arguments.hidden).normal_(std=0.02).requires_grad_()
    targets = torch.randint(0, arguments.vocab, (arguments.tokens,))
    loss = LOSSES[arguments.measure]
    small = [torch.randn(8, 4).requires_grad_() for _ in range(2)]
    loss(*small, torch.arange(8), arguments.chunk).backward()  # libraries allocate their own memory
    before, start = resident_bytes(), time.perf_counter()
    loss(hidden, weight, targets, arguments.chunk).backward()
    grown, seconds = peak_bytes() - before, time.perf_counter() - start
    print(
        f"{arguments.measure}: {grown / 1e9:.3f} GB ({grown / 2**20:.0f} MiB) above the model's, {seconds:.1f} s "
        f"(target < 1.5 GB at the default size)",
        flush=True,
    )


def chunked(hidden: Any, weight: Any, targets: Any, chunk: int) -> Any:
    from rlpost.train.head_logprobs import head_logprobs

    return head_logprobs(hidden, weight, targets, chunk_tokens=chunk)[0].sum()


def chunked_with_entropy(hidden: Any, weight: Any, targets: Any, chunk: int) -> Any:
    from rlpost.train.head_logprobs import head_logprobs

    logprobs, entropy = head_logprobs(hidden, weight, targets, chunk_tokens=chunk)
    return (logprobs + 0.01 * entropy).sum()


def whole(hidden: Any, weight: Any, targets: Any, chunk: int) -> Any:
    import torch

    return torch.log_softmax(hidden @ weight.t(), dim=-1).gather(1, targets[:, None]).sum()


LOSSES: dict[str, Callable[[Any, Any, Any, int], Any]] = {
    "chunked": chunked,
    "entropy": chunked_with_entropy,
    "whole": whole,
}


def resident_bytes() -> int:
    """The process's resident memory now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
    """The process's largest resident memory so far (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
