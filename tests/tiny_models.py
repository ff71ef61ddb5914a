"""Folders of tiny models with real tokenizers, for tests of what a folder may hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Gemma's: no system message, and the roles must alternate.
ALTERNATING = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
    "<|im_start|>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
# Llama's: says what day it is, here to the microsecond.
DATED = "<|im_start|>system\nToday is {{ strftime_now('%d %b %Y %H:%M:%S.%f') }}.<|im_end|>\n" + CHATML
# Qwen3's: namespaces, slices, thoughts of earlier turns left out, a loop from behind.
THINKING = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, found=false) %}
{%- for message in messages[::-1] %}
    {%- if not ns.found and message.role == 'user' %}
        {%- set ns.found = true %}
        {%- set ns.last = messages|length - loop.index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'system' and loop.first %}{% continue %}{% endif %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and loop.index0 < ns.last and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- generation %}{{- content }}{% endgeneration %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if tools is defined and tools %}{{- tools | tojson(indent=1) }}{% endif %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""
# Blocks on lines of their own, indented, whose whitespace the sandbox's settings take away.
BLOCKS = """\
{% for message in messages %}
  {% if loop.first %}
  {{ bos_token }}first
  {% endif %}
    {{ {'role': message.role, 'n': loop.index} | tojson }}
  {{ message.content }}
{% endfor %}
  {% if add_generation_prompt %}
  assistant
  {% endif %}
"""
# Llama 3's: options that it sets itself where they are not given, and a system message that is always there.
OPTIONAL = """\
{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|im_start|>system\\n\\nToday Date: " + date_string + "\\n\\n" + system_message + "<|im_end|>" }}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n\\n' + message['content'] | trim + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n\\n' }}{%- endif %}
"""
TEMPLATES = {
    "blocks": BLOCKS,
    "chatml": CHATML,
    "alternating": ALTERNATING,
    "dated": DATED,
    "optional": OPTIONAL,
    "thinking": THINKING,
}
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}


def make_tokenizer(
    *,
    eos: str | None = "<|im_end|>",
    bos: str | None = None,
    chat: str | None = CHATML,
    add_bos: bool = False,
    add_eos: bool = False,
) -> Any:
    """A byte-level BPE tokenizer that transformers reads; special tokens have ids 0 to 4."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(["What is the sum of two and three? The answer is five."] * 20, trainer)
    if add_bos or add_eos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join([f"{bos}:0"] * add_bos + ["$A"] + [f"{eos}:0"] * add_eos),
            special_tokens=[(name, SPECIAL.index(name)) for name in {bos, eos} if name],
        )
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token=bos, pad_token=SPECIAL[0])
    if chat is not None:
        made.chat_template = chat
    return made


def write_model(
    folder: Path,
    *,
    tokenizer: Any = None,
    model_type: str = "qwen2",
    vocab_size: int | None = None,
    weights: bool = False,
    generation: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """A model's folder. ``weights``: a random model that trains; else a stand-in that no one may load."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer or make_tokenizer()
    size = len(tokenizer) if vocab_size is None else vocab_size
    if weights:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.random.fork_rng():
            torch.manual_seed(0)
            made = AutoConfig.for_model(model_type, vocab_size=size, initializer_range=0.1, **SHAPE)
            AutoModelForCausalLM.from_config(made).float().save_pretrained(str(folder))
        (folder / "generation_config.json").unlink(missing_ok=True)
    else:
        import numpy as np
        from safetensors.numpy import save_file

        save_file({"w": np.zeros(3, np.float32)}, folder / "model.safetensors")
        shape = {"model_type": model_type, "vocab_size": size, "tie_word_embeddings": True, **SHAPE}
        (folder / "config.json").write_text(json.dumps(shape))
    tokenizer.save_pretrained(str(folder))
    if config:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder
