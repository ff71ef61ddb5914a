"""Attention over a packed row: equal to attention over each sequence alone, and its gradient costs no more."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from rlpost.train.attention import packed_attention

LENGTHS = [3, 5, 5, 1, 7, 7, 7, 2]


def row(heads: int, key_heads: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    length = sum(LENGTHS)
    shapes = [(1, number, length, 4) for number in (heads, key_heads, key_heads)]
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2)])
@pytest.mark.parametrize("window", [None, 4])
def test_a_row_is_its_sequences(heads: int, key_heads: int, window: int | None) -> None:
    together, alone = row(heads, key_heads), row(heads, key_heads)
    out, _ = packed_attention(None, *together, None, packed_lengths=LENGTHS, sliding_window=window)
    out.sin().sum().backward()
    start, expected = 0, []
    for length in LENGTHS:
        q, k, v = (x[:, :, start : start + length] for x in alone)
        k, v = (x.repeat_interleave(heads // key_heads, dim=1) for x in (k, v))
        distance = torch.arange(length)[:, None] - torch.arange(length)
        mask = (distance >= 0) & (distance < (window or length))
        expected.append(functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2))
        start += length
    torch.cat(expected, dim=1).sin().sum().backward()
    torch.testing.assert_close(out, torch.cat(expected, dim=1))
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_the_gradient_does_not_fill_a_row_for_each_sequence() -> None:
    """A slice's gradient is the whole row, zeros but for the slice; of many sequences that is most of the update."""
    out, _ = packed_attention(None, *row(4, 4), None, packed_lengths=LENGTHS)
    nodes, names = [out.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None:
            names.add(type(node).__name__)
            nodes += [following for following, _ in node.next_functions]
    assert "SliceBackward0" not in names and any("Split" in name for name in names), names
