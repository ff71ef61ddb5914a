"""Tiny random models that engine and transformers are compared on."""

from __future__ import annotations

from typing import Any

VOCABULARY = 75  # no multiple of vLLM's padding of 64
EOS = 7  # in the model's config; the engine must stop only at the stop tokens it is given


def random_model(seed: int, **shape: Any) -> Any:
    """A model whose distributions are neither flat nor certain; torch's random state stays as it is.

    ``shape``: what differs between tests, keys of the model's configuration with ``model_type``.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        shape.pop("model_type"),
        vocab_size=VOCABULARY,
        intermediate_size=160,
        num_hidden_layers=2,
        head_dim=32,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=None,
        dtype="float32",
        **shape,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).float().eval()
        for parameter in model.parameters():  # norms and biases too: all ones or zeros would hide a mix-up
            if parameter.dim() == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
    return model
