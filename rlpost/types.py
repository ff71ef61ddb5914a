"""The data that flows from a prompt to the loss. Frozen dataclasses; no heavy imports.

Arrays are NumPy; shapes and dtypes are given beside each field. P: prompt tokens, T: tokens of one segment,
R: response tokens of a sample, G: samples of a group, L: tokens of one packed row.

Position t describes token t: ``rollout_logprobs[t]`` is ``log mu(x_t | x_<t)`` in natural log under the
distribution the token was actually sampled from (temperature, top-p, top-k applied and renormalized).

Example: a prompt ``1+2=`` whose response ``3$`` was sampled in two steps, the first token by policy
version 4, the end token by version 5::

    Sample(uid="0:17", index=0, finish_reason="stop", segments=(
        Segment(token_ids=[3], rollout_logprobs=[-0.11], policy_version=4),
        Segment(token_ids=[15], rollout_logprobs=[-0.02], policy_version=5)))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One draw from the data. ``uid`` names the draw (``epoch:position``, of several sources ``NAME/epoch:position``),
    not the data row."""

    uid: str
    token_ids: Array  # i32[P]
    text: str  # what the tokens were made from, for rewards and tables
    reference: Any = None  # what the reward needs (a JSON value)
    columns: Mapping[str, Any] = field(default_factory=dict)  # the data row's other columns


def source_of(uid: str) -> str:
    """The source that a draw, or a problem of an evaluation (``eval:NAME/n``), comes from; "" if there is only one."""
    return uid.rpartition("/")[0].removeprefix("eval:")


class Segment(NamedTuple):
    """The tokens of a sample that one policy version produced. Filled by ``rollout.collect``.

    ``mixed_kv``: they were sampled with the weights of ``policy_version``, but some keys and values they attended
    to came from older weights (``rollout.keep_kv``), so no single policy is their behavior policy.
    """

    token_ids: Array  # i32[T]
    rollout_logprobs: Array  # f32[T]
    policy_version: int
    trainable: bool = True  # False for tokens the policy did not sample
    mixed_kv: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One response. ``reward`` is unshaped (filters read it); shaping happens in ``algos``."""

    uid: str
    index: int
    segments: tuple[Segment, ...] = ()
    finish_reason: str = ""  # "" while unfinished, else "stop" or "length"
    reward: float | None = None
    reward_parts: Mapping[str, float] = field(default_factory=dict)
    failure: str | None = None  # why there is no reward, e.g. "reward_error: ValueError: ..."

    @property
    def num_tokens(self) -> int:
        return sum(len(s.token_ids) for s in self.segments)

    @property
    def token_ids(self) -> Array:  # i32[R]
        return _concatenate([s.token_ids for s in self.segments], np.int32)

    @property
    def rollout_logprobs(self) -> Array:  # f32[R]
        return _concatenate([s.rollout_logprobs for s in self.segments], np.float32)

    @property
    def policy_versions(self) -> Array:  # i32[R]
        return _concatenate([np.full(len(s.token_ids), s.policy_version) for s in self.segments], np.int32)

    @property
    def trainable(self) -> Array:  # bool[R]
        return _concatenate([np.full(len(s.token_ids), s.trainable) for s in self.segments], np.bool_)

    @property
    def mixed_kv(self) -> Array:  # bool[R]
        return _concatenate([np.full(len(s.token_ids), s.mixed_kv) for s in self.segments], np.bool_)

    @property
    def version_span(self) -> int:
        """Number of policy versions that contributed; 0 for an empty response."""
        return len({s.policy_version for s in self.segments if len(s.token_ids)})

    @property
    def oldest_version(self) -> int | None:
        return min((s.policy_version for s in self.segments), default=None)

    @property
    def finished(self) -> bool:
        return bool(self.finish_reason)


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The samples of one prompt; ``complete`` when every sample is finished and scored."""

    uid: str
    prompt: Prompt
    samples: tuple[Sample, ...]  # [G]

    @property
    def scored(self) -> tuple[Sample, ...]:
        """The samples that have a reward (a failed one trains nothing)."""
        return tuple(s for s in self.samples if s.reward is not None)

    @property
    def num_tokens(self) -> int:
        return sum(s.num_tokens for s in self.samples)


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedRow:
    """Whole sequences (prompt + response) packed end to end for one forward pass.

    ``position_ids`` restart at 0 with every sequence. Prompt and padding positions have ``loss_mask=False`` and 0 in
    every float array. Filled by ``algos.batch.build_batch``.
    """

    token_ids: Array  # i64[L]
    position_ids: Array  # i64[L]
    sequence_ids: Array  # i64[L]; index of the sequence in the whole batch, -1 for padding
    loss_mask: Array  # bool[L]
    rollout_logprobs: Array  # f32[L]
    policy_versions: Array  # i32[L]
    advantages: Array  # f32[L]
    mixed_kv: Array | None = None  # bool[L]; see Segment; None: no token of the row
    old_logprobs: Array | None = None  # f32[L]; filled by the trainer's proximal pass, if there is one
    ref_logprobs: Array | None = None  # f32[L]; filled by the frozen reference's pass, if there is one


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainBatch:
    """The input of one optimizer step: packed rows and the denominators of the *global* batch."""

    rows: tuple[PackedRow, ...]
    num_tokens: int  # trainable tokens over all rows and ranks
    num_sequences: int  # sequences with at least one trainable token, over all rows and ranks
    sequence_lengths: Array  # i64[num sequence ids]; trainable tokens of each sequence
    policy_version: int  # the version being trained (lag = policy_version - policy_versions)
    owners: tuple[tuple[int, int], ...] = ()  # of each sequence id: (group, index among its scored samples); () in SFT


def _concatenate(parts: list[Array], dtype: Any) -> Array:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype)
