"""The ``reward_model`` reward: a local sequence-classification model scores the responses of a group in batches.

The model is loaded once in each reward worker (``reward.workers``: one by default) by transformers. torch and
transformers are imported when it is constructed, never by importing this module.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlpost.errors import ConfigError, ModelError, explain
from rlpost.models.files import check_weights, fetch_folder, find_local_folder
from rlpost.models.tokenizer import check_ids, load_tokenizer
from rlpost.rewards.failures import RewardFailure
from rlpost.rewards.library.text_template import TextTemplate
from rlpost.rewards.values import is_count

WHAT = "reward model"
PATH = "reward model: path"
DTYPES = ("auto", "float32", "bfloat16", "float16")
SCORES = ("logit", "sigmoid", "softmax")
LONG_TEXTS = ("fail", "cut")
FINGERPRINTED = ("*.json", "*.safetensors", "*.bin", "*.jinja", "*.model", "*.txt")


class RewardModel:
    """The score of each response; a failure of its own for one that has none.

    Args:
        path: a folder, or a name on the hub (``revision``), that ``AutoModelForSequenceClassification`` loads with the
            weights of its head.
        label: which of several labels counts, by name or index; needless if there is one.
        score: logit; sigmoid of it; or softmax over all labels.
        template: the text to be scored, with ``{prompt}``, ``{response}``, ``{reference}`` and columns in braces. None:
            the tokenizer's chat template around the prompt as the user's message and the response as the assistant's;
            without a chat template, the two texts as the tokenizer's pair.
        max_tokens: longest text; None: the model's own limit.
        long_texts: what happens to a longer one: fail (a failure ``too_long``) or cut (its beginning is left out; the
            part ``cut`` is 1).
        batch_size: texts in one forward pass.
        dtype: auto is float32 on a CPU, bfloat16 on a GPU.
        device: cpu, cuda, or cuda:N.
        threads: of torch on a CPU; None: its own choice.

    Raises ConfigError or ModelError for arguments and folders that cannot give a score.
    """

    def __init__(
        self,
        path: str,
        *,
        revision: str | None = None,
        label: str | int | None = None,
        score: str = "logit",
        template: str | None = None,
        max_tokens: int | None = None,
        long_texts: str = "fail",
        batch_size: int = 8,
        dtype: str = "auto",
        device: str = "cpu",
        threads: int | None = None,
    ) -> None:
        chosen = (("score", score, SCORES), ("long_texts", long_texts, LONG_TEXTS), ("dtype", dtype, DTYPES))
        for name, value, choices in chosen:
            if value not in choices:
                raise ConfigError(explain(f"{WHAT}: {name}", value, f"one of {', '.join(choices)}", "choose one"))
        for name, count in (("batch_size", batch_size), ("max_tokens", max_tokens), ("threads", threads)):
            if not is_count(count) and (count is not None or name == "batch_size"):
                raise ConfigError(explain(f"{WHAT}: {name}", count, "a whole number >= 1", "change it"))
        self._template = None if template is None else TextTemplate(template, f"{WHAT}: template")
        self.required_columns = self._template.required_columns if self._template else ()
        self.needs_reference = self._template is not None and self._template.needs_reference
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        self._device = _find_device(device)
        on_cpu = self._device.type == "cpu"
        self._dtype = ("float32" if on_cpu else "bfloat16") if dtype == "auto" else dtype
        folder = find_local_folder(path, revision, PATH) or Path(fetch_folder(path, revision, PATH))
        check_weights(folder, PATH)
        self._tokenizer = load_tokenizer(str(folder), key=PATH)
        self._tokenizer.padding_side, self._tokenizer.truncation_side = "right", "left"
        self._model = _load_model(folder, getattr(torch, self._dtype)).to(self._device)
        config = self._model.config.get_text_config()
        check_ids(self._tokenizer.get_vocab(), int(config.vocab_size), str(folder / "config.json"))
        self._label = _find_label(label, self._model.config)
        self._score, self._batch_size, self._long_texts = score, batch_size, long_texts
        if score == "softmax" and self._model.config.num_labels == 1:
            raise ConfigError(explain(f"{WHAT}: score", score, "several labels, this model has one", "use sigmoid"))
        limits = [getattr(config, "max_position_embeddings", None), self._tokenizer.model_max_length]
        own_limit = min((limit for limit in limits if limit), default=None)  # RoBERTa's positions begin at 2
        if own_limit is not None and own_limit > 1 << 30:
            own_limit = None  # transformers' word for: no limit is known
        if max_tokens is not None and own_limit is not None and max_tokens > own_limit:
            expected = f"<= {own_limit}, the model's own limit"
            raise ConfigError(explain(f"{WHAT}: max_tokens", max_tokens, expected, "lower it"))
        self._max_tokens = max_tokens or own_limit
        self._choose_padding(config)
        # Everything that a score depends on besides the arguments: part of a cached result's key.
        self.version = f"{fingerprint(folder)} {self._dtype} {self._device.type}"

    def __call__(
        self, responses: Sequence[str], *, prompt: str, reference: Any, columns: Mapping[str, Any]
    ) -> list[dict[str, float] | RewardFailure]:
        results: list[dict[str, float] | RewardFailure] = []
        tokens: list[tuple[int, Mapping[str, list[int]], bool]] = []  # (index, what the tokenizer gave, was cut)
        for index, response in enumerate(responses):
            try:
                tokens.append((index, *self._encode(response, prompt, reference, columns)))
                results.append(RewardFailure("not_finite"))  # until it is scored
            except RewardFailure as failure:
                results.append(failure)
        for start in range(0, len(tokens), self._batch_size):
            batch = tokens[start : start + self._batch_size]
            for (index, _, was_cut), value in zip(batch, self._forward([one for _, one, _ in batch]), strict=True):
                if math.isfinite(value):
                    results[index] = {"reward": value, "cut": float(was_cut)}
                else:
                    results[index] = RewardFailure("not_finite", f"the model's score is {value}")
        return results

    def _encode(
        self, response: str, prompt: str, reference: Any, columns: Mapping[str, Any]
    ) -> tuple[Mapping[str, list[int]], bool]:
        """The tokenizer's output for one text, and whether its beginning was left out. Raises RewardFailure."""
        special = True
        if self._template is not None:
            texts = [self._template.fill(response, prompt=prompt, reference=reference, columns=columns)]
        elif self._tokenizer.chat_template:
            texts, special = [self._apply_chat_template(prompt, response)], False  # they are in the template's text
        else:
            texts = [prompt, response]
        whole = self._tokenizer(*texts, add_special_tokens=special)
        length = len(whole["input_ids"])
        if not length:
            raise RewardFailure("no_text", "the text has no tokens")
        if self._max_tokens is None or length <= self._max_tokens:
            return whole, False
        if self._long_texts == "fail":
            raise RewardFailure("too_long", f"{length} tokens, of {self._max_tokens} at most")
        cut = "only_first" if len(texts) == 1 else "longest_first"
        try:
            return self._tokenizer(
                *texts, add_special_tokens=special, truncation=cut, max_length=self._max_tokens
            ), True
        except Exception as error:  # the Rust side raises plain Exception
            raise RewardFailure("too_long", f"{length} tokens, which cannot be cut: {error}") from None

    def _apply_chat_template(self, prompt: str, response: str) -> str:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # a template raises what it likes, in a sandbox
            raise RewardFailure("bad_template", f"the chat template refuses the messages: {error}") from None

    def _forward(self, encoded: Sequence[Mapping[str, list[int]]]) -> list[float]:
        """The scores of one batch, padded on the right."""
        import torch

        if len(encoded) == 1:  # needs no padding token
            inputs = {name: torch.tensor([values], device=self._device) for name, values in encoded[0].items()}
        else:
            inputs = self._tokenizer.pad([dict(one) for one in encoded], return_tensors="pt").to(self._device)
        with torch.inference_mode():
            logits = self._model(**inputs).logits.float()
        if self._score == "softmax":
            logits = logits.softmax(dim=-1)
        values = logits[:, self._label]
        if self._score == "sigmoid":
            values = values.sigmoid()
        return [float(value) for value in values]

    def _choose_padding(self, config: Any) -> None:
        """Decoder models look for the last token that is not padding: model and tokenizer must agree on its id."""
        tokenizer, pad = self._tokenizer, config.pad_token_id
        if pad is None and tokenizer.pad_token_id != tokenizer.eos_token_id:  # an end token is part of many texts
            pad = config.pad_token_id = tokenizer.pad_token_id
        token = None if pad is None else tokenizer.convert_ids_to_tokens(pad)
        if token is not None:
            tokenizer.pad_token = token
        elif self._batch_size > 1:
            expected = f"1 for a model whose padding token is {pad}"
            do = "set pad_token_id in config.json to one of the tokenizer's, or batch_size=1"
            raise ConfigError(explain(f"{WHAT}: batch_size", self._batch_size, expected, do))


