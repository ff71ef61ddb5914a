"""Assembles a supervised run's parts from its configuration, up to where a device is needed.

Everything that the user can fix is raised here, before a model is loaded: every row is encoded. Called by ``sft.run``
once per attempt.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from rlpost.config import Config, plugins
from rlpost.config.locations import expand_home, resolve_path
from rlpost.config.resolve import resolve
from rlpost.errors import ConfigError, ModelError, RunError, explain
from rlpost.models.files import check_shape, find_model_folder, find_stop_tokens
from rlpost.models.shape import count_params
from rlpost.models.tokenizer import check_ids, load_tokenizer
from rlpost.preflight.check_values import config_of_init, evaluates_loss, example_limit
from rlpost.prompts.chat_template import read_template_key
from rlpost.prompts.supervised import Example, ExampleEncoder, load_example_rows
from rlpost.session import Session
from rlpost.session import open_session as session_of_rl
from rlpost.sft.draws import Draws, LessonDraws, RowDraws, count_steps
from rlpost.workers.canary import NUM_PROMPTS
from rlpost.workers.protocol import WorkerSettings
from rlpost.workers.runtime import choose_device, choose_threads, require_usable, write_environment


@dataclass(frozen=True, kw_only=True)
class SftSession:
    """What exists before the trainer does."""

    cfg: Config  # resolved; ``steps`` are the run's optimizer steps
    shape: Mapping[str, Any]  # config.json
    model_folder: Path  # where the run starts; without weights for a new model
    tokenizer: Any
    draws: Draws
    num_examples: int | None  # of data.train; None for lessons
    num_dropped: int  # examples of data.train and data.eval that are too long
    eval_examples: tuple[Example, ...]
    generation: Session | None  # prompts of data.eval and their reward, with sft.generate_every
    started: datetime

    @property
    def row_tokens(self) -> int:
        assert self.cfg.train.max_row_tokens is not None, "resolved"
        return self.cfg.train.max_row_tokens

    def worker_settings(self) -> WorkerSettings:
        """A worker with ``sft``'s optimizer and schedule over the run's steps; it has an engine only to evaluate."""
        sft = self.cfg.sft
        train = replace(
            self.cfg.train,
            lr=sft.lr,
            betas=sft.betas,
            weight_decay=sft.weight_decay,
            grad_clip=sft.grad_clip,
            schedule="cosine",
            warmup_steps=sft.warmup_steps,
            final_lr_share=sft.final_lr_share,
            epochs=1,
            optimizer_steps_per_rollout=1,
        )
        generation, max_model_len = self.generation, self.generation.max_model_len if self.generation else 0
        prompts = generation.eval_prompts[:NUM_PROMPTS] if generation else []
        return WorkerSettings(
            cfg=replace(self.cfg, train=train, rollout=replace(self.cfg.rollout, temperature=1.0)),
            model_folder=str(self.model_folder.absolute()),
            vocab_size=int(self.shape["vocab_size"]),
            num_params=count_params(self.shape),
            hidden_size=int(self.shape["hidden_size"]),
            needs_reference=False,
            max_model_len=max_model_len,
            canary_prompts=[prompt.token_ids for prompt in prompts],
            with_engine=generation is not None,
            init="pretrained" if sft.init else "random",
        )


@contextmanager
def open_session(cfg: Config, *, started: datetime, run_folder: Path) -> Iterator[SftSession]:
    """Raises ConfigError, DataError, ModelError before a model is loaded. ``started``: when the run began."""
    output = cfg.sft.output and make_output(Path(expand_home(cfg.sft.output)))
    assert output is None or isinstance(output, Path)
    with (
        _open_generation(cfg, started, run_folder) as generation,
        tempfile.TemporaryDirectory(prefix="rlpost-sft-") as scratch,
    ):
        folder = _starting_folder(cfg, Path(scratch))
        shape = json.loads((folder / "config.json").read_text())
        origin = f"{folder / 'config.json'}" if cfg.sft.init else "model.shape"
        check_shape(shape, origin)
        device = choose_device(cfg)
        threads = choose_threads(cfg, device, num_params=count_params(shape))
        cfg = resolve(cfg, device=device, threads=threads)
        if generation is not None:  # what a deterministic run pins of them
            cfg = replace(cfg, engine=generation.cfg.engine, rollout=generation.cfg.rollout)
        write_environment(device=device, dtype=cfg.model.dtype, threads=threads, vocab_size=int(shape["vocab_size"]))
        if cfg.cluster.kind != "ray":
            require_usable(device)
        tokenizer = load_tokenizer(str(folder))
        if cfg.data.chat_template is not None:
            tokenizer.chat_template = read_template_key(cfg.data.chat_template)  # saved with the model
        check_ids(tokenizer.get_vocab(), int(shape["vocab_size"]), origin)
        if tokenizer.eos_token_id is None:
            do = "set eos_token in tokenizer_config.json"
            raise ModelError(explain("sft", f"a tokenizer without an end token in {folder}", "one that has it", do))
        encoder = ExampleEncoder(
            cfg.data,
            cfg.sft,
            tokenizer,
            stop_token_ids=find_stop_tokens(cfg, tokenizer, folder),
            max_tokens=example_limit(cfg, shape),
            started=started,
        )
        draws, num_examples, steps = _open_draws(cfg, encoder)
        eval_examples = _encode_split(cfg, encoder, "eval") if evaluates_loss(cfg) else ()
        yield SftSession(
            cfg=replace(cfg, steps=steps),
            shape=shape,
            model_folder=folder,
            tokenizer=tokenizer,
            draws=draws,
            num_examples=num_examples,
            num_dropped=encoder.num_dropped,
            eval_examples=eval_examples,
            generation=generation,
            started=started,
        )


@contextmanager
def _open_generation(cfg: Config, started: datetime, run_folder: Path) -> Iterator[Session | None]:
    """What an evaluation by generation needs, as ``rlpost eval`` opens it; None without one."""
    if cfg.sft.generate_every < 0:
        yield None
        return
    session = session_of_rl(config_of_init(cfg), train=False, started=started, run_folder=run_folder)
    try:
        yield session
    finally:
        session.close()


def make_output(output: Path) -> Path:
    """Checked before training, so that an unwritable folder does not cost a trained model."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        do = f"{error.strerror}; set sft.output or runs_dir"
        raise RunError(explain("model folder", str(output), "a folder this process may write", do)) from None
    return output


