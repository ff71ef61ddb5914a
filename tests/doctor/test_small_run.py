"""Findings of the publication in small: each stage that can fail, and what is said of the stages after it."""

from __future__ import annotations

from typing import Any

import pytest

from rlpost.doctor.programs import Probed
from rlpost.doctor.small_run import check_small_run

STAGES: dict[str, dict[str, Any]] = {
    "torch": {"seconds": 1.25},
    "transformers": {"seconds": 0.5},
    "deepspeed": {"seconds": 0.5},
    "vllm": {"seconds": 3.0},
    "workers": {"attention": ["FLASH_ATTN"]},
    "publication": {"bytes": 461056, "canary": 9.5e-7, "threshold": 1e-4},
    "response": {"tokens": 8},
}
NAMES = ("imports", "trainer and engine", "publication", "response")


def findings(failing: str = "", said: str = "RuntimeError: no"):
    done = list(STAGES)[: list(STAGES).index(failing) if failing in STAGES else 0 if failing else None]
    probed = Probed(results={name: STAGES[name] for name in done}, failures={failing: said} if failing else {})
    found = check_small_run(probed, "cuda")
    assert tuple(finding.name for finding in found) == NAMES
    return found


def test_a_publication_that_works_is_described() -> None:
    assert [finding.found for finding in findings()] == [
        "torch 1.2 s, transformers 0.5 s, deepspeed 0.5 s, vllm 3.0 s",
        "started; vLLM's attention is FLASH_ATTN",
        "461,056 bytes, equal bit for bit; canary 9.5e-07 nats (at most 0.0001)",
        "8 tokens sampled",
    ]


@pytest.mark.parametrize("failing", ["start", "torch", "transformers", "deepspeed", "vllm"])
def test_a_library_that_cannot_be_imported_is_named(failing: str) -> None:
    first, *others = findings(failing, "ImportError: libcudart.so.13: cannot open shared object file")
    assert first.status == "problem" and first.found.startswith(f"{failing}: ImportError: libcudart.so.13")
    assert first.do == "make clean, make install DEVICE=gpu"
    assert {finding.status for finding in others} == {"skipped"}


@pytest.mark.parametrize(("failing", "at"), [("workers", 1), ("publication", 2), ("response", 3)])
def test_after_the_stage_that_failed_nothing_was_reached(failing: str, at: int) -> None:
    found = findings(failing, "canary: got 0.5; expected at most 0.3; check dtype")
    statuses = ["ok"] * at + ["problem"] + ["skipped"] * (3 - at)
    assert [finding.status for finding in found] == statuses
    assert (found[at].found, found[at].do) == ("canary: got 0.5; expected at most 0.3", "check dtype")
    assert "docs/troubleshooting.md" in findings(failing)[at].do


@pytest.mark.parametrize(("failing", "at"), [("vllm", 0), ("workers", 1)])
def test_a_stage_that_took_too_long_is_told_from_one_that_fails(failing: str, at: int) -> None:
    assert "--limit 600" in findings(failing, "not done within 120 s")[at].do
