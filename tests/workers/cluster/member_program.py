"""One of two members of a real engine, started by test_members.py: RANK, then the folder with the model and the store.

Publishes, scores, generates and aborts in lockstep, then is put out of step. Results go to ``results-RANK.pt``.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

WORLD = 2
MAX_MODEL_LEN = 160
PROMPTS = [np.arange(3 + 5 * n, 40 + 4 * n, dtype=np.int32) % 75 for n in range(6)]


def main(rank: int, folder: Path) -> None:
    os.environ.update(
        DS_ACCELERATOR="cpu",
        RANK=str(rank),
        WORLD_SIZE=str(WORLD),
        LOCAL_RANK="0",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_LOGGING_LEVEL="ERROR",
    )
    import torch
    import torch.distributed as dist
    from safetensors.torch import load_file

    store = dist.FileStore(str(folder / "store"), WORLD)
    store.set_timeout(timedelta(minutes=3))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    engine, vllm = build(rank, folder)
    weights = load_file(folder / "published.safetensors")
    mapped = Path("/proc/self/maps").read_text().splitlines()
    results: dict[str, Any] = {
        "shared_memory": [line for line in mapped if "/dev/shm/" in line and not line.endswith("(deleted)")]
    }
    for shift in (1, 0):  # the second time they are written without vLLM's loader
        engine.load_weights([[(name, tensor + shift)] for name, tensor in weights.items()])
    parts = {name: (engine.part_of_weight(name, tensor), engine.read_weight(name)) for name, tensor in weights.items()}
    results["equal"] = [name for name, (part, held) in parts.items() if part.equal(held)]
    results["parts"] = {name: part.clone() for name, (part, _) in parts.items()}
    results["scores"] = engine.score([p[:30] for p in PROMPTS])
    results["generated"] = generate(rank, engine, range(6))
    results["aborted"] = generate(rank, engine, range(6), stop_after=5)
    results["in_flight"] = engine.num_in_flight
    results["again"] = generate(rank, engine, range(6))
    results["message"] = fall_out_of_step(rank, engine, vllm)
    torch.save(results, folder / f"results-{rank}.pt")
    os._exit(0)  # an engine that was stopped in the middle of a step has no good order to end in


def build(rank: int, folder: Path) -> tuple[Any, Any]:
    from rlpost.engine.lockstep import LockstepEngine
    from rlpost.engine.tensor_parallel_group import form_groups
    from rlpost.engine.vllm import VLLMEngine

    vllm = VLLMEngine(
        str(folder / "model"),
        max_slots=8,
        max_model_len=MAX_MODEL_LEN,
        dtype="float32",
        device="cpu",
        seed=0,
        tensor_parallel=WORLD,
    )
    engine = LockstepEngine(vllm, form_groups([range(WORLD)], rank))
    vllm.watch_batches(engine.agree_on_batch)
    return engine, vllm


def generate(rank: int, engine: Any, numbers: Any, stop_after: int = 1000) -> dict[str, tuple[list[int], list[float]]]:
    """Tokens and logprobs by request; the second member hears of them from the first only, and returns nothing."""
    from rlpost.engine.protocol import Request, SamplingSettings

    if rank > 0:
        engine.follow(lambda: None)
        return {}
    sampling = SamplingSettings(temperature=0.8, stop_token_ids=(7,))
    requests = [
        Request(request_id=str(n), parts=(PROMPTS[n],), max_new_tokens=20 + 5 * n, seed=n, sampling=sampling)
        for n in numbers
    ]
    engine.submit(requests)
    generated: dict[str, tuple[list[int], list[float]]] = {r.request_id: ([], []) for r in requests}
    while engine.num_in_flight and stop_after:
        for delta in engine.step().deltas:
            generated[delta.request_id][0].extend(delta.token_ids.tolist())
            generated[delta.request_id][1].extend(delta.logprobs.tolist())
        stop_after -= 1
    engine.abort_all()
    engine.end()
    return generated


def fall_out_of_step(rank: int, engine: Any, vllm: Any) -> str:
    """The second member's vLLM loses a request without anybody being told; what each member then says."""
    from rlpost.errors import RunError

    step, steps = vllm.step, 0

    def loses_one() -> Any:
        nonlocal steps
        steps += 1
        if steps == 4:
            vllm._engine.abort_request(["2"])
        return step()

    if rank == 1:
        vllm.step = loses_one
    try:
        generate(rank, engine, range(6))
    except RunError as error:
        return str(error)
    return "nothing was noticed"


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
