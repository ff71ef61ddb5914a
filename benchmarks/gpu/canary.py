"""Stage 1: the canary in float32 on the demo's model, with Triton's products in float32 and in TF32.

rlpost sets ``TRITON_F32_DEFAULT=ieee``, because vLLM's attention in float32 is Triton's, which would round its operands
to TF32. The part ``tf32`` takes the variable away again and reports what that costs; it cannot fail.
"""

from __future__ import annotations

import os

from benchmarks.gpu.record import Record, Settings
from rlpost.config.compose import load_config

LIMIT = 1e-4  # nats: what a run in float32 allows


def run(settings: Settings, record: Record, triton: str) -> None:
    if triton == "tf32" and not settings.on_gpu:
        record.skip("only a GPU has TF32")
    from rlpost.session import open_session

    demo = ["recipe=math/arithmetic", f"device={settings.device}", "model.dtype=float32", "engine.enforce_eager=true"]
    session = open_session(
        load_config([*demo, "eval.every=-1", "data.train.generator.count=64", "canary_threshold=1000"])
    )
    if triton == "tf32":
        os.environ.pop("TRITON_F32_DEFAULT", None)
    from rlpost.workers.local import start_worker

    with record.timed("start_s"):
        worker = start_worker(session.worker_settings(needs_reference=False))
    publication = worker.device.publish_weights(0)
    record.note(
        canary_mean_nats=publication.canary_mean,
        canary_max_nats=publication.canary_max,
        publish_s=publication.duration_s,
    )
    if triton == "ieee":
        record.require(publication.canary_max < LIMIT, f"canary {publication.canary_max:.2g}, not below {LIMIT:g}")
