"""Response lengths that a benchmark forces: named distributions, and those of a recorded run.

A length is a pure function of (seed, prompt, sample), so every strategy, engine and resumption sees the same lengths
for the same prompt. Called by ``bench.rollout`` and ``plan.predict``; never generates anything.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist

from rlpost.config.locations import expand_home
from rlpost.errors import ConfigError, RunError, explain

LengthOf = Callable[[str], int]  # "UID/INDEX" -> tokens, 1..cap

CAP_OVER_MEDIAN = 16  # APRIL's cap is 16,384 tokens; 16x the median keeps its tail at any scale
SIGMA = 1.0  # of the lognormal's logarithm
LONG_SHARE = 0.15  # of the bimodal's responses
RECORDED = "recorded:"


def lognormal(u: float, cap: int) -> float:
    """Median cap / 16 and sigma 1; 0.3 % reach the cap."""
    return cap / CAP_OVER_MEDIAN * math.exp(SIGMA * NormalDist().inv_cdf(u))


def uniform(u: float, cap: int) -> float:
    """1 to an eighth of the cap, whose mean is the lognormal's median."""
    return 1 + u * (cap / 8 - 1)


def bimodal(u: float, cap: int) -> float:
    """85 % short (around cap / 32) and 15 % long (around cap / 2), each uniform within 50 % of its center."""
    if u < LONG_SHARE:
        return cap / 2 * (0.5 + u / LONG_SHARE)
    return cap / 32 * (0.5 + (u - LONG_SHARE) / (1 - LONG_SHARE))


DISTRIBUTIONS: dict[str, Callable[[float, int], float]] = {
    "lognormal": lognormal,
    "uniform": uniform,
    "bimodal": bimodal,
}


def make_lengths(name: str, *, cap: int, seed: int) -> LengthOf:
    """``name``: a key of DISTRIBUTIONS, or ``recorded:RUN_DIR`` for the trained responses of a run.

    Raises ConfigError for a name that is neither, RunError for a run without rollout files.
    """
    if name.startswith(RECORDED):
        return _recorded(Path(expand_home(name.removeprefix(RECORDED))), cap=cap, seed=seed)
    if name not in DISTRIBUTIONS:
        known = ", ".join([*DISTRIBUTIONS, f"{RECORDED}RUN_DIR"])
        raise ConfigError(explain("lengths", name, known, "name one of them"))
    inverse_cdf = DISTRIBUTIONS[name]
    return lambda request_id: min(cap, max(1, round(inverse_cdf(_uniform(f"{seed}|{request_id}"), cap))))


def _recorded(run_dir: Path, *, cap: int, seed: int) -> LengthOf:
    """Whole groups, drawn with replacement, so that correlations between siblings are kept."""
    import pyarrow.parquet as parquet

    groups: list[list[int]] = []
    for file in sorted((run_dir / "rollouts").glob("step-*.parquet")):
        columns = parquet.read_table(file, columns=["uid", "token_ids"]).to_pydict()
        by_uid: dict[str, list[int]] = {}
        for uid, token_ids in zip(columns["uid"], columns["token_ids"], strict=True):
            by_uid.setdefault(uid, []).append(len(token_ids))
        groups += by_uid.values()
    if not groups:
        do = "name a run recorded with logging.keep_rollouts=true"
        raise RunError(explain("lengths", f"{run_dir} without rollouts", "rollouts/step-*.parquet", do))

    def length_of(request_id: str) -> int:
        uid, _, index = request_id.rpartition("/")
        group = groups[int(_uniform(f"{seed}|{uid}") * len(groups))]
        return min(cap, max(1, group[int(index) % len(group)]))

    return length_of


def _uniform(key: str) -> float:
    """In (0, 1), the same in every process."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") + 0.5) / 2**64
