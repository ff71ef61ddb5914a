"""A packed row gives each sequence what it gets alone; nothing leaks, positions mean what they say."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlpost.train.attention import describe_row, packed_attention, sequence_lengths
from rlpost.train.forward import PolicyModule, trainable_positions
from rlpost.train.model import load_model
from tests.train import cases


@dataclass
class Pair:
    """The same weights twice: as the trainer loads them, and as transformers does, for sequences alone."""

    ours: Any
    plain: Any


@pytest.fixture(params=[(True, "rlpost_packed"), (False, "rlpost_packed"), (True, "sdpa"), (False, "sdpa")], ids=str)
def lm(request, tmp_path):
    tied, implementation = request.param
    folder = cases.save_model(tmp_path / "model", tied=tied)
    ours = load_model(folder, dtype=torch.float32, device="cpu")
    assert ours.config._attn_implementation == "rlpost_packed"
    ours.set_attn_implementation(implementation)
    return Pair(ours, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def run(lm, row, positions=None, chunk_tokens=5):
    positions = trainable_positions(row) if positions is None else positions
    arrays = (row.token_ids, row.position_ids, positions)
    return PolicyModule(lm.ours, chunk_tokens=chunk_tokens)(*(torch.from_numpy(a) for a in arrays), 0.8).unbind(0)


def test_packed_row_equals_separate_sequences(lm):
    samples = cases.sequences(1, 5)
    row = cases.pack(samples, padding=4)
    positions = np.flatnonzero((row.position_ids > 0) & (row.sequence_ids >= 0))
    logprobs, entropy = run(lm, row, positions)
    start = 0
    for s in samples:
        expected = cases.reference_logprobs(lm.plain, s["token_ids"], 0.8)
        end = start + len(s["token_ids"])
        for ours, theirs in zip((logprobs, entropy), expected, strict=True):
            assert ours[start] == 0.0, "the first token of a sequence has no logprob"
            torch.testing.assert_close(ours[start + 1 : end], theirs, rtol=1e-5, atol=1e-5)
        start = end
    assert not logprobs[start:].any() and not entropy[start:].any()


def test_one_sequence_does_not_see_another(lm):
    samples = cases.sequences(2, 3)
    other = [{**samples[0], "token_ids": (samples[0]["token_ids"] + 1) % cases.VOCAB}, *samples[1:]]
    first = len(samples[0]["token_ids"])
    before, after = (run(lm, cases.pack(s))[0][first:] for s in (samples, other))
    torch.testing.assert_close(before, after, rtol=0, atol=0)


def test_only_asked_positions_are_computed(lm):
    row = cases.pack(cases.sequences(3, 4), padding=3)
    logprobs, entropy = run(lm, row)
    assert not logprobs[~torch.from_numpy(row.loss_mask)].any()
    assert (logprobs[torch.from_numpy(row.loss_mask)] < 0).all() and (entropy[row.loss_mask] > 0).all()


def test_padding_changes_nothing(lm):
    samples = cases.sequences(4, 3)
    gradients = []
    for padding in (0, 7):
        lm.ours.zero_grad()
        row = cases.pack(samples, padding=padding)
        logprobs, entropy = run(lm, row)
        (logprobs.sum() + entropy.sum()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in lm.ours.parameters()]))
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[0].norm()


def test_a_masked_first_token_is_never_a_position():
    row = cases.pack([{**s, "loss_mask": np.ones_like(s["loss_mask"])} for s in cases.sequences(5, 3)])
    assert (row.position_ids[trainable_positions(row)] > 0).all()
    assert len(trainable_positions(row)) == len(row.token_ids) - 3


def test_attention_with_a_window_and_repeated_lengths():
    """Against an explicit mask over the whole row: same sequence, not later, not further back than the window."""
    lengths = [5, 1, 1, 1, 9, 9, 3]
    total = sum(lengths)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, total, 8, generator=generator)
    key, value = (torch.randn(1, 2, total, 8, generator=generator) for _ in range(2))
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    distance = torch.arange(total)[:, None] - torch.arange(total)
    for window in (None, 4):
        mask = (owner[:, None] == owner) & (distance >= 0) & (distance < (window or total))
        scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.3
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        expected = (weights @ value.repeat_interleave(2, 1)).transpose(1, 2)
        arguments = {**describe_row(lengths, query.device), "scaling": 0.3, "sliding_window": window}
        torch.testing.assert_close(packed_attention(None, query, key, value, None, **arguments)[0], expected)
    positions = np.concatenate([np.arange(n) for n in lengths])
    assert sequence_lengths(positions) == lengths
