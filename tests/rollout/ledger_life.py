"""Lives of a simulated run with a ledger, which tests kill and resume."""

import json

from rlpost.rollout.collect import collect
from rlpost.rollout.ledger_recovery import recover_ledger, start_ledger
from tests.rollout.simulation import build, finish_step, prompts

SHAPE = {"n": 3, "g": 2, "slots": 5, "staleness": 2, "oversample": 2.5}


class Life:
    """One process's life of a simulated run whose durable state lies in ``folder``."""

    def __init__(self, folder, **shape):
        self.folder = folder
        self.shape = SHAPE | shape
        self.snapshots = folder / "snapshots"
        self.snapshots.mkdir(parents=True, exist_ok=True)

    def begin(self):
        """From nothing."""
        self._adopt(start_ledger(self.folder / "ledger.sqlite"))
        self.buffer.accounts.roll_back(self.recovery.ledger.rolled_back())
        return self

    def resume(self, step, name=None):
        name = name or str(step)
        state = json.loads((self.snapshots / f"{name}.json").read_text())
        self._adopt(recover_ledger(self.folder / "ledger.sqlite", self.snapshots / f"{name}.sqlite", step=step))
        ledger = self.recovery.ledger
        self.buffer.load_state_dict(state, ledger.read_open(), rolled_back=ledger.rolled_back())
        self.buffer.check_ledger()
        self.stream = prompts(self.buffer.accounts.num_drawn)
        return self

    def _adopt(self, recovery):
        self.recovery = recovery
        self.buffer, self.engine, self.scorer, self.settings = build(**self.shape, ledger=recovery.ledger)
        self.stream = prompts()

    def step(self, number, should_stop=lambda buffer: False):
        stats = collect(
            self.engine,
            self.buffer,
            self.stream,
            self.scorer,
            self.settings,
            step=number,
            should_stop=lambda: should_stop(self.buffer),
        )
        if stats.stopped:
            self.buffer.store()
            return None
        self.account = (stats.num_launched, stats.num_resumed, stats.num_replayed, sorted(stats.launched_lengths))
        groups = finish_step(self.buffer)
        self.buffer.check_conservation()
        return groups

    def save(self, step, *, under_way=False, name=None):
        name = name or str(step)
        (self.snapshots / f"{name}.sqlite").unlink(missing_ok=True)
        self.recovery.ledger.snapshot(self.snapshots / f"{name}.sqlite", step=step)
        (self.snapshots / f"{name}.json").write_text(json.dumps(self.buffer.state_dict(under_way=under_way)))

    def close(self):
        self.recovery.ledger.close()


def identity(groups):
    """Everything a group is, as comparable values."""
    return [
        (
            g.uid,
            g.prompt.text,
            g.prompt.token_ids.tolist(),
            [
                (s.index, s.finish_reason, s.reward, dict(s.reward_parts), s.failure)
                + (s.token_ids.tobytes(), s.rollout_logprobs.tobytes(), s.policy_versions.tolist())
                for s in g.samples
            ],
        )
        for g in groups
    ]


def uninterrupted(folder, steps, **shape):
    life = Life(folder, **shape).begin()
    trained = [(identity(life.step(step)), life.account) for step in range(steps)]
    life.close()
    return trained


def reward_with_failures(response, **_):
    if len(response) % 7 == 3:
        raise ValueError("no")
    return {"reward": len(response) / 3, "third": len(response) % 3}
