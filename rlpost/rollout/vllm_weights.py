"""A vLLM model's parameters under their Hugging Face names: publication in, fingerprint out.

vLLM fuses q, k and v into ``qkv_proj``, gate and up into ``gate_up_proj``, and pads the vocabulary. Writing goes
through the model's own ``load_weights``; reading goes through the layout built here from the modules' sizes. The two
share no code, so reading back what was written is a check and not a tautology.

Dense decoders of the Qwen2, Qwen3 and Llama type, unquantised, tensor parallel size 1. Never runs the model, never
touches the prefix cache (the engine does, after a publication). Called by ``rollout.vllm_engine`` only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlpost.errors import ModelError, explain


@dataclass(frozen=True, slots=True)
class Place:
    """Where an HF tensor lives: rows ``start:stop`` of one parameter of one module."""

    module: Any  # torch.nn.Module
    parameter: str
    start: int
    stop: int

    def tensor(self) -> Any:
        """A view, looked up anew each time (a module may have been given another parameter meanwhile)."""
        return getattr(self.module, self.parameter)[self.start : self.stop]


def hf_layout(model: Any) -> dict[str, Place]:
    """HF name -> place, for every parameter of the model; a tied ``lm_head.weight`` names the embedding's rows."""
    fused: Mapping[str, Sequence[str]] = getattr(model, "packed_modules_mapping", {})
    layout: dict[str, Place] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        parent, _, leaf = path.rpartition(".")
        for name, parameter in module.named_parameters(recurse=False):
            if leaf in fused:
                for part, start, stop in _parts(path, module, parameter, fused[leaf]):
                    layout[f"{parent}.{part}.{name}"] = Place(module, name, start, stop)
            else:  # an embedding is padded to a multiple of 64 rows; org_vocab_size is what the checkpoint has
                rows = getattr(module, "org_vocab_size", parameter.shape[0])
                layout[f"{path}.{name}"] = Place(module, name, 0, rows)
    return layout


def _parts(path: str, module: Any, parameter: Any, names: Sequence[str]) -> list[tuple[str, int, int]]:
    sizes = list(getattr(module, "output_sizes", ()))
    if len(sizes) != len(names) or sum(sizes) != parameter.shape[0]:
        raise ModelError(
            explain(
                f"fused weight {path}",
                {"rows": parameter.shape[0], "parts": sizes},
                f"one size for each of {list(names)} adding up to the rows",
                "use a dense Qwen2, Qwen3 or Llama model without quantisation",
            )
        )
    stops = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [(name, stop - size, stop) for name, size, stop in zip(names, sizes, stops, strict=True)]


class EngineWeights:
    """The weights of one vLLM model, by HF name."""

    def __init__(self, model: Any, *, tied: bool) -> None:
        """``tied``: the model's config ties ``lm_head`` to the embedding. Raises ModelError if the engine did not."""
        self._model = model
        self._layout = hf_layout(model)
        self._tied = tied
        _require_unpacked(self._layout)
        if tied:
            self._require_tie()

    @property
    def names(self) -> list[str]:
        """The HF names a publication must bring: every parameter once (a tied ``lm_head.weight`` is not listed)."""
        return [name for name in self._layout if not self._is_alias(name)]

    def read(self, name: str) -> Any:
        """The rows the engine computes with for this HF name: a view in the engine's dtype, on its device."""
        return self._place(name).tensor()

    def load(self, bucket: Sequence[tuple[str, Any]]) -> list[str]:
        """Copy HF-named tensors in place; returns the names written. The tensors may be reused afterwards.

        A tied ``lm_head.weight`` is left out (vLLM refuses it in a bucket without the embedding); the fingerprint
        still compares it with the embedding. Raises ModelError on a name or shape the engine does not have: vLLM
        itself drops an unexpected bias in silence.
        """
        import torch

        tensors = [(name, self._fitting(name, tensor)) for name, tensor in bucket if not self._is_alias(name)]
        with torch.no_grad():
            self._model.load_weights(iter(tensors))
        return [name for name, _ in tensors]

    def _fitting(self, name: str, tensor: Any) -> Any:
        here = self._place(name).tensor()
        if tuple(here.shape) != tuple(tensor.shape):
            raise ModelError(
                explain(
                    f"shape of {name}",
                    tuple(tensor.shape),
                    f"{tuple(here.shape)}, as the engine has it",
                    "start the engine from the folder the trainer's model came from",
                )
            )
        return tensor.to(here.dtype)  # vLLM would convert too, with a warning for each tensor

    def _place(self, name: str) -> Place:
        try:
            return self._layout[name]
        except KeyError:
            raise ModelError(
                explain(
                    "weight name",
                    name,
                    f"one of the engine's {len(self._layout)} names, such as {next(iter(self._layout))}",
                    "publish a dense Qwen2, Qwen3 or Llama model under its Hugging Face names",
                )
            ) from None

    def _is_alias(self, name: str) -> bool:
        return self._tied and name == "lm_head.weight"

    def _require_tie(self) -> None:
        head, embedding = self.read("lm_head.weight"), self.read("model.embed_tokens.weight")
        if head.data_ptr() != embedding.data_ptr():
            raise ModelError(
                explain(
                    "tied word embeddings",
                    "an engine with a separate lm_head",
                    "one tensor for lm_head and embed_tokens",
                    "remove lm_head.weight from the model folder, or set tie_word_embeddings to false in config.json",
                )
            )


def _require_unpacked(layout: Mapping[str, Place]) -> None:
    """A packed linear layer has an empty weight and would go on computing with its packed copy."""
    for name, place in layout.items():
        if not place.tensor().numel():
            raise ModelError(
                explain(
                    f"engine weight {name}",
                    "an empty tensor",
                    "the weight itself, which a publication can overwrite",
                    "report this model and vLLM version: its weights are packed when they are loaded",
                )
            )
