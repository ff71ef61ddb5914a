"""A vLLM model's parameters under their Hugging Face names: publication in, fingerprint out.

vLLM fuses q, k and v into ``qkv_proj``, gate and up into ``gate_up_proj``, and pads the vocabulary. The layout built
here from the modules' sizes says which rows hold which tensor. It is not trusted until proven: a tensor is written
through the model's own ``load_weights`` until that was seen to change the tensor's slice into the tensor's bits. Only
then is it copied there directly, which saves the loader's work for each tensor and the copy needed for a conversion.

Dense decoders of the Qwen2, Qwen3 and Llama type, unquantized. If an engine spans devices (tensor parallelism), each
member holds its part of most tensors; whole tensors are published to every member, which takes its part. Never runs
the model, never touches the prefix cache (the engine does, after a publication). Called by ``engine.vllm``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlpost.errors import ModelError, explain


@dataclass(frozen=True, slots=True)
class WeightSlice:
    """Where an HF tensor lives: rows ``start:stop`` of one parameter of one module hold it, or a part of it.

    A member of an engine that spans devices holds what begins at ``offset`` along ``dim``; other dimensions are whole.
    """

    module: Any  # torch.nn.Module
    parameter: str
    start: int
    stop: int
    whole: tuple[int, ...]  # shape of the HF tensor
    dim: int = 0
    offset: int = 0
    padding: int = 0  # rows from ``stop`` on that hold zeros

    def tensor(self) -> Any:
        """A view."""
        return self._parameter()[self.start : self.stop]

    def part_of(self, tensor: Any) -> Any:
        """The part of a tensor of shape ``whole`` that belongs here: a view."""
        size = self.stop - self.start if self.dim == 0 else self._parameter().shape[self.dim]
        return tensor.narrow(self.dim, self.offset, size)

    def write(self, tensor: Any) -> None:
        """Copies the part of a tensor of shape ``whole`` that belongs here, of any dtype; padding becomes zeros
        again."""
        self.tensor().copy_(self.part_of(tensor))
        if self.padding:
            self._parameter()[self.stop : self.stop + self.padding].zero_()

    def _parameter(self) -> Any:
        """Looked up every time: the module's parameter may have been replaced."""
        return getattr(self.module, self.parameter)


def hf_layout(model: Any) -> dict[str, WeightSlice]:
    """HF name -> slice, for every parameter of the model; a tied ``lm_head.weight`` names the embedding's rows."""
    fused: Mapping[str, Sequence[str]] = getattr(model, "packed_modules_mapping", {})
    layout: dict[str, WeightSlice] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        parent, _, leaf = path.rpartition(".")
        for name, parameter in module.named_parameters(recurse=False):
            if leaf in fused:
                for part, weight_slice in _fused_slices(path, module, name, parameter, fused[leaf]):
                    layout[f"{parent}.{part}.{name}"] = weight_slice
            else:
                layout[f"{path}.{name}"] = _slice_of(module, name, parameter)
    return layout


def _slice_of(module: Any, name: str, parameter: Any) -> WeightSlice:
    shape = tuple(parameter.shape)
    vocabulary = getattr(module, "org_vocab_size", None)
    if vocabulary is not None:  # its rows are padded to a multiple of 64; org_vocab_size is the checkpoint's
        held = module.shard_indices
        first, last = held.org_vocab_start_index, held.org_vocab_end_index
        rows = last - first
        return WeightSlice(module, name, 0, rows, (vocabulary, *shape[1:]), 0, first, shape[0] - rows)
    columns = getattr(module, "input_size_per_partition", None)
    if len(shape) == 2 and columns is not None and columns < module.input_size:  # each member has some input columns
        return WeightSlice(module, name, 0, shape[0], (shape[0], module.input_size), 1, module.tp_rank * columns)
    return WeightSlice(module, name, 0, shape[0], shape)


