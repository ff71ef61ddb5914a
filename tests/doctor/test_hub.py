"""Whether the hub answers: real servers on this machine that answer, refuse, or stay silent."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Iterator

import pytest

from rlpost.doctor import hub
from rlpost.doctor.hub import check_hub


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of a server that takes a connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def closed() -> int:
    """A port nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(params=[200, 401, 404, 405])
def answering(request: pytest.FixtureRequest) -> Iterator[int]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(request.param)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def at(port: int) -> dict[str, str]:
    return {"HF_ENDPOINT": f"http://127.0.0.1:{port}/"}


def test_a_hub_that_answers_anything_is_reached(answering: int) -> None:
    finding = check_hub(at(answering), offline=False, needed="a/b", limit_s=30)
    assert (finding.status, finding.found) == ("ok", f"http://127.0.0.1:{answering} answers")


def test_a_hub_that_refuses_is_a_warning_and_a_problem_if_a_model_must_come_from_it(closed: int) -> None:
    finding = check_hub(at(closed), offline=False, needed=None, limit_s=30)
    assert finding.status == "warning" and "refused" in finding.found and "HF_HUB_OFFLINE=1" in finding.do
    finding = check_hub(at(closed), offline=False, needed="org/model", limit_s=30)
    assert finding.status == "problem" and "org/model" in finding.found and "model.path=FOLDER" in finding.do


def test_a_silent_hub_is_given_up(silent: int) -> None:
    finding = check_hub(at(silent), offline=False, needed=None, limit_s=0.2)
    assert finding.status == "warning" and "no answer within 0.2 s" in finding.found


def test_an_address_that_is_none_is_a_finding() -> None:
    finding = check_hub({"HF_ENDPOINT": "mirror"}, offline=False, needed=None, limit_s=30)
    assert finding.status == "warning" and "mirror: unknown url type" in finding.found


def test_what_speaks_no_http_is_a_finding() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

        threading.Thread(target=answer, daemon=True).start()
        finding = check_hub(at(server.getsockname()[1]), offline=False, needed=None, limit_s=30)
    assert finding.status == "warning" and "SSH-2.0" in finding.found


def test_offline_nothing_is_asked(closed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "why_unreachable", lambda *arguments: pytest.fail("it asked"))
    assert check_hub(at(closed), offline=True, needed=None).status == "skipped"
    assert check_hub(at(closed), offline=True, needed="org/model").status == "problem"


def test_without_an_endpoint_the_hub_itself_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(hub, "why_unreachable", lambda address, limit_s: asked.append(address) or "")
    assert check_hub({}, offline=False, needed=None).status == "ok"
    assert check_hub({"HF_ENDPOINT": ""}, offline=False, needed=None).status == "ok"
    assert asked == ["https://huggingface.co/"] * 2
