"""What ``make gpu-check`` chooses for a card, and how it tells that a bit changed: as far as that needs no GPU."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.gpu import random_policy
from benchmarks.gpu.random_policy import GB, Need, choose_size, num_params, packed_batch, shape_of, write_folder
from benchmarks.gpu.record import Record, Settings, Skipped, read

ON_GPU = Settings(device="cuda", small=False)
# The heaviest of the stages: an update beside the engine's weights.
NEED = Need(bytes_per_param=28, extra_bytes=lambda size: 6 * GB, host_bytes_per_param=24)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine with so many GB free, on the card and on the host."""
    import torch

    def make(card_gb: float, host_gb: float = 512.0) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(card_gb * GB), int(1.05 * card_gb * GB)))
        memory = SimpleNamespace(available=int(host_gb * GB))
        monkeypatch.setattr(random_policy.psutil, "virtual_memory", lambda: memory)

    return make


@pytest.mark.parametrize(
    ("card_gb", "host_gb", "large", "small"),
    [
        (150, 512, "4b", "0.6b"),
        (84, 512, "1.7b", "0.6b"),
        (47, 512, "0.6b", None),
        (24.5, 64, "0.6b", None),
        (150, 64, "1.7b", "0.6b"),
        (150, 24, "0.6b", None),
    ],
)
def test_the_shape_fits_the_card_and_the_host(
    machine: Any, tmp_path: Path, card_gb: float, host_gb: float, large: str, small: str | None
) -> None:
    machine(card_gb, host_gb)
    record = Record(tmp_path / "large")
    assert choose_size(ON_GPU, record, NEED) == large
    expected = {"size": large} if large == "4b" else {"size": large, "instead_of": "4b"}
    assert read(tmp_path / "large").figures == expected, "the line says so"
    if small is None:
        with pytest.raises(Skipped, match="the large one of this card"):
            choose_size(ON_GPU, Record(tmp_path / "small"), NEED, "0.6b")
    else:
        assert choose_size(ON_GPU, Record(tmp_path / "small"), NEED, "0.6b") == small


@pytest.mark.parametrize(("card_gb", "host_gb"), [(16, 512), (150, 8)])
def test_where_nothing_fits_the_part_is_skipped(machine: Any, tmp_path: Path, card_gb: float, host_gb: float) -> None:
    machine(card_gb, host_gb)
    with pytest.raises(Skipped):
        choose_size(ON_GPU, Record(tmp_path / "record"), NEED)
    assert read(tmp_path / "record").skipped == f"memory: {card_gb} GB free, {host_gb} GB on the host"


def test_the_shapes_are_qwen3s(tmp_path: Path) -> None:
    """Parameters as published: 0.6B, 1.7B and 4.0B; the folder is one that rlpost takes."""
    from rlpost.models.files import check_shape

    published = {"0.6b": 0.596e9, "1.7b": 1.72e9, "4b": 4.02e9}
    assert {size: num_params(size) for size in published} == pytest.approx(published, rel=2e-3)
    for size in ("tiny", *published):
        check_shape(shape_of(size), size)
    names = {file.name for file in write_folder(tmp_path / "m", "tiny").iterdir()}
    assert {"config.json", "tokenizer.json"} <= names and not any("safetensors" in name for name in names)


@pytest.mark.parametrize("lengths", [[[7]], [[4096, 3], [16]], [[5, 5, 5], [2, 2]]])
def test_a_batch_has_the_rows_that_were_asked_for(lengths: list[list[int]]) -> None:
    batch = packed_batch(lengths, vocab_size=50, seed=random.randrange(1000))
    assert sorted(len(row.token_ids) for row in batch.rows) == sorted(map(sum, lengths))
    assert batch.num_tokens == sum(n - max(1, n // 2) for row in lengths for n in row)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_sum_of_bits_sees_every_change(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from benchmarks.gpu import states

    monkeypatch.setattr(states, "PART_NUMBERS", 100)
    values = torch.randn(37, 11).to(getattr(torch, dtype))
    before = states.bit_sum(values)
    assert states.bit_sum(values.clone()) == before
    for _ in range(50):
        changed = values.clone()
        flat = changed.view(-1)
        i, j = random.sample(range(len(flat)), 2)
        word = {"bfloat16": torch.int16, "float32": torch.int32}[dtype]
        flat.view(word)[i] ^= 1
        assert states.bit_sum(changed) != before, "a flipped bit"
        flat.view(word)[i] ^= 1
        flat[i], flat[j] = flat[j].clone(), flat[i].clone()
        if not torch.equal(changed, values):
            assert states.bit_sum(changed) != before, f"{i} and {j} changed places"
