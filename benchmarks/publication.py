"""Weight publication against a plain copy of the same bytes, both in GB/s, bit-identical afterwards.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/publication.py [--layers 8] [--hidden 1024] [--repeats 9]

Target: publication at 0.9 or more of a plain copy into the same memory. A model of random weights; its engine is given
two sets of weights by turns, so that every publication changes every tensor. *Publication*:
``VLLMEngine.load_weights``, names, shapes and reset of the prefix cache included. *Rows*: ``copy_`` of each tensor into
its rows of the engine's fused weights, looked up beforehand. *Copy*: ``copy_`` of each into a tensor of its own: other
memory, which has measured up to a quarter faster. *Fingerprint*: every tensor read back and compared bit for bit. Turns
alternate; medians and quartiles of ratios.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "TORCHDYNAMO_DISABLE": "1"}
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch  # noqa: E402
from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=32_768)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    shape = Qwen3Config(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 128,
        num_key_value_heads=max(1, args.hidden // 256),
        head_dim=128,
        tie_word_embeddings=True,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    with tempfile.TemporaryDirectory() as folder:
        Qwen3ForCausalLM(shape).to(dtype).save_pretrained(folder)
        compare(Path(folder), args.dtype, args.repeats)


def compare(folder: Path, dtype: str, repeats: int) -> None:
    from rlpost.engine.vllm import VLLMEngine
    from rlpost.train.weights import iter_buckets, own_weights
    from rlpost.workers.publication import BUCKET_BYTES, same_bits

    engine = VLLMEngine(
        str(folder), max_slots=4, max_model_len=64, dtype=dtype, device="cpu", seed=0, kv_cache_bytes=64 << 20
    )
    models = [Qwen3ForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)) for _ in range(2)]
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.add_(0.01)
    copies = {name: torch.zeros_like(parameter) for name, parameter in models[0].named_parameters()}
    rows = {name: engine.read_weight(name) for name in engine.weight_names}
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in copies.values())

    def buckets(model: Qwen3ForCausalLM):
        return iter_buckets(own_weights(model), max_bytes=BUCKET_BYTES, partitioned=False)

    def copy(model: Qwen3ForCausalLM) -> None:
        for bucket in buckets(model):
            for name, tensor in bucket:
                copies[name].copy_(tensor)

    def publish(model: Qwen3ForCausalLM) -> None:
        engine.load_weights(buckets(model))

    def copy_into_rows(model: Qwen3ForCausalLM) -> None:
        for bucket in buckets(model):
            for name, tensor in bucket:
                rows[name].copy_(tensor)

    def read_back(model: Qwen3ForCausalLM) -> None:
        for bucket in buckets(model):
            for name, tensor in bucket:
                assert same_bits(tensor, engine.read_weight(name)), f"{name} differs after publication"

    sides: dict[str, Callable[[Qwen3ForCausalLM], None]] = {
        "copy": copy,
        "publish": publish,
        "rows": copy_into_rows,
        "fingerprint": read_back,
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    with torch.no_grad():
        for turn in range(repeats + 2):  # the first two touch every page
            for name, side in sides.items():
                started = time.perf_counter()
                side(models[turn % 2])
                if turn >= 2:
                    seconds[name].append(time.perf_counter() - started)
    engine.shutdown()
    print(f"{num_bytes / 1e6:.0f} MB in {len(copies)} tensors, {dtype}, {torch.get_num_threads()} thread(s)")
    for name, taken in seconds.items():
        print(f"{name:12} {num_bytes / statistics.median(taken) / 1e9:6.2f} GB/s")
    for name, plain in (("publish", "rows"), ("publish", "copy"), ("fingerprint", "copy")):
        ratios = sorted(bare / taken for bare, taken in zip(seconds[plain], seconds[name], strict=True))
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        target = "; target >= 0.9" if plain == "rows" else ""
        print(f"rate of {name} / rate of {plain}: {statistics.median(ratios):.3f} ({low:.3f} to {high:.3f}{target})")


if __name__ == "__main__":
    main()
