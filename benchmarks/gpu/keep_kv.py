"""Stage 4: samples that stay in the engine over publications, with all slots full (part ``slots``), and with a KV cache
that is too small for them (part ``full``), so that requests wait for room when the step ends.

The demo's model and prompts, whose responses differ in length. What could go wrong is an assertion or a loop without
end: the stage's time limit is its test.
"""

from __future__ import annotations

from benchmarks.gpu.record import Record, Settings
from rlpost.config.compose import load_config

STEPS = 3


def run(settings: Settings, record: Record, which: str) -> None:
    slots, groups = (8, 4) if settings.small else (64, 32)
    demo = ["recipe=math/arithmetic", f"device={settings.device}", f"model.dtype={settings.dtype}"]
    demo += ["rollout.keep_kv=true", f"engine.max_slots={slots}", f"rollout.groups_per_step={groups}"]
    demo += ["eval.every=-1", "data.train.generator.count=200", "canary_threshold=1000"]
    demo += ["rollout.samples_per_group=4"] if settings.small else []
    from rlpost.session import open_session

    session = open_session(
        load_config([*demo, *([] if which == "slots" else [f"engine.kv_cache_bytes={too_little(settings)}"])])
    )
    from rlpost.prompts.cursor import draw_prompts, open_cursor
    from rlpost.rollout.buffer import RolloutBuffer
    from rlpost.rollout.collect import CollectSettings, collect
    from rlpost.rollout.strategy import RolloutStrategy
    from rlpost.workers.local import start_worker

    worker = start_worker(session.worker_settings(needs_reference=False))
    worker.device.publish_weights(0)
    prompts = draw_prompts(open_cursor(session.train_sets, seed=0, shuffle=True), session.train_sets)
    buffer = RolloutBuffer(RolloutStrategy.of(session.cfg.rollout))
    rules = CollectSettings(
        max_in_flight=slots,  # a run would lower it to what the KV cache holds
        max_response_tokens=session.cfg.rollout.max_response_tokens,
        sampling=session.sampling,
        seed=0,
        max_filtered_groups=512,
        reject=lambda group: None,
        keep_kv=True,
    )
    kept, waited = [], 0
    for step in range(STEPS):
        with worker.device.generating():
            stats = collect(worker.engine, buffer, prompts, session.scorer, rules, step=step)
        buffer.settle()
        kept.append(stats.num_kept)
        waited = max(waited, slots - max(stats.work.running))
        worker.device.publish_weights(step + 1)
    capacity = worker.engine.kv_capacity
    assert capacity is not None
    record.note(slots=slots, kv_tokens=capacity.tokens, kept_samples="/".join(map(str, kept)), waiting_max=waited)
    record.require(sum(kept) > 0, "no sample was kept over a publication")
    if which == "slots":
        record.require(waited == 0, f"{waited} slots stayed empty: the KV cache was to hold all of them")
    else:
        record.require(waited > 0, "no request waited for room: the KV cache was to be too small")


def too_little(settings: Settings) -> int:
    """Bytes of KV cache for two responses of full length, of the demo's model."""
    from rlpost.config.locations import resolve_path
    from rlpost.engine.kv_budget import kv_bytes_needed
    from rlpost.engine.vllm import read_shape

    shape = read_shape(resolve_path("rlpost://arithmetic"))
    return kv_bytes_needed(shape, max_slots=2, max_model_len=256, dtype=settings.dtype)
