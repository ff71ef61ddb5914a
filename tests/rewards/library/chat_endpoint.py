"""A chat endpoint on this machine that says, and fails, as it is told."""

from __future__ import annotations

import asyncio
import json
import threading

from aiohttp import web


class Endpoint:
    """Answers each request by the next of ``script``: a text, or a dict with status, text, body, wait_s, headers."""

    def __init__(self) -> None:
        self.script: list = []
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        self.reply = lambda request: "Score: 5"  # once the script has ended
        self.usage: dict | None = {"total_tokens": 100}
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self._thread.start()
        assert ready.wait(30)

    def _run(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._complete)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        self._loop.run_until_complete(self._runner.setup())
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"
        ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(self._runner.cleanup())
        self._loop.close()

    async def _complete(self, request: web.Request) -> web.Response:
        self.requests.append(await request.json())
        self.headers.append(dict(request.headers))
        step = self.script.pop(0) if self.script else self.reply(self.requests[-1])
        step = {"text": step} if isinstance(step, str | None) else step
        await asyncio.sleep(step.get("wait_s", 0))
        message = {"role": "assistant", "content": step.get("text")}
        choice = {"index": 0, "message": message, "finish_reason": step.get("finish_reason", "stop")}
        body = {"choices": [choice]} | ({} if self.usage is None else {"usage": self.usage})
        text = step.get("body", json.dumps(body))
        return web.Response(status=step.get("status", 200), text=text, headers=step.get("headers"))

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
