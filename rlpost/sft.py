"""``rlpost sft``: a warm start by supervised fine-tuning, on the same trainer that RL uses.

Creates a new model folder from ``model.shape`` and a tokenizer, and runs the loop over the recipe's examples
("lessons"). The result is a Hugging Face folder that a recipe can name in ``model.path``. Nothing is generated here.
"""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rlpost.config import Config, plugins
from rlpost.config.locations import expand_home, resolve_path
from rlpost.config.resolve import resolve
from rlpost.errors import ConfigError, ModelError, RunError, explain
from rlpost.models.shape import count_params
from rlpost.prompts.conversion import kind_of, refuse
from rlpost.prompts.encoding import make_encode
from rlpost.types import TrainBatch
from rlpost.workers.runtime import choose_device, choose_threads, write_environment

REPORT_EVERY = 50


def run_sft(cfg: Config) -> Path:
    """Train ``cfg.sft.steps`` steps on the recipe's lessons; returns the model folder.

    Raises:
        ConfigError, ModelError: no examples to train on, or no model to start from.
        RunError: the loss is not finite, or the model's folder cannot be created.
    """
    sft = cfg.sft
    lessons = _open_lessons(cfg)
    output = _make_output(Path(expand_home(sft.output or f"{cfg.runs_dir}/{cfg.name}-sft/model")))
    with tempfile.TemporaryDirectory(prefix="rlpost-sft-") as scratch:
        start = _starting_folder(cfg, Path(scratch))
        shape = json.loads((start / "config.json").read_text())
        device = choose_device(cfg)
        threads = choose_threads(cfg, device, num_params=count_params(shape))
        cfg = resolve(cfg, device=device, threads=threads)
        write_environment(device=device, dtype=cfg.model.dtype, threads=threads, vocab_size=int(shape["vocab_size"]))
        from rlpost.algos.objective import nll
        from rlpost.models.tokenizer import load_tokenizer
        from rlpost.train.deepspeed_trainer import build_trainer

        tokenizer = load_tokenizer(str(start))
        if tokenizer.eos_token_id is None:
            do = "set eos_token in tokenizer_config.json"
            raise ModelError(explain("sft", f"a tokenizer without an end token in {start}", "one that has it", do))
        trainer = build_trainer(
            _as_trainer_config(cfg),
            model_folder=start,
            total_optimizer_steps=sft.steps,
            needs_reference=False,
            init="pretrained" if sft.init else "random",
        )
        print(
            f"sft: {sft.steps} steps of {sft.tokens_per_step} tokens, {threads} thread(s), to {output}",
            flush=True,
        )
        started = time.monotonic()
        assert cfg.train.max_row_tokens is not None, "resolved"
        batches = _batches(lessons, tokenizer, sft.tokens_per_step, cfg.train.max_row_tokens)
        for step, batch in enumerate(itertools.islice(batches, sft.steps), start=1):
            result = trainer.update(batch, nll)
            if not result.applied:
                raise RunError(explain(f"sft step {step}: loss", result.loss, "a finite number", "lower sft.lr"))
            if step % REPORT_EVERY == 0 or step == sft.steps:
                print(
                    f"sft: step {step}/{sft.steps}, nll {result.loss:.4f}, {time.monotonic() - started:.0f} s",
                    flush=True,
                )
        trainer.export(output)
        tokenizer.save_pretrained(str(output))
        trainer.close()
    print(f"sft: model written to {output}; use it with model.path={output}", flush=True)
    return output


def _make_output(output: Path) -> Path:
    """Checked before training, so that an unwritable folder does not cost a trained model."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        do = f"{error.strerror}; set sft.output or runs_dir"
        raise RunError(explain("model folder", str(output), "a folder this process may write", do)) from None
    return output


def _open_lessons(cfg: Config) -> Iterator[Mapping[str, str]]:
    if cfg.sft.generator is None or cfg.sft.steps < 1:
        raise ConfigError(
            explain(
                "sft",
                "no lessons",
                "sft.generator and sft.steps >= 1",
                "choose a recipe that has them: math/arithmetic",
            )
        )
    return iter(plugins.resolve_target(cfg.sft.generator, {}, "sft.generator")())


def _starting_folder(cfg: Config, scratch: Path) -> Path:
    """``sft.init``, or a new folder with the recipe's shape and tokenizer but no weights."""
    if cfg.sft.init:
        return Path(resolve_path(cfg.sft.init))
    if cfg.model.shape is None or cfg.sft.tokenizer is None:
        raise ConfigError(
            explain("sft", "no sft.init", "model.shape and sft.tokenizer for a new model", "set them, or sft.init")
        )
    tokenizer = Path(resolve_path(cfg.sft.tokenizer))
    if not (tokenizer / "tokenizer.json").is_file():
        raise ModelError(explain("sft.tokenizer", str(tokenizer), "a folder with tokenizer.json", "check the path"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
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


def _as_trainer_config(cfg: Config) -> Config:
    train = replace(
        cfg.train,
        lr=cfg.sft.lr,
        betas=cfg.sft.betas,
        weight_decay=cfg.sft.weight_decay,
        grad_clip=cfg.sft.grad_clip,
        schedule="cosine",
        warmup_steps=cfg.sft.warmup_steps,
        final_lr_share=cfg.sft.final_lr_share,
    )
    return replace(cfg, train=train, rollout=replace(cfg.rollout, temperature=1.0))


def _batches(
    lessons: Iterator[Mapping[str, str]], tokenizer: Any, tokens: int, row_tokens: int
) -> Iterator[TrainBatch]:
    from rlpost.algos.batch import build_batch, supervised_sequence

    encode = make_encode(tokenizer)
    while True:
        sequences, filled = [], 0
        while filled < tokens:
            row = next(lessons)
            for key in ("prompt", "response"):
                if not isinstance(row.get(key), str):
                    raise refuse("sft.generator: a lesson", f"{kind_of(row.get(key))} as {key}", "text", "fix it")
            prompt = np.asarray(encode(row["prompt"]), np.int64)
            words = tokenizer.encode(row["response"], add_special_tokens=False)
            response = np.asarray([*words, tokenizer.eos_token_id], np.int64)
            sequences.append(supervised_sequence(prompt, response))
            filled += len(prompt) + len(response)
        yield build_batch(sequences, policy_version=0, max_row_tokens=row_tokens)
