"""The whole run on one screen: publish, generate, store, update, settle, save.

:func:`train` is what ``rlpost train`` calls. This is the only place where rollout and training meet. It owns the order
of the steps; ``run`` owns a run's parts, and the parts make every decision.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from rlpost.config import Config
from rlpost.errors import ShardsLost
from rlpost.rollout.collect import collect
from rlpost.rollout.stats import RolloutStats
from rlpost.run import Restarts, Run, open_run
from rlpost.train.update_policy import update_policy


def train(cfg: Config) -> dict[str, Any]:
    """Run ``cfg.steps`` steps, or the rest of an unfinished run of this name; returns the run's summary.

    If workers are lost together with the last step's state, the run restarts from its latest checkpoint.
    """
    restarts = Restarts(cfg)
    while True:
        try:
            with open_run(cfg, restarts) as run:
                return run_steps(run)
        except ShardsLost as lost:
            restarts.note(lost)  # raises it again if restarting makes no progress


def run_steps(run: Run) -> dict[str, Any]:
    """Run until the last step is done. If a stop request ends the run earlier, save and raise ``Stopped``."""
    while True:
        publication = run.workers.publish()  # compared bit for bit, and checked by the canary
        if run.evaluation_is_due():
            run.evaluate()
        run.stop_if_requested()
        if run.step >= run.cfg.steps:  # greater when a finished run is resumed with fewer steps
            return run.finish()
        run.report.begin_step(publication)
        rollout = generate(run)  # N groups are admitted; the others are kept
        groups = run.store(rollout)  # on disk before training on it
        update = run.workers.update(
            partial(
                update_policy,
                algorithm=run.algorithm,
                groups=groups,
                policy_version=run.step,
                settings=run.update_settings,
                timed=run.report.part,
            )
        )
        run.settle(groups, rollout, update)  # accounts for every group and token
        if run.save_is_due():
            run.save()
        run.stop_if_requested()


def generate(run: Run) -> RolloutStats:
    """One rollout. Continues without replicas lost during it, and on fresh ones if all are lost."""
    while True:
        with run.workers.generating() as engine:
            run.report.phase("generate")
            rollout = collect(
                engine,
                run.buffer,
                run.prompts,
                run.session.scorer,
                run.fit_to_kv_cache(engine),
                step=run.step,
                on_progress=run.report.rollout_progress,
                should_stop=lambda: run.must_stop(engine),
            )
        run.report.open_limit(run.buffer)
        if not rollout.stopped or run.stop.requested is not None:
            return rollout
        run.note_partial(rollout)
