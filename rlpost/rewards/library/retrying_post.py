"""JSON requests to a service, with deadlines and bounded retries. Shared by the rewards that ask one.

aiohttp, because a request in flight must end when its deadline passes, however slowly bytes trickle in: the standard
library's clients block a thread until the server lets go.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from rlpost.errors import ConfigError, explain
from rlpost.rewards.failures import RewardFailure
from rlpost.rewards.outcomes import shorten

if TYPE_CHECKING:
    import aiohttp

MAX_BODY_BYTES = 1 << 20
MAX_SHOWN_BYTES = 200  # of the body of a refusal, in its message
MAX_BACKOFF_S = 30.0
RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})

Read = TypeVar("Read")


class Retry(Exception):
    """This attempt failed in a way that may pass; raised by readers of a reply, too."""

    def __init__(self, reason: str, after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.after_s = after_s


class RetryingPost:
    """POSTs JSON to ``url``.

    Failed connections, late or unreadable replies and the statuses in ``RETRIED`` are retried, with pauses that double
    from ``backoff_s`` (a Retry-After in seconds is honored); any other status is an immediate failure.

    Args:
        what: the reward, for messages about arguments: ``reward http``.
        token_env: environment variable with a bearer token, under the name ``token_name`` of the reward's argument.
        retries: additional attempts after the first.
        attempt_timeout_s: for one attempt, from connecting to the last byte.

    Raises ConfigError for arguments that cannot work.
    """

    def __init__(
        self,
        what: str,
        url: str,
        *,
        headers: Mapping[str, str] | None,
        token_env: str | None,
        token_name: str = "token_env",
        retries: int,
        backoff_s: float,
        attempt_timeout_s: float,
    ) -> None:
        if not isinstance(url, str) or not url.startswith(("http://", "https://")):
            raise ConfigError(explain(f"{what}: url", url, "http://... or https://...", "name the service"))
        if retries < 0:
            raise ConfigError(explain(f"{what}: retries", retries, ">= 0", "raise it"))
        for name, seconds in (("backoff_s", backoff_s), ("attempt_timeout_s", attempt_timeout_s)):
            if not seconds > 0:
                raise ConfigError(explain(f"{what}: {name}", seconds, "> 0", "give seconds"))
        self._url, self._headers = url, dict(headers or {})
        if token_env is not None:
            if token_env not in os.environ:
                expected = "the name of an environment variable that is set"
                raise ConfigError(explain(f"{what}: {token_name}", token_env, expected, "export it"))
            self._headers["Authorization"] = f"Bearer {os.environ[token_env]}"
        self._attempts, self._backoff_s = retries + 1, backoff_s
        self._attempt_timeout_s = attempt_timeout_s
        self._session: aiohttp.ClientSession | None = None
        # Enough for every attempt and every pause at its longest.
        self.timeout_s = self._attempts * attempt_timeout_s + sum(2 * self._pause_s(n) for n in range(retries)) + 1.0

    async def __call__(
        self,
        body: Mapping[str, Any],
        read: Callable[[bytes], Read],
        before: Callable[[], None] | None = None,
    ) -> Read:
        """``read(body of the reply)`` of the first attempt that succeeds; it raises :class:`Retry` to have another.

        ``before`` is called before each attempt and may raise. Raises RewardFailure ``http_error``.
        """
        reason = ""
        for attempt in range(self._attempts):
            if before is not None:
                before()
            try:
                return read(await self._attempt(body))
            except Retry as error:
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

    async def _attempt(self, body: Mapping[str, Any]) -> bytes:
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
                    raise Retry(f"status {reply.status}", _seconds(reply.headers.get("Retry-After")))
                if reply.status != 200:
                    said = (await reply.content.read(MAX_SHOWN_BYTES)).decode("utf-8", "replace")
                    raise RewardFailure("http_error", f"status {reply.status}" + (f": {said}" if said else ""))
                content = await reply.content.read(MAX_BODY_BYTES)
                while chunk := await reply.content.read(MAX_BODY_BYTES):
                    content += chunk
                    if len(content) > MAX_BODY_BYTES:
                        raise RewardFailure("http_error", f"a response of more than {MAX_BODY_BYTES} bytes")
        except TimeoutError:
            raise Retry(f"no response within {self._attempt_timeout_s:g} s") from None
        except aiohttp.ClientError as error:
            raise Retry(shorten(f"{type(error).__name__}: {error}")) from None
        return content


def check_concurrency(what: str, concurrency: int) -> None:
    """Raises ConfigError for a number of requests in flight that cannot be meant."""
    if concurrency < 1:
        raise ConfigError(explain(f"{what}: concurrency", concurrency, ">= 1", "raise it"))


def _seconds(text: str | None) -> float:
    """Retry-After if it is a number of seconds; its other form, a date, is ignored."""
    return float(text) if text is not None and text.isdigit() else 0.0
