"""Random policies of Qwen3's shapes: a folder with a config and a byte tokenizer, and no weights.

The trainer makes random weights from the config and the seed; the engine starts from dummies, and a publication gives
it the trainer's. So nothing is downloaded, and no gigabytes are written. A token costs what it costs in the real model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil

from benchmarks.gpu.record import Record, Settings
from rlpost.config import Config
from rlpost.config.resolve import resolve
from rlpost.models.shape import count_params
from rlpost.workers.runtime import require_usable, write_environment

GB = 10**9
NORM_FACTOR = 8.0  # on the last norm: without it a random model's tokens are all but equally likely
SPECIAL = ("<bos>", "<eos>", "<pad>")
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 32,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 384,
    },
    "0.6b": {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 3072},
    "1.7b": {"hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 6144},
    "4b": {"hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 9728},
}
LARGEST_FIRST = ("4b", "1.7b", "0.6b")
COMMON = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151_936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "max_position_embeddings": 40_960,
    "rope_theta": 1_000_000.0,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}


def shape_of(size: str) -> dict[str, Any]:
    return {**COMMON, **SHAPES[size]}


def num_params(size: str) -> int:
    return count_params(shape_of(size))


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """What a stage takes at its peak."""

    bytes_per_param: float
    extra_bytes: Callable[[str], float]  # by size: activations, keys and values, what the libraries take
    host_bytes_per_param: float = 2.0


def choose_size(settings: Settings, record: Record, need: Need, which: str = "large") -> str:
    """A shape that fits into the free memory, which is noted. ``large``: at most 4B; ``0.6b``: that one, or the part is
    skipped where the large one of this card is no larger. With ``small`` there is ``tiny`` alone."""
    if settings.small and which != "large":
        record.skip("small")
    if settings.small:
        record.note(size="tiny")
        return "tiny"
    import torch

    device, host = torch.cuda.mem_get_info()[0], psutil.virtual_memory().available
    fitting = [
        size
        for size in LARGEST_FIRST
        if num_params(size) * need.bytes_per_param + need.extra_bytes(size) <= device
        and num_params(size) * need.host_bytes_per_param <= host
    ]
    if not fitting:
        record.skip(f"memory: {device / GB:.0f} GB free, {host / GB:.0f} GB on the host")
    if which != "large" and fitting[0] == which:
        record.skip(f"{which} is the large one of this card")
    size = fitting[0] if which == "large" else which
    record.note(size=size)
    if which == "large" and size != LARGEST_FIRST[0]:
        record.note(instead_of=LARGEST_FIRST[0])
    return size


def write_folder(folder: Path, size: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape_of(size)), encoding="utf-8")
    byte_tokenizer().save_pretrained(str(folder))
    return folder


def byte_tokenizer() -> Any:
    """Ids 0 to 255 are the bytes, then three special tokens. The ids of a larger vocabulary decode to nothing: naming
    150,000 of them takes seconds, each time that the tokenizer is loaded."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *SPECIAL]
    made = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    bos, eos, pad = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=bos, eos_token=eos, pad_token=pad, chat_template=CHAT
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """A folder, and the resolved configuration to build its trainer and its engine from."""

    folder: str
    size: str
    cfg: Config

    @property
    def vocab_size(self) -> int:
        return int(shape_of(self.size)["vocab_size"])

    @property
    def num_params(self) -> int:
        return num_params(self.size)


def prepare(settings: Settings, size: str, folder: Path, **changes: dict[str, Any]) -> Policy:
    """Writes the folder and the environment. ``changes``: by section of the configuration, values by key."""
    cfg = Config()
    cfg = replace(cfg, model=replace(cfg.model, dtype=settings.dtype), engine=replace(cfg.engine, load_format="dummy"))
    for section, values in changes.items():
        cfg = replace(cfg, **{section: replace(getattr(cfg, section), **values)})  # type: ignore[arg-type]
    cfg = resolve(cfg, device=settings.device, threads=1)
    write_folder(folder, size)
    write_environment(
        device=settings.device, dtype=cfg.model.dtype, threads=1, vocab_size=int(shape_of(size)["vocab_size"])
    )
    require_usable(settings.device)
    return Policy(folder=str(folder), size=size, cfg=cfg)


@contextmanager
def weights_made_on(device: str) -> Iterator[None]:
    """New weights are drawn on ``device``: a CPU takes a minute for the four billion of 4B."""
    import torch

    from rlpost.train import deepspeed_trainer

    load_model = deepspeed_trainer.load_model

    def on_device(*arguments: Any, **options: Any) -> Any:
        with torch.device(device):
            return load_model(*arguments, **options)

    with patch.object(deepspeed_trainer, "load_model", on_device):
        yield


def build_random_trainer(policy: Policy, *, total_optimizer_steps: int = 100) -> Any:
    """A trainer with peaked random weights, awake."""
    from rlpost.train.deepspeed_trainer import build_trainer

    with weights_made_on(policy.cfg.device):
        trainer = build_trainer(
            policy.cfg,
            model_folder=policy.folder,
            total_optimizer_steps=total_optimizer_steps,
            needs_reference=False,
            init="random",
        )
    if policy.cfg.train.zero_stage < 3:  # at stage 3 a parameter is in pieces, and no stage here looks at its logits
        sharpen(trainer)
    return trainer


def sharpen(trainer: Any) -> None:
    """Multiply the last norm, and ZeRO's master copy of it, by NORM_FACTOR."""
    import torch
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

    weight = trainer.lm.model.norm.weight
    with torch.no_grad():
        master = safe_get_full_fp32_param(weight)
        if master is not None:
            safe_set_full_fp32_param(weight, NORM_FACTOR * master)
        weight.fill_(NORM_FACTOR)


def random_tokens(length: int, vocab_size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, length).astype(np.int32)


def packed_batch(lengths: list[list[int]], vocab_size: int, seed: int = 0) -> Any:
    """A ``TrainBatch`` of one row for each list of sequence lengths; the last half of each sequence is trained."""
    from rlpost.algos.batch import build_batch, supervised_sequence

    sequences = []
    for number, length in enumerate(length for row in lengths for length in row):
        mask = np.arange(length) >= max(1, length // 2)
        sequences.append(supervised_sequence(random_tokens(length, vocab_size, seed + number), mask))
    return build_batch(sequences, policy_version=0, max_row_tokens=max(sum(row) for row in lengths))


def free_memory() -> None:
    """Give the device back what is no longer referred to."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def used_gb() -> float:
    """Memory of the GPU that is in use, by anyone; 0 on a CPU."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return float((total - free) / GB)


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
