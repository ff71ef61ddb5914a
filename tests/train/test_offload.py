"""What moves to host memory and back keeps its bits, in buffers that are allocated once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rlpost.train import offload
from rlpost.train.offload import FrozenModule, HostBuffers, StatesOffload
from tests.train import cases


def bits(tensors):
    return [tensor.detach().clone().reshape(-1).view(torch.uint8) for tensor in tensors]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_tensors_come_back_bit_for_bit_from_the_same_buffers(dtype):
    torch.manual_seed(3)
    tensors = [(torch.randn(size) * 100).to(dtype) for size in (1, 7, 1000)]
    buffers, places = HostBuffers(), []
    for _ in range(3):
        before = bits(tensors)
        device = [tensor.data_ptr() for tensor in tensors]
        buffers.move_out(tensors)
        assert same(bits(tensors), before)
        places.append([tensor.data_ptr() for tensor in tensors])
        assert not set(places[-1]) & set(device)
        buffers.move_back(tensors, "cpu")
        assert same(bits(tensors), before) and not {t.data_ptr() for t in tensors} & set(places[-1])
        for tensor in tensors:
            tensor.add_(1)  # the next round must copy again
    assert places[0] == places[1] == places[2]


def test_a_list_that_grows_or_changes_gets_buffers_for_what_is_new():
    buffers, first = HostBuffers(), torch.arange(4.0)
    buffers.move_out([first])
    kept = first.data_ptr()
    buffers.move_back([first], "cpu")
    more = [first, torch.arange(9.0), torch.tensor(5.0)]
    buffers.move_out(more)
    assert more[0].data_ptr() == kept and [t.sum().item() for t in more] == [6.0, 36.0, 5.0]
    buffers.move_back(more, "cpu")
    more[1] = torch.arange(3, dtype=torch.int64)  # as after a checkpoint was loaded
    buffers.move_out(more)
    assert more[1].tolist() == [0, 1, 2] and more[2].item() == 5.0


def test_host_copies_are_page_locked_where_there_is_a_gpu(monkeypatch):
    asked = []
    empty = torch.empty

    def recorded(*shape, pin_memory=False, **options):
        asked.append(pin_memory)
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", recorded)
    for gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        HostBuffers().move_out([torch.ones(3)])
    assert asked == [False, True]


def test_stage_3_trains_on_as_if_its_states_had_not_been_away(build):
    """Also before the first step, when AdamW has no states yet. On a CPU both sides are host memory."""
    away, plain = build(3), build(3)
    states = StatesOffload(away.engine)
    assert not states._is_native()
    for step in range(3):
        tensors = states.optimizer_tensors()
        before = bits(tensors)
        states._buffers.move_out(tensors)
        states._buffers.move_back(states.optimizer_tensors(), "cpu")
        assert same(bits(states.optimizer_tensors()), before)
        results = [trainer.update(cases.packed_batch(step), cases.objective) for trainer in (away, plain)]
        assert results[0].loss == results[1].loss and results[0].grad_norm == results[1].grad_norm
    assert len(states.optimizer_tensors()) > len(away.engine.optimizer.fp32_partitioned_groups_flat)
    assert cases.largest_difference(cases.weights_of(away), cases.weights_of(plain)) == 0.0


def test_a_frozen_module_visits_the_device_and_its_host_copy_stays_where_it_is(monkeypatch):
    monkeypatch.setattr(offload, "_copy_to_device", lambda host, device: host.clone())
    module = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 3, dtype=torch.bfloat16))
    tensors = [*module.parameters(), *module.buffers()]
    before = bits(tensors)
    frozen = FrozenModule(module, torch.device("cuda"))
    places = [tensor.data_ptr() for tensor in tensors]
    assert same(bits(tensors), before)
    for _ in range(2):
        with frozen.on_device() as there:
            assert there is module and same(bits(tensors), before)
            assert not {tensor.data_ptr() for tensor in tensors} & set(places)
            for tensor in tensors:
                tensor.data.fill_(9)  # what happens on the device is forgotten
        assert same(bits(tensors), before) and [tensor.data_ptr() for tensor in tensors] == places
    with pytest.raises(KeyError), frozen.on_device():
        raise KeyError("an error in the forward pass")
    assert same(bits(tensors), before)


def test_on_a_cpu_a_frozen_module_is_left_alone():
    module = nn.Linear(2, 2)
    place = module.weight.data_ptr()
    with FrozenModule(module, torch.device("cpu")).on_device() as there:
        assert there is module and module.weight.data_ptr() == place
    assert module.weight.data_ptr() == place
