"""Tiny models, packed batches and the slow, obvious reference the trainer is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from rlpost.config import Config
from rlpost.types import PackedRow, TrainBatch

VOCAB = 37


def save_model(folder: Path, *, tied: bool = True, seed: int = 0) -> Path:
    """A two-layer Qwen3 (tied head) or Llama (untied), with weights large enough for sharp distributions."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "tie_word_embeddings": tied,
    }
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(head_dim=8, **shape)) if tied else LlamaForCausalLM(LlamaConfig(**shape))
    model.save_pretrained(folder)
    return folder


def config(stage: int = 1, **train: Any) -> Config:
    cfg = Config()
    cfg.rollout.temperature = 0.8
    cfg.train.zero_stage = stage
    cfg.train.lr = 1e-3
    cfg.train.logprob_chunk_tokens = 7  # several chunks a row
    for key, value in train.items():
        setattr(cfg.train, key, value)
    return cfg


def sequences(seed: int, count: int) -> list[dict[str, np.ndarray]]:
    """Random sequences of 3 to 16 tokens: a prompt, then a response with an advantage per token."""
    random = np.random.default_rng(seed)
    result = []
    for _ in range(count):
        length = int(random.integers(3, 17))
        mask = np.arange(length) >= random.integers(1, length)
        result.append(
            {
                "token_ids": random.integers(0, VOCAB, length),
                "loss_mask": mask,
                "advantages": (random.normal(size=length) * mask).astype(np.float32),
            }
        )
    return result


def pack(samples: list[dict[str, np.ndarray]], first_id: int = 0, padding: int = 0) -> PackedRow:
    """The samples end to end, then padding tokens at position 0, 1, ..."""
    lengths = [len(s["token_ids"]) for s in samples]
    size = sum(lengths) + padding

    def field(parts: list[np.ndarray], dtype: Any, fill: Any = 0) -> np.ndarray:
        return np.concatenate([*parts, np.full(padding, fill)]).astype(dtype)

    return PackedRow(
        token_ids=field([s["token_ids"] for s in samples], np.int64),
        position_ids=np.concatenate([*[np.arange(n) for n in lengths], np.arange(padding)]).astype(np.int64),
        sequence_ids=field([np.full(n, first_id + i) for i, n in enumerate(lengths)], np.int64, -1),
        loss_mask=field([s["loss_mask"] for s in samples], np.bool_, False),
        rollout_logprobs=np.zeros(size, np.float32),
        policy_versions=np.zeros(size, np.int32),
        advantages=field([s["advantages"] for s in samples], np.float32),
    )


def batch_of(rows: list[PackedRow], samples: list[dict[str, np.ndarray]]) -> TrainBatch:
    lengths = np.array([int(s["loss_mask"].sum()) for s in samples], np.int64)
    return TrainBatch(
        rows=tuple(rows),
        num_tokens=int(lengths.sum()),
        num_sequences=int((lengths > 0).sum()),
        sequence_lengths=lengths,
        policy_version=0,
    )


def packed_batch(seed: int, count: int = 6, per_row: int = 3) -> TrainBatch:
    samples = sequences(seed, count)
    rows = [pack(samples[i : i + per_row], i) for i in range(0, count, per_row)]
    return batch_of(rows, samples)


def objective(logprobs: Any, entropy: Any, row: PackedRow, batch: TrainBatch) -> tuple[Any, dict[str, Any]]:
    """A policy gradient with an entropy bonus, over the global number of tokens."""
    mask, advantages = torch.from_numpy(row.loss_mask), torch.from_numpy(row.advantages)
    loss = -((advantages * logprobs + 0.05 * entropy) * mask).sum() / batch.num_tokens
    count = int(mask.sum())
    return loss, {
        "loss/entropy": (entropy.detach()[mask].sum(), count),
        "loss/logprob/max": (logprobs.detach()[mask].max(), count),
    }


def reference_logprobs(model: Any, tokens: np.ndarray, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence alone through the model's own head: (logprobs, entropy) of tokens 1 .. len - 1."""
    logits = model(input_ids=torch.from_numpy(tokens)[None], use_cache=False).logits[0, :-1].float() / temperature
    logp = functional.log_softmax(logits, dim=-1)
    return logp.gather(1, torch.from_numpy(tokens)[1:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


def reference_loss(model: Any, samples: list[dict[str, np.ndarray]], temperature: float) -> torch.Tensor:
    """`objective` over whole samples, one by one, without packing."""
    num_tokens = sum(int(s["loss_mask"].sum()) for s in samples)
    total = torch.zeros(())
    for s in samples:
        logprobs, entropy = reference_logprobs(model, s["token_ids"], temperature)
        mask, advantages = torch.from_numpy(s["loss_mask"][1:]), torch.from_numpy(s["advantages"][1:])
        total = total - ((advantages * logprobs + 0.05 * entropy) * mask).sum() / num_tokens
    return total


class PlainLoop:
    """The plain PyTorch loop: AdamW, the clipped global norm, nothing else."""

    def __init__(self, folder: Path, *, temperature: float = 0.8, lr: float = 1e-3, clip: float = 1.0) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, betas=(0.9, 0.999), weight_decay=0.0)
        self.temperature, self.clip = temperature, clip

    def update(self, samples: list[dict[str, np.ndarray]]) -> tuple[float, float, dict[str, torch.Tensor]]:
        """(loss, gradient norm before clipping, the gradients before clipping)."""
        self.optimizer.zero_grad()
        loss = reference_loss(self.model, samples, self.temperature)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in self.model.named_parameters()}
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip or float("inf"))
        self.optimizer.step()
        return float(loss.detach()), float(norm), gradients


def weights_of(trainer: Any, max_bytes: int = 4096) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for bucket in trainer.iter_weights(max_bytes) for name, tensor in bucket}


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)
