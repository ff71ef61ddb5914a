"""One Triton kernel, the smallest that compiles and runs. Imported by the GPU's probe only: Triton is no package of a
CPU's installation."""

import triton
import triton.language as tl


@triton.jit
def add_one(x, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """x[i] += 1 for i < n."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + at, mask=at < n) + 1, mask=at < n)
