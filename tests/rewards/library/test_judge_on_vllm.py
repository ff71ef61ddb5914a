"""The judge against vLLM's own OpenAI-compatible server, a process on this machine with a tiny random model."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest

from rlpost.config import RewardConfig
from rlpost.rewards.library.budget import FILE_NAME
from rlpost.rewards.scoring import RewardScorer
from rlpost.rewards.worker_pool import RewardWorkers
from rlpost.types import Prompt
from tests.tiny_models import make_tokenizer, write_model

# What the server needs beyond the engine; requirements/cpu.txt has them, an installation without them runs all else.
NEEDED = ("uvicorn", "watchfiles", "jmespath", "model_hosting_container_standards", "prometheus_fastapi_instrumentator")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.own_process,  # the server competes for the cores
    pytest.mark.skipif(bool(MISSING), reason=f"vLLM's server is not installed: no {', '.join(MISSING)}"),
]
KEY = "a secret of this test"
MAX_MODEL_LEN = 256
RESPONSES = ["five", "six", "I do not know.", "2 + 3 = 5", "", "The answer is five."]
START_S = 600  # it takes half a minute on an idle machine


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The URL of a server that asks for a key."""
    folder = tmp_path_factory.mktemp("server")
    model = write_model(folder / "model", weights=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--api-key", KEY]
    command += ["--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "4", "--dtype", "float32"]
    command += ["--enforce-eager", "--kv-cache-memory-bytes", str(16 << 20)]
    quiet = {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **quiet},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_S
        while not is_healthy(port):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture
def judge(server, tmp_path, monkeypatch):
    """Results of one response each, through reward workers; the run's folder is ``tmp_path``."""
    monkeypatch.setenv("JUDGE_KEY", KEY)
    monkeypatch.setenv("WRONG_KEY", "something else")
    started = []

    def run(*responses, **settings):
        args = {"url": server, "model": "tiny", "rubric": "Rate: {response}", "backoff_s": 0.01, **settings}
        args.setdefault("api_key_env", "JUDGE_KEY")
        workers = RewardWorkers(RewardConfig(function="judge", args=args, workers=2), folder=tmp_path)
        started.append(workers)
        workers.wait_ready()
        scorer = RewardScorer(workers, lambda parts: responses[int(parts[0][0])])
        prompt = Prompt(uid="0:0", token_ids=np.zeros(1, np.int32), text="2+3?", reference="5")
        for index in range(len(responses)):
            scorer.submit(prompt, index, [np.array([index])], "stop")
        assert scorer.drain(300)
        return sorted(scorer.poll(), key=lambda one: one.index)

    yield run
    for workers in started:
        workers.close()


def one_digit() -> dict:
    """A random model says nothing that could be read as a score, so its next token is limited to the digits."""
    tokenizer = make_tokenizer()
    return {"logit_bias": {str(tokenizer.convert_tokens_to_ids(digit)): 100 for digit in "0123456789"}}


def ask(server: str, response: str) -> tuple[str, int]:
    """(text, tokens) of the same request, sent without the judge."""
    messages = [{"role": "user", "content": f"Rate: {response}"}]
    body = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 1, **one_digit()}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    request = urllib.request.Request(f"{server}/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=300) as reply:
        completion = json.load(reply)
    return completion["choices"][0]["message"]["content"], completion["usage"]["total_tokens"]


def test_scores_failures_keys_and_spent_tokens(judge, server, tmp_path):
    settings = {"max_tokens": 1, "pattern": r"\d", "high": 9, "request": one_digit(), "budget_tokens": 100_000}
    results = judge(*RESPONSES, **settings)
    expected = [ask(server, response) for response in RESPONSES]
    assert [one.parts for one in results] == [{"raw_score": float(text)} for text, _ in expected]
    assert [one.reward for one in results] == [float(text) / 9 for text, _ in expected]
    assert len({text for text, _ in expected}) > 1, "the model tells responses apart"
    with sqlite3.connect(tmp_path / FILE_NAME) as database:
        spent = database.execute("SELECT requests, tokens FROM spent").fetchall()
    assert spent == [(len(RESPONSES), sum(tokens for _, tokens in expected))]

    random_text = judge(*RESPONSES, max_tokens=8, pattern=r"Score: (\d)")
    assert [one.reward for one in random_text] == [None] * len(RESPONSES)
    assert all(one.failure.startswith("bad_score: nothing that matches") for one in random_text)
    (long,) = judge("five " * MAX_MODEL_LEN, max_tokens=8)
    assert long.failure.startswith("http_error: status 400: ") and "context length" in long.failure, long.failure
    (unknown,) = judge("five", api_key_env="WRONG_KEY")
    assert unknown.failure.startswith("http_error: status 401")
    (absent,) = judge("five", model="absent")
    assert absent.failure.startswith("http_error: status 404: ") and "absent" in absent.failure
