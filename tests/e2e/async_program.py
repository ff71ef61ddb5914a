"""The ``rlpost`` command whose engine schedules asynchronously, as vLLM does on a GPU; ``python -m`` this module."""

from __future__ import annotations

import sys
from typing import Any


def main() -> int:
    from rlpost.cli import main as rlpost
    from rlpost.engine.vllm import VLLMEngine
    from tests.engine import async_scheduling

    build = VLLMEngine.__init__

    def build_asynchronous(engine: VLLMEngine, *arguments: Any, **options: Any) -> None:
        async_scheduling.switch_on()  # not before: it imports vLLM, which reads what rlpost puts into the environment
        build(engine, *arguments, **options)
        assert engine._core.batch_queue is not None, "the engine schedules synchronously"

    VLLMEngine.__init__ = build_asynchronous  # type: ignore[method-assign]
    return rlpost()


if __name__ == "__main__":
    sys.exit(main())
