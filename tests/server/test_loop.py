"""The engine's thread, and the command, where things go wrong or come to an end."""

import asyncio
import functools
import re
import signal
import socket
import threading
import time

import httpx2 as httpx
import pytest

from fqjax.cli import main as cli
from fqjax.inference.requests import Finished, Output, Request
from fqjax.runtime.errors import InputError
from fqjax.server.loop import EngineLoop, Stopped
from fqjax.server.metrics import Histogram
from fqjax.server.run import bound, open_to_others
from tests.conftest import make_checkpoint
from tests.server.serving import command


class Engine:
    """Gives every request a token a step until it is cancelled."""

    def __init__(self):
        self.tickets = 0
        self.waiting, self.running, self.requests, self.ended = [], [], {}, []
        self.fails = threading.Event()

    @property
    def busy(self):
        return bool(self.requests or self.ended)

    def submit(self, request):
        if request.name == "refused":
            raise InputError("refused")
        if request.name == "fault":
            raise RuntimeError("fault")
        self.tickets += 1
        ticket = self.tickets
        self.requests[ticket] = request
        return ticket

    def cancel(self, ticket):
        if ticket in self.requests:
            finished = Finished(request=self.requests.pop(ticket), tokens=[], reason="cancelled")
            self.ended.append(Output(ticket, [], None, finished))

    def step(self):
        time.sleep(0.002)
        if self.fails.is_set():
            raise RuntimeError("out of memory")
        ended, self.ended = self.ended, []
        return [*ended, *(Output(ticket, [7], None, None) for ticket in self.requests)]


@pytest.fixture
def loop():
    loop = EngineLoop(Engine())
    loop.start()
    yield loop
    loop.stop(0)
    assert loop.join(10)


def request(name=None):
    return Request(prompt=[1], name=name)


async def until_the_end(job):
    while True:
        for _, output in await job.next():
            if output.finished is not None:
                return output.finished.reason


@pytest.mark.parametrize(("name", "error"), [("refused", InputError), ("fault", RuntimeError)])
def test_all_requests_are_taken_or_none(loop, name, error):
    async def run():
        with pytest.raises(error, match=name):
            await loop.submit([request(), request(name)])
        job = await loop.submit([request()])
        await job.next()
        loop.cancel(job)
        assert await until_the_end(job) == "cancelled"

    asyncio.run(asyncio.wait_for(run(), 30))
    assert loop.alive


def test_a_stop_lets_requests_end_for_a_while(loop):
    async def run():
        job = await loop.submit([request()])
        began = time.monotonic()
        loop.stop(0.3)
        with pytest.raises(Stopped, match="stopping"):
            await loop.submit([request()])
        assert await until_the_end(job) == "cancelled" and time.monotonic() - began >= 0.3

    asyncio.run(asyncio.wait_for(run(), 30))
    assert loop.join(10) and not loop.alive


def test_a_failure_is_told_to_all(loop, caplog):
    async def run():
        jobs = [await loop.submit([request()]) for _ in range(2)]
        loop.engine.fails.set()
        for job in jobs:
            with pytest.raises(Stopped, match="the engine has failed .*out of memory"):
                await until_the_end(job)
        loop.join(10)
        with pytest.raises(Stopped, match="the engine has failed"):
            await loop.submit([request()])

    asyncio.run(asyncio.wait_for(run(), 30))
    assert not loop.alive and "out of memory" in loop.failure


def test_an_event_loop_that_has_gone_stops_nobody(loop):
    async def leave():
        await loop.submit([request()])

    async def stay():
        job = await loop.submit([request()])
        await job.next()

    asyncio.run(asyncio.wait_for(leave(), 30))
    asyncio.run(asyncio.wait_for(stay(), 30))
    assert loop.alive


def test_histograms_add_up():
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.add(value)
    lines = histogram.lines("x")
    assert lines == [
        'x_bucket{le="1.0"} 2', 'x_bucket{le="2.0"} 3', 'x_bucket{le="+Inf"} 4', "x_sum 12", "x_count 4"
    ]  # fmt: skip


