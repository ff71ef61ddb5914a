"""The forward pass of one packed row: a logprob and an entropy for every token the caller asks for.

Owns ``PolicyModule``, what DeepSpeed wraps, and the choice of positions. Never sees a loss, an optimizer or a batch.
Called by ``train.deepspeed_trainer`` for the policy and for the frozen reference, and by ``sft``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from rlpost.train import attention
from rlpost.train.head_logprobs import head_logprobs
from rlpost.types import PackedRow


class PolicyModule(nn.Module):
    """A Hugging Face causal LM whose forward pass returns logprobs and entropies of tokens instead of logits.

    The head is applied here and not by the model, so that ZeRO-3, which gathers parameters for the forward pass of the
    module it wraps, gathers the head's weight too.
    """

    def __init__(self, lm: nn.Module, *, chunk_tokens: int = 1024) -> None:
        super().__init__()
        self.lm = lm
        self.chunk_tokens = chunk_tokens

    def forward(
        self,
        token_ids: torch.Tensor,
        position_ids: torch.Tensor,
        positions: torch.Tensor,
        temperature: float = 1.0,
        lengths: list[int] | None = None,
    ) -> torch.Tensor:
        """token_ids, position_ids i64[L] of ONE packed row; positions i64[N], ascending, none the first of a sequence;
        lengths of its sequences, which are otherwise read off position_ids (on a GPU, that waits for it).

        Returns f32[2, L], the logprobs and the entropies; position t describes token t given the tokens before it in
        its own sequence, and every position not asked for is 0. They are one tensor because ZeRO-3 traces a module's
        backward pass by its outputs: with two, a rank whose loss leaves the entropy out would make other collective
        calls than one whose loss uses it, and hang. Sequences are kept apart by position_ids that restart at 0:
        transformers builds the block mask from them only without an attention mask and without a cache, and flash
        attention only for a batch of one row.
        """
        hidden = _backbone(self.lm)(
            input_ids=token_ids.unsqueeze(0),
            position_ids=position_ids.unsqueeze(0),
            attention_mask=None,
            use_cache=False,
            **self._packing(position_ids, lengths),
        ).last_hidden_state[0]
        head = self.lm.get_output_embeddings()
        logprobs, entropy = head_logprobs(
            hidden.index_select(0, positions - 1),
            head.weight,
            token_ids.index_select(0, positions),
            bias=getattr(head, "bias", None),
            temperature=temperature,
            chunk_tokens=self.chunk_tokens,
        )
        zeros = logprobs.new_zeros(2, token_ids.shape[0])
        return zeros.index_copy(1, positions, torch.stack((logprobs, entropy)))

    def _packing(self, position_ids: torch.Tensor, lengths: list[int] | None) -> dict[str, Any]:
        """What our attention needs to know of the row; the others read it off position_ids themselves."""
        if self.lm.config._attn_implementation != attention.NAME:
            return {}
        lengths = attention.sequence_lengths(position_ids.cpu().numpy()) if lengths is None else lengths
        return attention.describe_row(lengths, position_ids.device)


def trainable_positions(row: PackedRow) -> np.ndarray:
    """i64[N]: the positions a loss may read. The first token of a sequence has no logprob and is never among them."""
    return np.flatnonzero(row.loss_mask & (row.position_ids > 0))


def _backbone(lm: nn.Module) -> nn.Module:
    """The model without its head; its last hidden state is what the head takes."""
    decoder = lm.get_decoder() if hasattr(lm, "get_decoder") else None
    return decoder if decoder is not None and decoder is not lm else lm.base_model
