"""APRIL's scheduler as published, for comparison: the loop of ``generate_rollout_async`` in THUDM/slime
(``slime/rollout/sglang_rollout.py``, which contains APRIL's code), reduced to what decides who runs when.

A step submits a whole wave of ``oversample`` x N groups: those aborted in the last step first, then new ones, first in
first out. It ends when N groups are complete; a group that completes together with the N-th is dropped, the others are
aborted and return to the buffer. In that code, slots are held by sample (a semaphore around each request):
``hold="sample"``. With ``hold="group"`` a group takes all its slots when it starts and releases them when its slowest
sample is done. There is no bound on staleness. Not included: filters (none rejects here, so one wave per step is
enough) and retokenization (token ids are kept). Called by ``bench.rollout``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from rlpost.engine.protocol import Engine, EngineWork, Request
from rlpost.rollout.collect import sample_seed
from rlpost.simulation.account import StepAccount
from rlpost.simulation.strategies import Workload
from rlpost.types import Prompt


@dataclass(slots=True)
class _Sample:
    request_id: str
    parts: list[tuple[int, np.ndarray]] = field(default_factory=list)  # (step, token ids) of every delta
    finished: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(len(tokens) for _, tokens in self.parts)


@dataclass(slots=True)
class _Group:
    prompt: Prompt
    samples: list[_Sample]

    @property
    def complete(self) -> bool:
        return all(s.finished for s in self.samples)

    @property
    def num_tokens(self) -> int:
        return sum(s.num_tokens for s in self.samples)


def run_published(
    engine: Engine, load: Workload, *, oversample: float, hold: str, num_steps: int
) -> Iterator[StepAccount]:
    """One account per step. ``hold``: the holder of slots, "sample" or "group" (then C must be at least G)."""
    assert hold == "sample" or load.settings.max_in_flight >= load.samples_per_group
    prompts = load.prompts()
    buffer: list[_Group] = []
    for step in range(num_steps):
        load.publish()
        wave_size = int(oversample * load.groups_per_step)
        wave, buffer = buffer[:wave_size], buffer[wave_size:]
        wave += [_new_group(next(prompts), load.samples_per_group) for _ in range(wave_size - len(wave))]
        run = _Step(engine, load, wave, step=step, hold=hold)
        run.generate()
        buffer = run.pending() + buffer
        yield run.account(held=sum(g.num_tokens for g in buffer))


class _Step:
    """One step over one wave."""

    def __init__(self, engine: Engine, load: Workload, wave: list[_Group], *, step: int, hold: str) -> None:
        self.engine, self.load, self.wave, self.step, self.hold = engine, load, wave, step, hold
        self.slots = min(load.settings.max_in_flight, engine.max_slots)
        self.started_s, self.duration_s = engine.now(), 0.0
        self.queue = deque(wave)  # groups with samples that have not been started yet
        self.starting: deque[_Sample] = deque()  # samples of the groups taken from it, with hold="sample"
        self.holding: list[_Group] = []  # groups that hold slots, with hold="group"
        self.running: dict[str, tuple[_Group, _Sample]] = {}
        self.done: list[_Group] = []
        self.dropped: list[_Group] = []
        self.generated = self.replayed = self.prefilled = 0
        self.work = EngineWork()

    def generate(self) -> None:
        """Run until N groups are complete; then abort."""
        while len(self.done) < self.load.groups_per_step:
            iteration_started = self.engine.now()
            self._fill_slots()
            result = self.engine.step()
            for delta in result.deltas:
                group, sample = self.running[delta.request_id]
                sample.parts.append((self.step, delta.token_ids))
                self.generated += len(delta.token_ids)
                if delta.finish_reason:
                    del self.running[delta.request_id]
                    sample.finished = True
                    if group.complete:
                        enough = len(self.done) >= self.load.groups_per_step
                        (self.dropped if enough else self.done).append(group)
            self.prefilled += result.num_prefill_tokens
            self.work.add_step(self.engine.now() - iteration_started, result)
        last = self.engine.abort_all()
        assert not last.deltas, "the benchmarked engines deliver all tokens with each step"
        self.duration_s = self.engine.now() - self.started_s

    def pending(self) -> list[_Group]:
        ended = {id(g) for g in (*self.done, *self.dropped)}
        return [g for g in self.wave if id(g) not in ended]

    def account(self, *, held: int) -> StepAccount:
        samples = [s for g in self.done for s in g.samples]
        parts = [part for s in samples for part in s.parts]
        return StepAccount(
            trained=sum(len(tokens) for _, tokens in parts),
            carried=sum(len(tokens) for step, tokens in parts if step < self.step),
            held=held,
            generated=self.generated,
            discarded=sum(g.num_tokens for g in self.dropped),
            replayed=self.replayed,
            prefilled=self.prefilled,
            duration_s=self.duration_s,
            busy_slot_s=self.work.slot_seconds(),
            offered_slot_s=self.work.wall_s * self.slots,
            spans=tuple(len({step for step, _ in s.parts}) for s in samples),
            staleness=max((self.step - step for step, _ in parts), default=0),
            work=self.work,
        )

    def _fill_slots(self) -> None:
        chosen = []
        if self.hold == "group":
            self.holding = [g for g in self.holding if not g.complete]
            size = self.load.samples_per_group
            while self.queue and (len(self.holding) + 1) * size <= self.slots:
                group = self.queue.popleft()
                self.holding.append(group)
                chosen += [(group, s) for s in group.samples if not s.finished]
        else:
            while len(self.running) + len(chosen) < self.slots and self.queue:
                group = self.queue[0]
                if not self.starting:
                    self.starting.extend(s for s in group.samples if not s.finished)
                chosen.append((group, self.starting.popleft()))
                if not self.starting:
                    self.queue.popleft()
        if chosen:
            self.running |= {s.request_id: (group, s) for group, s in chosen}
            self.engine.submit([self._request(group, s) for group, s in chosen])

    def _request(self, group: _Group, sample: _Sample) -> Request:
        settings, so_far = self.load.settings, sample.num_tokens
        request = Request(
            request_id=sample.request_id,
            parts=(group.prompt.token_ids, *(tokens for _, tokens in sample.parts)),
            max_new_tokens=settings.max_response_tokens - so_far,
            seed=sample_seed(settings.seed, sample.request_id, 0, so_far),
            sampling=settings.sampling,
        )
        if so_far:
            self.replayed += request.num_tokens
        return request


def _new_group(prompt: Prompt, size: int) -> _Group:
    return _Group(prompt, [_Sample(f"{prompt.uid}/{index}") for index in range(size)])
