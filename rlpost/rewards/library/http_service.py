"""The ``http`` reward: calls a scoring service, with bounded retries.

aiohttp, because a request in flight must end when its deadline passes, however slowly bytes trickle in: the standard
library's clients block a thread until the server lets go. A worker has at most ``concurrency`` requests in flight; the
rest wait in the run's queue.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rlpost.errors import ConfigError, explain
from rlpost.rewards.failures import RewardFailure
from rlpost.rewards.outcomes import shorten
from rlpost.rewards.values import read_outcome

if TYPE_CHECKING:
    import aiohttp

MAX_BODY_BYTES = 1 << 20
MAX_BACKOFF_S = 30.0
RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})


class HttpReward:
    """POSTs ``{"response", "prompt", "reference", "finish_reason", "columns"}`` as JSON.

    The service responds with a number, an object of numbers (named parts, ``reward`` the total), or null for no
    opinion. Failed connections, late or unreadable responses and the statuses in ``RETRIED`` are retried, with pauses
    that double from ``backoff_s`` (a Retry-After in seconds is honored); any other status is an immediate failure.

    Args:
        retries: additional attempts after the first.
        attempt_timeout_s: for one attempt, from connecting to the last byte.
        token_env: environment variable with a bearer token, so that it appears in no configuration.
        version: part of the key of cached results; change it with the service.
    """

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        token_env: str | None = None,
        retries: int = 3,
        backoff_s: float = 0.5,
        attempt_timeout_s: float = 10.0,
        concurrency: int = 8,
        version: str = "",
        cacheable: bool = True,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(explain("reward http: url", url, "http://... or https://...", "name the service"))
        for name, value, least in (("retries", retries, 0), ("concurrency", concurrency, 1)):
            if value < least:
                raise ConfigError(explain(f"reward http: {name}", value, f">= {least}", "raise it"))
        for name, seconds in (("backoff_s", backoff_s), ("attempt_timeout_s", attempt_timeout_s)):
            if not seconds > 0:
                raise ConfigError(explain(f"reward http: {name}", seconds, "> 0", "give seconds"))
        self._url, self._headers = url, dict(headers or {})
        if token_env is not None:
            if token_env not in os.environ:
                raise ConfigError(explain("reward http: token_env", token_env, "an environment variable", "export it"))
            self._headers["Authorization"] = f"Bearer {os.environ[token_env]}"
        self._attempts, self._backoff_s = retries + 1, backoff_s
        self._attempt_timeout_s = attempt_timeout_s
        self._session: aiohttp.ClientSession | None = None
        self.concurrency, self.version, self.cacheable = concurrency, version, cacheable
        # Enough for every attempt and every pause at its longest.
        self.timeout_s = self._attempts * attempt_timeout_s + sum(2 * self._pause_s(n) for n in range(retries)) + 1.0

    async def __call__(self, response: str, **rest: Any) -> Any:
        body = {name: rest.get(name) for name in ("prompt", "reference", "finish_reason", "columns")}
        reason = ""
        for attempt in range(self._attempts):
            try:
                return await self._attempt({"response": response, **body})
            except _Retry as error:
                reason = str(error)
                if attempt + 1 < self._attempts:
                    pause = self._pause_s(attempt) * (1.0 + random.random())  # spreads retries of simultaneous failures
                    await asyncio.sleep(min(MAX_BACKOFF_S, max(pause, error.after_s)))
        raise RewardFailure("http_error", f"{reason} ({self._attempts} attempts)")

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _pause_s(self, attempt: int) -> float:
        return min(MAX_BACKOFF_S / 2, self._backoff_s * 2**attempt)

    async def _attempt(self, body: Mapping[str, Any]) -> Any:
        import aiohttp

        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=self._attempt_timeout_s)
            self._session = aiohttp.ClientSession(timeout=timeout, headers=self._headers)
        try:
            # dumps escapes lone surrogates, which UTF-8 cannot represent.
            data = json.dumps(body).encode("ascii")
            post = self._session.post(
                self._url, data=data, headers={"Content-Type": "application/json"}, allow_redirects=False
            )
            async with post as reply:
                if reply.status in RETRIED:
                    raise _Retry(f"status {reply.status}", _seconds(reply.headers.get("Retry-After")))
                if reply.status != 200:
                    raise RewardFailure("http_error", f"status {reply.status}")
                content = await reply.content.read(MAX_BODY_BYTES)
                while chunk := await reply.content.read(MAX_BODY_BYTES):
                    content += chunk
                    if len(content) > MAX_BODY_BYTES:
                        raise RewardFailure("http_error", f"a response of more than {MAX_BODY_BYTES} bytes")
        except TimeoutError:
            raise _Retry(f"no response within {self._attempt_timeout_s:g} s") from None
        except aiohttp.ClientError as error:
            raise _Retry(shorten(f"{type(error).__name__}: {error}")) from None
        return read_reply(content)


def read_reply(content: bytes) -> Any:
    """The service's result, validated; raises for anything but the three forms."""
    try:
        value = json.loads(content)
        if value is not None:
            read_outcome(value)
    except (ValueError, TypeError) as error:
        got = shorten(content[:100].decode("utf-8", "replace"))
        raise _Retry(shorten(f"a response that is not a result: {got!r} ({type(error).__name__})")) from None
    return value


class _Retry(Exception):
    def __init__(self, reason: str, after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.after_s = after_s


def _seconds(text: str | None) -> float:
    """Retry-After if it is a number of seconds; its other form, a date, is ignored."""
    return float(text) if text is not None and text.isdigit() else 0.0