def _fused_slices(
    path: str, module: Any, name: str, parameter: Any, parts: Sequence[str]
) -> Iterator[tuple[str, WeightSlice]]:
    """Each part's rows here. Members have rows of every part; if there are fewer key and value heads than members, they
    are repeated."""
    sizes = list(getattr(module, "output_partition_sizes", ()))
    if len(sizes) != len(parts) or sum(sizes) != parameter.shape[0]:
        raise ModelError(
            explain(
                f"fused weight {path}",
                {"rows": parameter.shape[0], "parts": sizes},
                f"one size for each of {list(parts)} adding up to the rows",
                "use a dense Qwen2, Qwen3 or Llama model without quantization",
            )
        )
    start = 0
    for part, size in zip(parts, sizes, strict=True):
        copies = getattr(module, "num_kv_head_replicas", 1) if part in ("k_proj", "v_proj") else 1
        whole = (size * module.tp_size // copies, *parameter.shape[1:])
        yield part, WeightSlice(module, name, start, start + size, whole, 0, module.tp_rank // copies * size)
        start += size


class EngineWeights:
    """The weights of one vLLM model, by HF name."""

    def __init__(self, model: Any, *, tied: bool) -> None:
        """``tied``: the model's config ties ``lm_head`` to the embedding. Raises ModelError if the engine did not."""
        self._model = model
        self._layout = hf_layout(model)
        self._tied = tied
        self._proven: set[str] = set()  # names whose slices vLLM's loader was seen to write
        _require_unpacked(self._layout)
        if tied:
            self._require_tie()

    @property
    def names(self) -> list[str]:
        """The HF names that a publication must contain: every parameter once (no tied ``lm_head.weight``)."""
        return [name for name in self._layout if not self._is_alias(name)]

    def read(self, name: str) -> Any:
        """The rows the engine computes with for this HF name: a view in the engine's dtype, on its device."""
        return self._find(name).tensor()

    def part_of(self, name: str, tensor: Any) -> Any:
        """What :meth:`read` must equal, from a whole HF tensor: all of it unless the engine spans devices."""
        return self._find(name).part_of(tensor)

    def load(self, bucket: Sequence[tuple[str, Any]]) -> list[str]:
        """Copy HF-named tensors in place; returns the names written. The tensors may be reused afterwards.

        A tied ``lm_head.weight`` is skipped (vLLM refuses it in a bucket without the embedding); the fingerprint still
        compares it with the embedding. Raises ModelError for a name or shape the engine does not have, before anything
        of the bucket is written: vLLM itself silently drops an unexpected bias.
        """
        import torch

        tensors = [(name, self._fitting(name, tensor)) for name, tensor in bucket if not self._is_alias(name)]
        unproven = []
        with torch.no_grad():
            for name, tensor in tensors:
                if name in self._proven:
                    self._layout[name].write(tensor)
                else:
                    unproven.append((name, tensor))
            if unproven:
                self._load_and_prove(unproven)
        return [name for name, _ in tensors]

    def _load_and_prove(self, bucket: Sequence[tuple[str, Any]]) -> None:
        """Through vLLM's loader. A slice that already held the tensor, as after startup, proves nothing."""
        # vLLM would also convert, but with a warning for each tensor
        tensors = {name: tensor.to(self.read(name)) for name, tensor in bucket}
        parts = {name: self.part_of(name, tensor) for name, tensor in tensors.items()}
        changing = [name for name, part in parts.items() if not self.read(name).equal(part)]
        self._model.load_weights(iter(tensors.items()))
        self._proven.update(name for name in changing if self.read(name).equal(parts[name]))

    def _fitting(self, name: str, tensor: Any) -> Any:
        part = self._find(name)
        if part.whole != tuple(tensor.shape):
            raise ModelError(
                explain(
                    f"shape of {name}",
                    tuple(tensor.shape),
                    f"{part.whole}, as in the engine",
                    "start the engine from the folder that the trainer's model came from",
                )
            )
        return tensor

    def _find(self, name: str) -> WeightSlice:
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


def _require_unpacked(layout: Mapping[str, WeightSlice]) -> None:
    """A packed linear layer has an empty weight and would keep computing with its packed copy."""
    for name, part in layout.items():
        if not getattr(part.module, part.parameter).numel():
            raise ModelError(
                explain(
                    f"engine weight {name}",
                    "an empty tensor",
                    "the weight itself, which a publication can overwrite",
                    "report this model and vLLM version: its weights are packed when they are loaded",
                )
            )
