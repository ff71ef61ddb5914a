"""Loading the policy (and the frozen reference) from a Hugging Face folder. Called by ``train.deepspeed_trainer``."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlpost.errors import ModelError, explain
from rlpost.models.shape import HEAD_SETTINGS
from rlpost.train import attention as packed_attention

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Model types whose attention was compared with ours (tests/train/test_forward.py) or has the same code path.
_PLAIN_ATTENTION = {"qwen2", "qwen3", "llama", "mistral"}


def attention(config: Any, device: str, dtype: torch.dtype) -> str:
    """Flash attention on a GPU when it is installed, else ours, which needs no mask over the whole packed row.

    Models whose attention does more than a causal softmax fall back to transformers' sdpa.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import is_flash_attn_2_available

    if device != "cpu" and dtype == torch.bfloat16 and is_flash_attn_2_available():
        return "flash_attention_2"
    model_class = AutoModelForCausalLM._model_mapping.get(type(config), None)
    plain = getattr(model_class, "_supports_attention_backend", False) and config.model_type in _PLAIN_ATTENTION
    if not plain:
        return "sdpa"
    packed_attention.register()
    return packed_attention.NAME


def load_model(path: Path | str, *, dtype: torch.dtype, device: str, init: str = "pretrained") -> nn.Module:
    """A causal LM in host memory, in training mode with every dropout off.

    path: a folder, or a hub name. init ``random``: fresh weights from the folder's config, under torch's global seed.
    Dropout would make the logprobs of the update differ from those of the same weights a moment before.
    Raises ModelError for a folder without weights or a head this trainer does not reproduce.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    local = Path(path).is_dir()
    options: dict[str, Any] = {"local_files_only": True} if local else {}
    try:
        config = AutoConfig.from_pretrained(path, **options)
        _refuse_unknown_head(config)
        if hasattr(config, "attention_dropout"):
            config.attention_dropout = 0.0
        implementation = attention(config, device, dtype)
        if init == "random":
            lm = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=implementation)
        else:
            lm, found = AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                dtype=dtype,
                attn_implementation=implementation,
                output_loading_info=True,
                **options,
            )
            _refuse_missing_weights(path, found["missing_keys"])
    except ModelError:
        raise
    except Exception as error:  # config and weights that do not fit fail in the library's depths, as anything
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason'}"
        do = f"{reason}; do config.json and the weights belong together?"
        raise ModelError(explain("model.path", str(path), "a Hugging Face causal LM with weights", do)) from error
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return lm.train()


def _refuse_missing_weights(path: Path | str, missing: Collection[str]) -> None:
    """transformers would fill them with fresh random numbers and go on."""
    if missing:
        first, more = min(missing), f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        do = "do config.json and the weights belong together?"
        raise ModelError(explain(f"weights of {path}", f"no {first}{more}", "every weight that config.json needs", do))


def _refuse_unknown_head(config: Any) -> None:
    for name, harmless in HEAD_SETTINGS.items():
        value = getattr(config, name, harmless)
        if value not in (None, harmless):
            raise ModelError(explain(f"the model's {name}", value, "a plain linear head", "choose a model without it"))
