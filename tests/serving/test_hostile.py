"""What is wrong is answered with an error that says so, and costs nobody else anything."""

from __future__ import annotations

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.processes import HANGS
from tests.serving.conftest import LIMIT, serving, wait_until
from tests.serving.jobs import served
from tests.serving.test_serve import PROMPTS
from trl_diffusion import DecodingConfig
from trl_diffusion.decoding.live import LiveLoop
from trl_diffusion.serving.errors import ApiError


GOOD = {"prompt": PROMPTS[0], "max_tokens": 4}
WRONG = {
    "no JSON": (b'{"prompt": "x",', 400, "is not JSON"),
    "not UTF-8": (b"\xff\xfe{}", 400, "is not JSON"),
    "deep": (b"[" * 100_000, 400, "is not JSON"),
    "no number": (b'{"temperature": NaN}', 400, "NaN is no number of JSON"),
    "a key twice": (b'{"n": 1, "n": 2}', 400, "'n' is given twice"),
    "no object": (b"[1]", 400, "must be a JSON object"),
    "no prompt": ({}, 400, "`prompt`: must be a text"),
    "empty": ({"prompt": ""}, 400, "`prompt`: must be a text"),
    "mixed": ({"prompt": ["x", 1]}, 400, "`prompt`: must be a text"),
    "an object": ({"prompt": {"text": "x"}}, 400, "`prompt`: must be a text"),
    "nested": (b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}", 400, ""),
    "half a character in a name": ({"\ud800": 1}, 400, "There is no field"),
    "half a character": ({"prompt": "\ud800"}, 400, "`prompt`: cannot be tokenized"),
    "negative token": ({"prompt": [3, -1]}, 400, "holds token -1"),
    "huge token": ({"prompt": [10**30]}, 400, "holds token 1000"),
    "the mask token": ({"prompt": [3, 1]}, 400, "contains the mask token"),
    "too long": ({"prompt": [3] * 600}, 400, "more than the policy's context"),
    "too many prompts": ({"prompt": ["x"] * 65}, 400, "holds 65 prompts"),
    "negative n": ({"n": -1}, 400, "`n`: must be a whole number from 1 to 64, got -1"),
    "n of another kind": ({"n": True}, 400, "`n`: must be a whole number"),
    "prompts times n": ({"prompt": ["x"] * 9, "n": 8}, 400, "9 prompts with 8 responses each"),
    "too many tokens": ({"max_tokens": LIMIT + 1}, 400, f"from 1 to {LIMIT}"),
    "a float": ({"max_tokens": 1.5}, 400, "`max_tokens`: must be a whole number"),
    "cold": ({"temperature": -1}, 400, "`temperature`: `temperature` must be a number of at least 0"),
    "hot": ({"temperature": "1"}, 400, "`temperature`: must be a number"),
    "infinite": (b'{"prompt": "x", "temperature": 1e999}', 400, "`temperature`"),
    "top_p": ({"top_p": 0}, 400, "`top_p`"),
    "seed": ({"seed": 2**63}, 400, "`seed`"),
    "stop": ({"stop": [""]}, 400, "`stop`"),
    "another model": ({"model": "gpt"}, 404, "There is no model 'gpt' here; there is 'tiny'"),
    "echo": ({"echo": True, "logprobs": 1}, 400, "does not write from left to right"),
    "top log-probs": ({"logprobs": 5}, 400, "those of others are not"),
    "a mistyped field": ({"max_token": 1}, 400, "Is it meant to be max_tokens?"),
    "of chats": ({"messages": []}, 400, "There is no field 'messages'"),
    "penalties": ({"presence_penalty": 1.0}, 400, "no penalties"),
    "a canvas without a stream": ({"stream_canvas": True}, 400, "is for streams"),
    "huge": (b" " * 5_000_000, 413, "at most 4000000 bytes"),
}


@pytest.fixture(scope="module")
def error_of(client):
    def ask(body):
        content = body if isinstance(body, bytes) else {**({"prompt": "x"} if body else {}), **body}
        return client.send("/v1/completions", content)

    return ask


def test_wrong_requests(client, error_of):
    """All of them in one test: each takes milliseconds."""
    for name, (body, status, message) in WRONG.items():
        found, answer = error_of(body)
        error = answer["error"]
        assert found == status and message in error["message"], (name, answer)
        assert set(error) == {"message", "type", "param", "code"} and len(error["message"]) < 1500
    for path, status in (("/v1/nothing", 404), ("/v1/completions", 405), ("/v1/models/other", 404)):
        found, answer = client.send(path)
        assert found == status and answer["error"]["message"]
    status, answer = client.send("/v1/completions", GOOD, {"Content-Type": "text/plain"})
    assert status == 415 and "application/json" in answer["error"]["message"]
    assert client.complete(**GOOD)


def test_null_and_neutral_fields_are_accepted(client):
    neutral = {
        "echo": False,
        "suffix": None,
        "logit_bias": {},
        "presence_penalty": 0,
        "user": "x",
        "top_p": 1,
        "best_of": 1,
    }
    assert client.complete(**GOOD, **neutral) == client.complete(**GOOD)


