"""A checkpoint's weights as a Hugging Face folder, from the files alone: no process group, no engine, no GPU.

DeepSpeed's own converter puts the ranks' partitions of the float32 master copy together (stages 1 to 3); rounded to the
training dtype they are the weights the engine sampled from. Called by ``export``.
"""

from __future__ import annotations

import contextlib
import errno
import io
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from rlpost.errors import RunError, explain
from rlpost.train.checkpoint_layout import DEEPSPEED, read_layout
from rlpost.train.model import DTYPES

PREFIX = "lm."  # the policy module's name for the language model


def write_model(trainer: Path, model_files: Path, out: Path) -> None:
    """``out`` becomes a folder that ``AutoModelForCausalLM`` loads: safetensors in the training dtype, configuration,
    tokenizer. Needs host memory for twice the model in float32.

    Raises RunError where the trainer's files cannot be read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = DTYPES[read_layout(trainer)["dtype"]]
    state = {name: tensor.to(dtype).contiguous() for name, tensor in _read(trainer).items()}
    config = AutoConfig.from_pretrained(model_files)
    with torch.device("meta"):  # its weights are never needed, only its names and what ties them
        lm = AutoModelForCausalLM.from_config(config, dtype=dtype)
    wanted = {name: parameter.shape for name, parameter in lm.named_parameters()}
    missing = next((name for name, shape in wanted.items() if name not in state or state[name].shape != shape), None)
    if missing is not None:
        raise RunError(
            explain(f"weights in {trainer}", f"no {missing}", "every weight of the model", "use another one")
        )
    out.mkdir(parents=True, exist_ok=True)
    try:
        lm.save_pretrained(out, state_dict={name: state[name] for name in wanted})
    except SafetensorError as error:  # its form of an OSError, without a number
        raise OSError(errno.ENOSPC, str(error).splitlines()[0]) from error
    shutil.copytree(model_files, out, dirs_exist_ok=True)


def _read(trainer: Path) -> dict[str, Any]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # it narrates
            state = get_fp32_state_dict_from_zero_checkpoint(str(trainer), tag=DEEPSPEED)
    except Exception as error:  # a cut file: torch and DeepSpeed raise whatever they meet
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:120]}"
        raise RunError(
            explain("trainer checkpoint", f"{trainer} ({reason})", "whole files", "use another one")
        ) from error
    return {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}
