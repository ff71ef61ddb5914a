"""What start-up does for the program, done for these tests: the environment DeepSpeed reads, before it is imported.

And trainers as start-up builds them, on tiny models.
"""

import contextlib
import os

import pytest

from rlpost.config.resolve import resolve

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(DS_ACCELERATOR="cpu", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", CUDA_VISIBLE_DEVICES="")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    from tests.train import cases

    root = tmp_path_factory.mktemp("models")
    return {tied: cases.save_model(root / f"tied-{tied}", tied=tied) for tied in (True, False)}


@pytest.fixture
def build(folders):
    """Builds trainers as start-up does, and closes them when the test ends."""
    from rlpost.train.deepspeed_trainer import build_trainer
    from tests.train import cases

    with contextlib.ExitStack() as stack:

        def make(
            stage=1, *, tied=True, folder=None, needs_reference=False, total=10, dtype="float32", weights=None, **train
        ):
            cfg = cases.config(stage, **train)
            cfg.model.dtype = dtype
            trainer = build_trainer(
                resolve(cfg, device="cpu", threads=1),
                model_folder=folder or folders[tied],
                total_optimizer_steps=total,
                needs_reference=needs_reference,
                **({} if weights is None else {"weights": weights}),
            )
            stack.callback(trainer.close)
            return trainer

        yield make
