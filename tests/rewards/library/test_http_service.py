"""The http reward against a real service on this machine that fails in every way a service can."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rlpost.config import RewardConfig
from rlpost.errors import ConfigError
from rlpost.rewards.functions import LoadedFunction, Question, Response
from rlpost.rewards.selection import FunctionSpec

QUESTION = Question(prompt="1+1?", reference="2", columns={"level": 3})


class Service:
    """Answers each request by the next of ``script``: a status, a body, seconds to wait, bytes to drip."""

    def __init__(self):
        self.script, self.requests, self.busy, self.most_busy = [], [], 0, 0
        self.lock = threading.Lock()
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with service.lock:
                    service.requests.append((json.loads(body), dict(self.headers), time.monotonic()))
                    step = service.script.pop(0) if service.script else {}
                    service.busy += 1
                    service.most_busy = max(service.most_busy, service.busy)
                try:
                    self.answer(step)
                except (BrokenPipeError, ConnectionResetError):
                    pass
                finally:
                    with service.lock:
                        service.busy -= 1

            def answer(self, step):
                time.sleep(step.get("wait_s", 0))
                body = step.get("body", b"1.0")
                if step.get("hang_up"):
                    self.close_connection = True
                    return
                self.send_response(step.get("status", 200))
                for name, value in step.get("headers", {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                for byte in body if "drip_s" in step else [body]:
                    self.wfile.write(bytes([byte]) if isinstance(byte, int) else byte)
                    self.wfile.flush()
                    time.sleep(step.get("drip_s", 0))

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/judge"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def service():
    service = Service()
    yield service
    service.server.shutdown()
    service.server.server_close()


@pytest.fixture
def ask(service):
    """Judges one response by the service; settings are the reward's."""
    loaded = []

    def judge(*script, text="2", **settings):
        service.script = list(script)
        settings = {"backoff_s": 0.01, "attempt_timeout_s": 0.5, **settings}
        spec = FunctionSpec(function="http", args={"url": service.url, **settings})
        loaded.append(LoadedFunction(spec, RewardConfig()))
        (outcome,) = loaded[-1].score(QUESTION, [Response(text=text, finish_reason="stop")])
        return outcome

    yield judge
    for function in loaded:
        function.close()


def test_the_service_gets_everything_and_its_verdict_is_taken(ask, service):
    assert ask({"body": b"0.25"}).reward == 0.25
    (body, headers, _) = service.requests[0]
    assert body == {
        "response": "2",
        "prompt": "1+1?",
        "reference": "2",
        "finish_reason": "stop",
        "columns": {"level": 3},
    }
    assert headers["Content-Type"] == "application/json" and "Authorization" not in headers


def test_parts_no_opinion_and_half_a_surrogate_pair(ask):
    outcome = ask({"body": b'{"reward": 2, "accuracy": 1}'})
    assert (outcome.reward, outcome.parts) == (2.0, {"accuracy": 1.0})
    nothing = ask({"body": b"null"}, text="\ud800")
    assert nothing.reward is None and nothing.failure is None


def test_a_token_comes_from_the_environment(ask, service, monkeypatch):
    monkeypatch.setenv("JUDGE_TOKEN", "secret")
    assert ask(token_env="JUDGE_TOKEN").reward == 1.0
    assert service.requests[0][1]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    "trouble",
    [
        {"status": 500},
        {"status": 503},
        {"status": 429},
        {"hang_up": True},
        {"wait_s": 5.0},
        {"body": b"<html>try later</html>"},
        {"body": b'{"reward": "good"}'},
        {"body": b"NaN"},
        {"body": b"x" * 100, "drip_s": 0.1},
    ],
    ids=str,
)
def test_what_may_pass_is_tried_again(ask, service, trouble):
    assert ask(trouble, trouble, {"body": b"1.0"}).reward == 1.0
    assert len(service.requests) == 3


@pytest.mark.parametrize(
    ("trouble", "detail"),
    [
        ({"status": 500}, "status 500"),
        ({"wait_s": 5.0}, "no response within 0.5 s"),
        ({"body": b"<html>"}, "not a result: '<html>'"),
        ({"hang_up": True}, "ServerDisconnectedError"),
    ],
    ids=str,
)
def test_trouble_that_stays_is_a_failure(ask, service, trouble, detail):
    outcome = ask(trouble, trouble, trouble, retries=2)
    assert outcome.reward is None and outcome.failure.startswith("http_error: ")
    assert detail in outcome.failure and "(3 attempts)" in outcome.failure and len(service.requests) == 3


@pytest.mark.parametrize("status", [400, 401, 404, 302, 204])
def test_what_cannot_pass_is_a_failure_at_once(ask, service, status):
    assert ask({"status": status, "body": b""}).failure == f"http_error: status {status}"
    assert len(service.requests) == 1


def test_pauses_double_and_a_retry_after_is_kept_to(ask, service):
    ask({"status": 500}, {"status": 500}, {"status": 429, "headers": {"Retry-After": "1"}}, backoff_s=0.1)
    moments = [moment for _, _, moment in service.requests]
    pauses = [later - sooner for sooner, later in zip(moments, moments[1:], strict=False)]
    assert len(pauses) == 3 and pauses[0] >= 0.1 and pauses[1] >= 0.2
    assert pauses[2] >= 1.0, "without the header it would be 0.8 at most"


def test_nobody_there(ask):
    outcome = ask(url="http://127.0.0.1:9/", retries=1)
    assert outcome.failure.startswith("http_error: ClientConnectorError") and "(2 attempts)" in outcome.failure


def test_an_endless_answer_is_cut(ask):
    assert "more than 1048576 bytes" in ask({"body": b" " * (2 << 20)}).failure


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"url": "ftp://somewhere"}, "http reward|reward http: url"),
        ({"url": "http://a", "retries": -1}, "retries"),
        ({"url": "http://a", "concurrency": 0}, "concurrency"),
        ({"url": "http://a", "backoff_s": 0.0}, "backoff_s"),
        ({"url": "http://a", "token_env": "NO_SUCH_VARIABLE_HERE"}, "token_env"),
        ({}, "url"),
    ],
)
def test_settings_that_cannot_work(settings, why):
    with pytest.raises(ConfigError, match=why):
        LoadedFunction(FunctionSpec(function="http", args=settings), RewardConfig())


def test_requests_are_under_way_together_but_no_more_than_allowed(service):
    """Through a worker, as in a run: 12 questions, 4 at a time, 0.3 s each."""
    import numpy as np

    from rlpost.rewards.scoring import RewardScorer
    from rlpost.rewards.worker_pool import RewardWorkers
    from rlpost.types import Prompt

    service.script = [{"wait_s": 0.3}] * 12
    args = {"url": service.url, "concurrency": 4}
    workers = RewardWorkers(RewardConfig(function="http", args=args, workers=1))
    try:
        workers.wait_ready()
        scorer = RewardScorer(workers, lambda parts: "x")
        prompt = Prompt(uid="0:0", token_ids=np.zeros(1, np.int32), text="?")
        began = time.monotonic()
        for index in range(12):
            scorer.submit(prompt, index, [np.zeros(1, np.int32)], "stop")
        assert scorer.drain(60) and all(v.reward == 1.0 for v in scorer.poll())
        assert service.most_busy == 4 and 0.9 <= time.monotonic() - began < 3.0
    finally:
        workers.close()