def fingerprint(folder: Path) -> str:
    """A digest of the contents of a model's files."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in FINGERPRINTED for file in folder.glob(pattern)}):
        with file.open("rb") as opened:
            digest.update(f"{file.name} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:24]


def _find_device(name: str) -> Any:
    import torch

    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ConfigError(explain(f"{WHAT}: device", name, "cpu, cuda or cuda:N", "choose one")) from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(explain(f"{WHAT}: device", name, "cpu, cuda or cuda:N", "choose one"))
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(explain(f"{WHAT}: device", name, f"one of {torch.cuda.device_count()} GPUs", "use cpu"))
    return device


def _load_model(folder: Path, dtype: Any) -> Any:
    """The classifier with every weight from its files: transformers would invent a missing head."""
    from transformers import AutoModelForSequenceClassification

    try:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            str(folder), dtype=dtype, output_loading_info=True
        )
    except Exception as error:  # an unknown architecture, sizes that do not match: the library's own errors
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ModelError(explain(PATH, str(folder), "a sequence-classification model", reason)) from None
    missing = sorted(loading["missing_keys"])
    if missing:
        do = "use a model that was trained to score: this one would get a random head"
        raise ModelError(explain(PATH, f"no weights for {missing[0]}", "those of a classifier", do))
    return model.eval()


def _find_label(label: str | int | None, config: Any) -> int:
    count = int(config.num_labels)
    names = {str(name): int(index) for index, name in (config.id2label or {}).items()}
    if label is None:
        if count > 1:
            expected = f"one of its {count} labels: {', '.join(names)}"
            raise ConfigError(explain(f"{WHAT}: label", None, expected, "name the one whose score is the reward"))
        return 0
    if isinstance(label, str) and label in names:
        return names[label]
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < count:
        return label
    raise ConfigError(explain(f"{WHAT}: label", label, f"a label ({', '.join(names)}) or its index", "choose one"))
