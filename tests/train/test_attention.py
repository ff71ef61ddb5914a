"""Attention over a packed row: equal to attention over each sequence alone, and its gradient costs no more."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from rlpost.train import attention
from rlpost.train.attention import describe_row, packed_attention

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
    out, _ = packed_attention(
        None, *together, None, **describe_row(LENGTHS, torch.device("cpu")), sliding_window=window
    )
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
    out, _ = packed_attention(None, *row(4, 4), None, **describe_row(LENGTHS, torch.device("cpu")))
    nodes, names = [out.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None:
            names.add(type(node).__name__)
            nodes += [following for following, _ in node.next_functions]
    assert "SliceBackward0" not in names and any("Split" in name for name in names), names


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2)])
@pytest.mark.parametrize("window", [None, 4])
def test_what_one_kernel_for_the_row_is_asked_for(monkeypatch, heads: int, key_heads: int, window: int | None) -> None:
    """The kernel itself needs a GPU; a plain stand-in with its definition of the arguments takes its place."""
    inputs = row(heads, key_heads)
    expected, _ = packed_attention(
        None, *inputs, None, **describe_row(LENGTHS, torch.device("cpu")), scaling=0.3, sliding_window=window
    )

    def kernel(q, k, v, starts, key_starts, longest, longest_key, *, scale, window_size, enable_gqa):
        """q, k, v [L, heads, D]; window_size: tokens to the left and right, beside the token itself, -1: all."""
        assert starts is key_starts and starts.dtype == torch.int32 and longest == longest_key == max(LENGTHS)
        assert enable_gqa == (q.shape[1] != k.shape[1])
        left, right = window_size
        assert right == 0, "causal"
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        outputs = []
        for start, end in zip(starts[:-1], starts[1:], strict=True):
            one, other, values = (x[start:end].transpose(0, 1) for x in (q, k, v))
            distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
            seen = (distance >= 0) & ((distance <= left) if left >= 0 else True)
            weights = (one @ other.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf).softmax(-1)
            outputs.append((weights @ values).transpose(0, 1))
        return torch.cat(outputs)

    monkeypatch.setattr(attention, "_has_kernel", lambda query: True)
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    found, none = packed_attention(
        None, *inputs, None, **describe_row(LENGTHS, torch.device("cpu")), scaling=0.3, sliding_window=window
    )
    assert none is None
    torch.testing.assert_close(found, expected)
