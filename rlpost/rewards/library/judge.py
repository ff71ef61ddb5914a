"""The ``judge`` reward: a language model behind an OpenAI-compatible endpoint gives each response a score.

One request to ``URL/chat/completions`` for each response: the rubric with the row's texts in it. What comes back is a
reward only if a score can be read in it and lies between ``low`` and ``high``; everything else is a named failure.
``rewards.library.retrying_post`` says what is retried.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rlpost.errors import ConfigError, explain
from rlpost.rewards.failures import RewardFailure
from rlpost.rewards.library.budget import Budget
from rlpost.rewards.library.read_numbers import FRACTION, last_number
from rlpost.rewards.library.retrying_post import Retry, RetryingPost, check_concurrency
from rlpost.rewards.library.text_template import TextTemplate, read_template
from rlpost.rewards.outcomes import shorten
from rlpost.rewards.values import answer_text, read_number, shown

PATH = "/chat/completions"
OWN_KEYS = ("model", "messages", "temperature", "max_tokens", "stream", "n")  # of a request: arguments here, or fixed


class Reply(NamedTuple):
    """What a chat completion says: the judge's text, why it ended, and the tokens of the whole exchange."""

    text: str
    finish_reason: str | None
    tokens: int | None


class Judge:
    """A score from a chat model, mapped to 0..1.

    Args:
        url: the endpoint's base, ``http://127.0.0.1:8000/v1``.
        model: the name that the endpoint knows it by.
        rubric: the request's text, with ``{prompt}``, ``{response}``, ``{reference}`` and columns in braces; or
            ``rubric_file``, a file with it.
        system: a system message before it.
        pattern: a regular expression that finds the score: its last match, and of that the first group if it has one.
        field: the key of the score in the last JSON object of the reply; dots reach into it. Without either, the last
            number of the reply is the score.
        low, high: the scale. A score outside is a failure.
        normalize: the reward is (score - low) / (high - low); false: the score itself.
        temperature: of the judge.
        max_tokens: of its reply; None: the endpoint's own limit.
        request: more keys of the request, ``response_format`` for example.
        api_key_env: environment variable with the API key, so that it appears in no configuration.
        retries: additional attempts after the first.
        attempt_timeout_s: for one attempt, from connecting to the last byte.
        budget_requests, budget_tokens: limits for a whole run (its resumes included) on requests, attempts each
            counted, and on the tokens that the endpoint reports; None: no limit.
        version: part of the key of cached results; change it with the model behind the name.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        rubric: str | None = None,
        rubric_file: str | None = None,
        system: str | None = None,
        pattern: str | None = None,
        field: str | None = None,
        low: float = 0.0,
        high: float = 10.0,
        normalize: bool = True,
        temperature: float = 0.0,
        max_tokens: int | None = 1024,
        request: Mapping[str, Any] | None = None,
        api_key_env: str | None = None,
        headers: Mapping[str, str] | None = None,
        retries: int = 3,
        backoff_s: float = 0.5,
        attempt_timeout_s: float = 60.0,
        concurrency: int = 8,
        budget_requests: int | None = None,
        budget_tokens: int | None = None,
        version: str = "",
        cacheable: bool = True,
    ) -> None:
        what = "reward judge"
        if not isinstance(model, str) or not model:
            raise ConfigError(explain(f"{what}: model", model, "the name of a model", "name one the endpoint has"))
        if isinstance(url, str) and url.rstrip("/").endswith(PATH):
            raise ConfigError(explain(f"{what}: url", url, "the endpoint's base", f"leave {PATH} out"))
        self._post = RetryingPost(
            what,
            f"{url.rstrip('/')}{PATH}" if isinstance(url, str) else url,
            headers=headers,
            token_env=api_key_env,
            token_name="api_key_env",
            retries=retries,
            backoff_s=backoff_s,
            attempt_timeout_s=attempt_timeout_s,
        )
        check_concurrency(what, concurrency)
        text = read_template(rubric, rubric_file, f"{what}: rubric")
        self._rubric = TextTemplate(text, f"{what}: rubric")
        self._score = ScoreReader(what, pattern=pattern, field=field, low=low, high=high)
        self._normalize = normalize
        if not isinstance(normalize, bool):
            raise ConfigError(explain(f"{what}: normalize", normalize, "true or false", "use one of them"))
        if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not temperature >= 0:
            raise ConfigError(explain(f"{what}: temperature", temperature, ">= 0", "0 is greedy"))
        if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
            raise ConfigError(explain(f"{what}: max_tokens", max_tokens, ">= 1", "null is no limit of ours"))
        if not isinstance(request, Mapping | None):
            raise ConfigError(explain(f"{what}: request", request, "a mapping", "write {key: value}"))
        if not isinstance(system, str | None):
            raise ConfigError(explain(f"{what}: system", system, "text", "put it in quotes"))
        own = [key for key in OWN_KEYS if key in (request or {})]
        if own:
            do = "model, temperature and max_tokens are arguments of their own"
            raise ConfigError(explain(f"{what}: request", own[0], f"no {', '.join(OWN_KEYS)}", do))
        self._system = [{"role": "system", "content": system}] if system else []
        self._body: dict[str, Any] = {**(request or {}), "model": model, "temperature": temperature}
        if max_tokens is not None:
            self._body["max_tokens"] = max_tokens
        self._budget = Budget(what, f"{model} at {url}", requests=budget_requests, tokens=budget_tokens)
        # What rewards.functions reads of a function.
        self.concurrency, self.cacheable = concurrency, cacheable
        self.timeout_s = self._post.timeout_s
        self.version = f"{version} {hashlib.sha256(text.encode()).hexdigest()}"  # a file's contents may change
        self.required_columns = self._rubric.required_columns
        self.needs_reference = self._rubric.needs_reference

    def use_folder(self, folder: Path | None) -> None:
        """Where the run keeps what it has spent."""
        self._budget.use_folder(folder)

    async def __call__(
        self, response: str, *, prompt: str, reference: Any, columns: Mapping[str, Any]
    ) -> dict[str, float]:
        text = self._rubric.fill(response, prompt=prompt, reference=reference, columns=columns)
        messages = [*self._system, {"role": "user", "content": text}]
        reply = await self._post({**self._body, "messages": messages}, read_reply, self._budget.take_request)
        if self._budget.counts_tokens:
            if reply.tokens is None:
                raise RewardFailure("budget", "the endpoint reports no usage, so budget_tokens cannot be kept")
            self._budget.add_tokens(reply.tokens)
        score = self._score.read(reply)
        return {"reward": self._score.share(score) if self._normalize else score, "raw_score": score}

    async def close(self) -> None:
        await self._post.close()
        self._budget.close()

    # Arguments that cannot change a score: a higher budget is no reason to pay again for what is cached.
    args_beside_scores = (
        *("budget_requests", "budget_tokens", "retries", "backoff_s", "attempt_timeout_s", "concurrency"),
        *("api_key_env", "headers", "cacheable"),
    )


class ScoreReader:
    """How a score is found in a judge's reply. Raises ConfigError for settings that can find none."""

    def __init__(self, what: str, *, pattern: str | None, field: str | None, low: float, high: float) -> None:
        if pattern is not None and field is not None:
            raise ConfigError(explain(f"{what}: pattern", pattern, "null beside field", "give one of the two"))
        if field is not None and (not isinstance(field, str) or not field):
            raise ConfigError(explain(f"{what}: field", field, "a key of the reply's JSON object", "name it"))
        try:
            self._pattern = None if pattern is None else re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ConfigError(explain(f"{what}: pattern", pattern, "a regular expression", str(error))) from None
        try:
            self._low, self._high = float(low), float(high)
            is_scale = float("-inf") < self._low < self._high < float("inf")
        except (TypeError, ValueError):
            is_scale = False
        if not is_scale:
            raise ConfigError(explain(f"{what}: low, high", f"{low}, {high}", "two numbers, low < high", "swap them"))
        self._field = field
        top = re.escape(f"{self._high:g}")
        # A bare "of" counts right behind a number only: "a rating of 10" names a score.
        scale = rf"(?:/|\bout\s+of\b|(?<=\d)\W{{0,4}}\bof\b)\W{{0,4}}(?:the\s+|a\s+)?{top}(?:\.0+)?(?!\.?\d)"
        self._of_high = re.compile(scale, re.IGNORECASE)

    def read(self, reply: Reply) -> float:
        """The score. Raises RewardFailure: ``bad_score``, or ``score_out_of_range``."""
        text = answer_text(reply.text)  # a judge that thinks aloud weighs several scores
        if self._field is not None:
            score = self._read_field(text)
        elif self._pattern is not None:
            score = self._read_text(self._find(text))
        elif reply.finish_reason == "length":
            raise RewardFailure("bad_score", f"the reply was cut off at max_tokens: {_end_of(text)}")
        else:
            score = self._read_text(text)
        if not self._low <= score <= self._high:
            raise RewardFailure("score_out_of_range", f"{score:g}, not from {self._low:g} to {self._high:g}")
        return score

    def share(self, score: float) -> float:
        """``low`` is 0, ``high`` is 1."""
        return (score - self._low) / (self._high - self._low)

    def _find(self, text: str) -> str:
        assert self._pattern is not None
        match = None
        for match in self._pattern.finditer(text):  # noqa: B007 - the last one counts
            pass
        found = match and (match[1] if match.re.groups else match[0])
        if not found:
            raise RewardFailure("bad_score", f"nothing that matches the pattern: {_end_of(text)}")
        return str(found)

    def _read_field(self, text: str) -> float:
        value = _last_object(text)
        if value is None:
            raise RewardFailure("bad_score", f"no JSON object: {_end_of(text)}")
        for key in str(self._field).split("."):
            if not isinstance(value, Mapping) or key not in value:
                raise RewardFailure("bad_score", f"no {self._field} in the JSON object: {_end_of(text)}")
            value = value[key]
        if isinstance(value, str):
            return self._read_text(value)
        if isinstance(value, bool):
            raise RewardFailure("bad_score", f"{self._field} is {str(value).lower()}, no number")
        try:
            return read_number(value)
        except ValueError as error:
            raise RewardFailure("bad_score", f"{self._field}: {error}") from None

    def _read_text(self, text: str) -> float:
        """The last number; ``8/10`` and ``8 points out of 10`` are 8 where ``high`` is 10, and other fractions none."""
        plain = self._of_high.sub(" ", text)
        number = last_number(plain)
        if number is None:
            raise RewardFailure("bad_score", f"no number: {_end_of(text)}")
        fractions = [*FRACTION.finditer(plain)]
        if fractions and not re.search(r"\d", plain[fractions[-1].end() :]) and self._high != 1:
            raise RewardFailure("bad_score", f"a fraction, not of {self._high:g}: {_end_of(text)}")
        if number.percent and self._high != 100:
            raise RewardFailure("bad_score", f"a percentage, where the scale ends at {self._high:g}: {_end_of(text)}")
        try:
            return float(number.value)
        except OverflowError:
            return math.inf if number.value > 0 else -math.inf  # off any scale


def read_reply(content: bytes) -> Reply:
    """A chat completion; raises Retry for a body that is none."""
    try:
        body = json.loads(content)
        choice = body["choices"][0]
        text, usage = choice["message"].get("content"), body.get("usage") or {}
        tokens = usage.get("total_tokens")
        if not isinstance(text, str | None) or not isinstance(tokens, int | None):
            raise TypeError("content or usage of another type")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        got = shorten(content[:100].decode("utf-8", "replace"))
        raise Retry(shorten(f"a response that is no chat completion: {got!r} ({type(error).__name__})")) from None
    return Reply(text or "", choice.get("finish_reason"), tokens)


def _last_object(text: str) -> Any:
    """The last JSON object that stands in the text, or None."""
    decoder, found, position = json.JSONDecoder(), None, text.find("{")
    while position >= 0:
        try:
            found, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            end = position + 1
        position = text.find("{", end)
    return found


def _end_of(text: str) -> str:
    return shown(text[-60:])
