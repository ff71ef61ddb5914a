"""The whole of a supervised run on one screen: evaluate, draw, update, settle, save.

:func:`run_sft` is what ``rlpost sft`` calls. It owns the order of the steps; ``sft.run`` owns a run's parts. The result
is a Hugging Face folder that a recipe can name in ``model.path``.
"""

from __future__ import annotations

from pathlib import Path

from rlpost.config import Config
from rlpost.errors import ShardsLost
from rlpost.run import Restarts
from rlpost.sft.run import SftRun, open_run


def run_sft(cfg: Config) -> Path:
    """Train on ``sft.generator``'s lessons or on ``data.train``, or go on with an unfinished run; the model's folder.

    If workers are lost together with the last step's state, the run restarts from its latest checkpoint.
    """
    restarts = Restarts(cfg)
    while True:
        try:
            with open_run(cfg, restarts) as run:
                return run_steps(run)
        except ShardsLost as lost:
            restarts.note(lost)  # raises it again if restarting makes no progress


def run_steps(run: SftRun) -> Path:
    """Run until the last step is done. If a stop request ends the run earlier, save and raise ``Stopped``."""
    from rlpost.algos.objective import nll

    while True:
        if run.evaluation_is_due():
            run.evaluate()
        run.stop_if_requested()
        if run.step >= run.cfg.steps:  # greater when a finished run is resumed with fewer steps
            return run.finish()
        step = run.draw()  # whole examples, packed into rows
        result = run.update(step, nll)
        run.settle(step, result)  # records which draws were trained on
        if run.save_is_due():
            run.save()
        run.stop_if_requested()
