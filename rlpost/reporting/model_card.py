"""The model card (README.md) of a trained model: what it is, how it was trained, how good it is. Facts in, text out.

``run`` writes one beside the finished model, ``rlpost export`` beside an exported one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rlpost import __version__
from rlpost.reporting.progress import interval, percent


def model_card(
    config: Mapping[str, Any], *, step: int, evaluations: Sequence[Mapping[str, Any]], totals: Mapping[str, float]
) -> str:
    """Markdown with the front matter that model hubs read.

    Args:
        config: the resolved configuration as plain containers.
        step: steps trained.
        evaluations: of the run so far, oldest first, with ``step`` and the ``eval/`` metrics.
        totals: ``samples`` and ``tokens`` trained.
    """
    base, algo = str(config["model"]["path"]), config["algo"]
    front = ["library_name: transformers", f"tags: [rlpost, reinforcement-learning, {json.dumps(str(algo['name']))}]"]
    if _is_hub_name(base):
        front.append(f"base_model: {base}")
    rows = [
        ("Base model", f"`{base}`" + (f" at `{config['model']['revision']}`" if config["model"]["revision"] else "")),
        ("Algorithm", f"{algo['name']} (advantage {_name(algo['advantage'])}, loss {_name(algo['loss'])})"),
        ("Reward", f"`{_name(config['reward']['function'])}`"),
        ("Training data", _source(config["data"]["train"])),
        *_prompting(config["data"]),
        ("Steps", f"{step} of {config['steps']}"),
        (
            "Per step",
            f"{config['rollout']['groups_per_step']} prompts x {config['rollout']['samples_per_group']} responses",
        ),
        ("Trained on", f"{totals['samples']:,.0f} responses, {totals['tokens']:,.0f} tokens"),
        ("Learning rate", f"{config['train']['lr']:g} ({config['train']['schedule']})"),
        (
            "Sampling",
            f"temperature {config['rollout']['temperature']:g}, at most "
            f"{config['rollout']['max_response_tokens']:,} tokens",
        ),
        ("Seed", str(config["seed"])),
    ]
    lines = ["---", *front, "---", "", f"# {config['name']}", ""]
    if config.get("description"):
        lines += [str(config["description"]), ""]
    lines += [f"Trained by reinforcement learning with rlpost {__version__}.", "", "| | |", "|---|---|"]
    lines += [f"| {label} | {value} |" for label, value in rows]
    return "\n".join([*lines, *_accuracy_lines(config, evaluations)]) + "\n"


def supervised_card(
    config: Mapping[str, Any], *, step: int, evaluations: Sequence[Mapping[str, Any]], totals: Mapping[str, float]
) -> str:
    """The card of a model made by ``rlpost sft``, from the same facts; some evaluations have ``eval/loss`` instead."""
    sft = config["sft"]
    front = ["library_name: transformers", "tags: [rlpost, supervised-fine-tuning]"]
    if sft["init"] and _is_hub_name(sft["init"]):
        front.append(f"base_model: {sft['init']}")
    trained_on = f"lessons of `{_name(sft['generator'])}`" if sft["generator"] else _source(config["data"]["train"])
    rows = [
        ("Started from", f"`{sft['init']}`" if sft["init"] else "random weights"),
        ("Training data", trained_on),
        *_prompting(config["data"]),
        ("Steps", f"{step} of {config['steps']}, about {sft['tokens_per_step']:,} tokens each"),
        ("Trained on", f"{totals['samples']:,.0f} examples, {totals['tokens']:,.0f} tokens ({sft['loss_on']})"),
        ("Learning rate", f"{sft['lr']:g} (cosine)"),
        ("Seed", str(config["seed"])),
    ]
    losses = [evaluation for evaluation in evaluations if "eval/loss" in evaluation]
    rows += [(f"Loss on data.eval after step {e['step']}", f"{e['eval/loss']:.4f}") for e in _ends(losses)]
    lines = ["---", *front, "---", "", f"# {config['name']}", ""]
    if config.get("description"):
        lines += [str(config["description"]), ""]
    lines += [f"Trained by supervised fine-tuning with rlpost {__version__}.", "", "| | |", "|---|---|"]
    lines += [f"| {label} | {value} |" for label, value in rows]
    scored = [evaluation for evaluation in evaluations if "eval/accuracy" in evaluation]
    return "\n".join([*lines, *_accuracy_lines(config, scored)]) + "\n"


def _ends(evaluations: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    return evaluations if len(evaluations) < 3 else [evaluations[0], evaluations[-1]]


def _prompting(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What whoever uses the model must repeat, since the tokenizer does not hold it; runs of 0.1 had none of it."""
    arguments, prefill = data.get("chat_template_kwargs"), data.get("prefill")
    rows = [("Chat template's arguments", arguments)] if arguments else []
    rows += [("Responses begin with", prefill)] if prefill else []
    return [(label, f"`` {json.dumps(value, ensure_ascii=False)} ``".replace("|", "\\|")) for label, value in rows]


def _accuracy_lines(config: Mapping[str, Any], evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    if not evaluations:
        return []
    k = config["eval"]["samples_per_prompt"]
    lines = [
        "",
        "## Evaluation",
        "",
        f"Held-out problems, {k} response(s) each, temperature {config['eval']['temperature']:g}; "
        "the 95 % interval over problems in parentheses.",
        "",
        f"| After step | mean@{k} | Tokens per response |",
        "|---|---|---|",
    ]
    for e in _ends(evaluations):
        accuracy = f"{percent(e['eval/accuracy'])} ({interval(e['eval/accuracy_low'], e['eval/accuracy_high'])})"
        lines.append(f"| {e['step']} | {accuracy} | {e['eval/response_tokens']:.0f} |")
    return lines


def _is_hub_name(path: str) -> bool:
    """``owner/name``, and not something that looks like a folder."""
    parts = path.split("/")
    return len(parts) == 2 and all(parts) and parts[0] not in (".", "..", "~") and "://" not in path


def _name(part: Any) -> str:
    return str(part.get("_target_", part)) if isinstance(part, Mapping) else str(part)


def _source(source: Mapping[str, Any]) -> str:
    if source.get("sources"):  # runs of 0.1 had none
        plain = {"path": None, "hub": None, "subset": None, "split": "train", "generator": None}
        return "; ".join(f"{name}: {_source({**plain, **one})}" for name, one in source["sources"].items())
    if source["path"]:
        return f"`{source['path']}`"
    if source["hub"]:
        return (
            f"`{source['hub']}`" + (f" ({source['subset']})" if source["subset"] else "") + f", split {source['split']}"
        )
    return f"generated by `{_name(source['generator'])}`"
