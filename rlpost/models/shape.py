"""What a model's shape (the keys of its config.json) implies: number of parameters, heads, bytes of KV cache.

Pure arithmetic; opens no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlpost.errors import explain

BYTES = {"float32": 4, "bfloat16": 2}
# Settings under which the model's own head does more than `hidden @ weight^T + bias`; the value is harmless.
HEAD_SETTINGS = {"final_logit_softcapping": None, "logits_scaling": 1.0, "logit_scale": 1.0, "lm_head_multiplier": 1.0}
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # keys of mixture-of-experts
FUSED_TYPES = ("phi3",)  # whose files hold query, key and value in one tensor, where the engine's names do not
DENSE_TYPES = ("qwen2", "qwen3", "llama", "mistral")  # decoders that count_params counts exactly


def count_params(shape: Mapping[str, Any]) -> int:
    """Parameters of a dense decoder from its config.json keys; exact for DENSE_TYPES, an estimate for others."""
    model_type = str(shape.get("model_type", "qwen3"))
    hidden, heads = int(shape["hidden_size"]), int(shape["num_attention_heads"])
    query, key_value = heads * head_size(shape), kv_heads(shape) * head_size(shape)
    attention = hidden * (query + 2 * key_value) + query * hidden
    if model_type == "qwen2" or shape.get("attention_bias"):
        attention += query + 2 * key_value
    if model_type == "qwen3":
        attention += 2 * head_size(shape)  # norms of query and key
    mlp = 3 * hidden * int(shape["intermediate_size"])
    embedding = int(shape["vocab_size"]) * hidden * (1 if shape.get("tie_word_embeddings") else 2)
    return embedding + int(shape["num_hidden_layers"]) * (attention + mlp + 2 * hidden) + hidden


def largest_parameter(shape: Mapping[str, Any]) -> int:
    """Numbers in the largest weight of a dense decoder: the embedding, or a matrix of a layer."""
    hidden, heads = int(shape["hidden_size"]), int(shape["num_attention_heads"])
    return hidden * max(int(shape["vocab_size"]), int(shape["intermediate_size"]), heads * head_size(shape))


def explain_unsupported(shape: Mapping[str, Any], origin: str) -> str:
    """What a run refuses once it has the model: the same in one line, before it is loaded; "" for nothing known."""
    for name, harmless in HEAD_SETTINGS.items():
        value = shape.get(name, harmless)
        if value not in (None, harmless):
            return explain(f"{origin}: {name}", value, "a plain linear head", "choose a model without it")
    for name in EXPERTS:
        if shape.get(name):
            return explain(f"{origin}: {name}", shape[name], "a dense model", "choose one without experts")
    if shape.get("model_type") in FUSED_TYPES:
        do = "choose a model of another type"
        return explain(f"{origin}: model_type", shape["model_type"], "a model with separate query, key and value", do)
    return ""


def kv_heads(shape: Mapping[str, Any]) -> int:
    return int(shape.get("num_key_value_heads") or shape["num_attention_heads"])


def head_size(shape: Mapping[str, Any]) -> int:
    return int(shape.get("head_dim") or int(shape["hidden_size"]) // int(shape["num_attention_heads"]))


def kv_bytes(shape: Mapping[str, Any], *, num_tokens: int, dtype: str, tensor_parallel: int = 1) -> int:
    """KV cache of ``num_tokens`` tokens on each device: key and value x layers x its KV heads x head size.

    An engine's ``tensor_parallel`` devices divide the KV heads; if there are fewer heads, each device has a copy of
    one.
    """
    heads = max(1, kv_heads(shape) // tensor_parallel)
    return 2 * int(shape["num_hidden_layers"]) * heads * head_size(shape) * BYTES[dtype] * num_tokens