def _open_draws(cfg: Config, encoder: ExampleEncoder) -> tuple[Draws, int | None, int]:
    """(source, its number of examples, the run's steps)."""
    sft = cfg.sft
    if sft.generator is not None:
        assert sft.steps is not None, "rlpost check refuses epochs of a generator"
        make = plugins.resolve_target(sft.generator, {}, "sft.generator")
        return LessonDraws(lambda: iter(make()), encoder), None, sft.steps
    examples = _encode_split(cfg, encoder, "train")

    def begin() -> RowDraws:
        return RowDraws(examples, seed=cfg.seed, shuffle=cfg.data.shuffle, epochs=sft.epochs)

    if sft.epochs is None:
        assert sft.steps is not None, "rlpost check wants one of the two"
        return begin(), len(examples), sft.steps
    return begin(), len(examples), count_steps(begin(), sft.tokens_per_step)


def _encode_split(cfg: Config, encoder: ExampleEncoder, split: str) -> tuple[Example, ...]:
    return encoder.encode_rows(load_example_rows(cfg.data, split), f"data.{split}").examples


def _starting_folder(cfg: Config, scratch: Path) -> Path:
    """``sft.init``, or a new folder with the recipe's shape and tokenizer but no weights."""
    if cfg.sft.init:
        return Path(find_model_folder(replace(cfg, model=type(cfg.model)(path=cfg.sft.init))))
    if cfg.model.shape is None or cfg.sft.tokenizer is None:
        raise ConfigError(
            explain("sft", "no sft.init", "model.shape and sft.tokenizer for a new model", "set them, or sft.init")
        )
    tokenizer = Path(resolve_path(cfg.sft.tokenizer))
    if not (tokenizer / "tokenizer.json").is_file():
        raise ModelError(explain("sft.tokenizer", str(tokenizer), "a folder with tokenizer.json", "check the path"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, scratch / name)
    (scratch / "config.json").write_text(json.dumps(_with_special_ids(cfg.model.shape, scratch)))
    return scratch


def _with_special_ids(shape: Mapping[str, Any], tokenizer_folder: Path) -> dict[str, Any]:
    """The shape with the tokenizer's end and padding ids, so that engines stop at the tokenizer's end token."""
    settings = json.loads((tokenizer_folder / "tokenizer_config.json").read_text())
    content = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    ids = dict(content["model"]["vocab"]) | {t["content"]: t["id"] for t in content["added_tokens"]}
    named = {f"{kind}_token_id": ids.get(settings.get(f"{kind}_token")) for kind in ("eos", "pad", "bos")}
    return {**shape, **named}