def complains(capsys, message, *arguments):
    assert cli.main(["serve", *map(str, arguments)]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_what_is_wrong_is_said_before_a_model_is_loaded(capsys, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        complains(capsys, "cannot be listened on", "none", "--port", taken.getsockname()[1])
    complains(capsys, "no address of this machine", "none", "--host", "256.1.1.1", "--port", 0)
    complains(capsys, "--slots 0: expected at least 1", "none", "--slots", 0)
    complains(capsys, "--port 70000: expected at most 65535", "none", "--port", 70000)
    complains(capsys, "--grace -1.0: expected seconds", "none", "--grace", -1)
    complains(capsys, "--api-key or FQJAX_API_KEY: empty", "none", "--api-key", "")
    with monkeypatch.context() as patch:
        patch.setenv("FQJAX_API_KEY", "")
        complains(capsys, "--api-key or FQJAX_API_KEY: empty", "none")
    for key in (" key", "key\n", "k\tey", "k\udcffey"):
        complains(capsys, "--api-key: holds what no header can carry", "none", "--api-key", key)
    complains(capsys, "--host: empty; expected an address", "none", "--host", "")
    complains(capsys, "--kv-cache int2: expected int8", "none", "--kv-cache", "int2")
    monkeypatch.setattr("fqjax.server.run.PACKAGES", ("starlette", "no_such_package"))
    complains(capsys, r"serving needs no_such_package; pip install 'fqjax\[serve\]'", "none")


def test_the_command_serves_until_it_is_told_to_stop(tmp_path):
    options = ["--slots", "2", "--capacity", "64", "--grace", "5"]
    directory = make_checkpoint(tmp_path / "model")
    with command(directory, *options, FQJAX_API_KEY="secret", JAX_LOG_COMPILES="1") as running:
        assert any(line.startswith("compiling ") for line in running.said), running.said
        body = {"prompt": [1, 5], "max_tokens": 3, "model": "model"}
        ask = functools.partial(httpx.post, f"{running.url}/v1/completions", json=body, timeout=60)
        assert ask().status_code == 401
        assert ask(headers={"authorization": "Bearer secret"}).json()["usage"]["prompt_tokens"] == 2
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(30) == 0
        rest = running.process.stderr.read()
    assert rest.endswith("stopped\n") and "Traceback" not in rest
    assert not re.search(r"Compiling jit\((take_piece|begin|decode|advance|pick_next)\)", rest), rest


def test_streams_end_in_time_when_the_server_is_told_to_stop(tmp_path):
    directory = make_checkpoint(tmp_path / "model")
    with command(directory, "--slots", "2", "--capacity", "128", "--host", "localhost", "--grace", "0") as running:
        assert httpx.get(f"{running.url}/health").status_code == 200
        body = {"prompt": [1, 5], "max_tokens": 120, "stream": True, "n": 8}
        with httpx.stream("POST", f"{running.url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            running.process.send_signal(signal.SIGTERM)
            rest = list(lines)
        assert "the server is stopping" in rest[-2] or rest[-2] == "data: [DONE]"
        assert running.process.wait(30) == 0
        assert "Traceback" not in running.process.stderr.read()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "0.0.0.0", "::"])
def test_names_and_addresses_that_can_be_listened_on(host):
    try:
        listening = bound(host, 0)
    except InputError:
        if ":" not in host:
            raise
        pytest.skip("this machine has no IPv6")
    try:
        assert len({each.getsockname()[1] for each in listening}) == 1
        assert open_to_others(listening) == (host in ("0.0.0.0", "::"))
        for each in listening:
            each.listen()
            family = {"::1": "::1", "::": "::1"}.get(host, "127.0.0.1")
        socket.create_connection((family, listening[0].getsockname()[1]), timeout=5).close()
        if host == "::":
            socket.create_connection(("127.0.0.1", listening[0].getsockname()[1]), timeout=5).close()
    finally:
        for each in listening:
            each.close()