def test_clients_that_do_not_send_what_they_promise(client):
    """Half a body, half a head, chunks without an end, and a client that goes at once. The others are answered meanwhile."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    slow = [client.raw() for _ in range(3)]
    for connection, begun in zip(
        slow,
        (b"Content-Length: 50\r\n\r\n{", b"Content-", b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n"),
        strict=True,
    ):
        connection.sendall(head + begun)
    rude = client.raw()
    body = json.dumps({**GOOD, "max_tokens": LIMIT, "n": 8}).encode()
    rude.sendall(head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    rude.close()
    nonsense = client.raw()
    nonsense.sendall(b"\x00\x01\x02\r\n\r\n")
    assert b"400" in nonsense.recv(100)
    assert client.complete(**GOOD)
    for connection in (*slow, nonsense):
        connection.close()
    client.wait_until_idle()


def test_a_body_that_does_not_arrive_in_time(embedded, monkeypatch):
    from trl_diffusion.serving import server

    limits = server.Limits
    monkeypatch.setattr(server, "Limits", lambda *values: limits(*values, body_seconds=0.1))
    with serving(embedded) as (client, _):
        connection = client.raw()
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
        )
        assert b" 408 " in connection.recv(1000)
        connection.close()


def test_a_stream_that_is_cancelled_leaves_the_loop(client):
    """And a client that reads nothing of its stream holds nobody up."""
    connections = []
    for _ in range(8):  # all lanes
        connection = client.raw()
        body = json.dumps({"prompt": PROMPTS[0], "stream": True, "stream_canvas": True, "n": 4}).encode()
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            + f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        connections.append(connection)
    for connection in connections[:4]:
        connection.recv(10)
        connection.close()
    assert client.complete(**GOOD)
    client.wait_until_idle()
    for connection in connections[4:]:
        connection.close()


def test_what_is_cancelled_takes_no_more_steps(embedded):
    """Neither in the loop nor in the queue."""
    from trl_diffusion.serving.engine import Engine, Job

    engine, heard, (prompt,) = Engine(embedded, 40, 1, 4), [], embedded.encode(PROMPTS[0])
    config = DecodingConfig(LIMIT)

    def listen(event):
        heard.append(event)
        engine.cancel(jobs)

    jobs = [Job(prompt, config, LIMIT, 0, listen, "steps"), Job(prompt, config, LIMIT, 0, listen, "steps")]
    engine.start()
    engine.submit(jobs)
    wait_until(lambda: heard and not sum(engine.load().values()))
    engine.close()
    steps = [event["step"] for event in heard if isinstance(event, dict)]
    assert steps == [0] and len(heard) == 2 and not engine.is_alive  # the first step also ends the first block
    with pytest.raises(ApiError, match="shutting down"):
        engine.submit(jobs)


def test_other_machines_are_warned_of(caplog):
    from trl_diffusion.serving.server import listen_at

    with listen_at("127.0.0.1", 0) as listener:
        assert not caplog.records
        with pytest.raises(
            ValueError, match="Nothing can listen at 127.0.0.1, port .*Choose another --host or --port"
        ):
            listen_at("127.0.0.1", listener.getsockname()[1])
    listen_at("0.0.0.0", 0).close()
    assert "Every machine that reaches 0.0.0.0 can use this server" in caplog.text


def test_a_full_queue(embedded, monkeypatch):
    """More than there is room for is refused at once, and what was taken is answered."""
    from trl_diffusion.serving.engine import Engine

    admit = Engine._admit
    full = []
    monkeypatch.setattr(Engine, "_admit", lambda self: admit(self) if full else time.sleep(0.01))
    with serving(embedded, max_batch=1, max_queue=4, max_responses=4) as (client, _), ThreadPoolExecutor(4) as pool:
        taken = [pool.submit(client.send, "/v1/completions", GOOD) for _ in range(4)]
        wait_until(lambda: client.load()["waiting"] == 4)
        status, answer = client.send("/v1/completions", GOOD)
        assert status == 429 and answer["error"]["code"] == "queue_full"
        full.append(True)
        assert [one.result()[0] for one in taken] == [200] * 4
        status, answer = client.send("/v1/completions", {**GOOD, "n": 5})
        assert status == 400  # which could never be taken


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command(number, tmp_path):
    """What waits is refused, and the process ends with the exit code of the signal and no traceback."""
    words = ["--max_new_tokens", "24", "--max_batch", "1"]
    with served(tmp_path / "log", words) as (process, client), ThreadPoolExecutor(12) as pool:
        waiting = [pool.submit(client.send, "/v1/completions", {**GOOD, "max_tokens": 24, "n": 4}) for _ in range(12)]
        wait_until(lambda: client.load()["decoding"])
        os.kill(process.pid, number)
        statuses = [one.result()[0] for one in waiting]
        process.join(HANGS)
        assert process.exitcode == (130 if number == signal.SIGINT else -signal.SIGTERM)
    assert 503 in statuses and set(statuses) <= {200, 503}
    log = (tmp_path / "log").read_text()
    assert f"embedded is served at {client.url}" in log and "Traceback" not in log and len(log.splitlines()) <= 2, log


def test_a_step_that_fails(embedded, monkeypatch):
    """Those that it was for are told, with the kind of error, and the next request is answered."""
    step, failures = LiveLoop.step, [IndexError("out of bounds " * 100)]

    def sometimes(self):
        if failures:
            raise failures.pop()
        return step(self)

    monkeypatch.setattr(LiveLoop, "step", sometimes)
    with serving(embedded) as (client, _):
        status, found = client.send("/v1/completions", {"prompt": PROMPTS[0]})
        assert status == 500 and found["error"]["code"] == "decoding_failed"
        assert (
            "Decoding failed (IndexError: out of bounds" in found["error"]["message"]
            and len(found["error"]["message"]) < 300
        )
        assert client.complete(PROMPTS[0])[0]["text"]
