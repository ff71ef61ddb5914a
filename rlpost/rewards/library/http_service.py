"""The ``http`` reward: asks a scoring service.

A worker has at most ``concurrency`` requests in flight; the rest wait in the run's queue.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rlpost.rewards.library.retrying_post import Retry, RetryingPost, check_concurrency
from rlpost.rewards.outcomes import shorten
from rlpost.rewards.values import read_outcome


class HttpReward:
    """POSTs ``{"response", "prompt", "reference", "finish_reason", "columns"}`` as JSON.

    The service responds with a number, an object of numbers (named parts, ``reward`` the total), or null for no
    opinion. ``rewards.library.retrying_post`` says what is retried.

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
        self._post = RetryingPost(
            "reward http",
            url,
            headers=headers,
            token_env=token_env,
            retries=retries,
            backoff_s=backoff_s,
            attempt_timeout_s=attempt_timeout_s,
        )
        check_concurrency("reward http", concurrency)
        self.concurrency, self.version, self.cacheable = concurrency, version, cacheable
        self.timeout_s = self._post.timeout_s

    async def __call__(self, response: str, **rest: Any) -> Any:
        body = {name: rest.get(name) for name in ("prompt", "reference", "finish_reason", "columns")}
        return await self._post({"response": response, **body}, read_reply)

    async def close(self) -> None:
        await self._post.close()


def read_reply(content: bytes) -> Any:
    """The service's result, validated; raises for anything but the three forms."""
    try:
        value = json.loads(content)
        if value is not None:
            read_outcome(value)
    except (ValueError, TypeError) as error:
        got = shorten(content[:100].decode("utf-8", "replace"))
        raise Retry(shorten(f"a response that is not a result: {got!r} ({type(error).__name__})")) from None
    return value
