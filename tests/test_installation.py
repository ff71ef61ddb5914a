"""The heavy libraries import together: the pins fit each other, whatever `pip check` says of what was left out."""

from __future__ import annotations

import os
import subprocess
import sys

MODEL_AND_ENGINE = """
from transformers import Qwen3Config, Qwen3ForCausalLM

shape = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
Qwen3ForCausalLM(Qwen3Config(**shape, num_attention_heads=1, num_key_value_heads=1, head_dim=8))
from vllm import LLM, SamplingParams
import deepspeed
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from rlpost.preflight.check_values import CPU_HEAD_SIZES

sizes = CPUAttentionBackend.get_supported_head_sizes()
assert sorted(sizes) == sorted(CPU_HEAD_SIZES), sizes
print("imported")
"""


def test_a_transformers_model_vllm_and_deepspeed_import_together() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MODEL_AND_ENGINE],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.stdout.strip().endswith("imported"), done.stderr[-3000:]
