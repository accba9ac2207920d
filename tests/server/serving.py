"""A server in a thread, as tests ask it."""

import contextlib
import dataclasses
import os
import subprocess
import sys
import threading
import time

import httpx2 as httpx
import jax.numpy as jnp
import openai

from fqjax.checkpoint.hugging_face import load_hf
from fqjax.data.text import decode_new, encode_prompt
from fqjax.inference.generate import generate
from fqjax.server.app import Settings
from fqjax.server.run import Limits, api_of, bound, server_of

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


@dataclasses.dataclass
class Running:
    """A server that runs, and what it serves."""

    model: object
    tokenizer: object
    api: object
    server: object
    url: str
    clients: list = dataclasses.field(default_factory=list)

    def client(self, **settings):
        """The client that users have."""
        made = openai.OpenAI(
            **{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, "timeout": 60} | settings
        )
        self.clients.append(made)
        return made

    def expected(self, prompt, new, **settings):
        """The text of ``generate``'s tokens."""
        ids = encode_prompt(self.tokenizer, self.model.config, prompt) if isinstance(prompt, str) else prompt
        return decode_new(self.tokenizer, self.model.config, ids, generate(self.model, ids, new, **settings))

    def post(self, path, **arguments):
        """A call without the client."""
        return httpx.post(f"{self.url}{path}", timeout=60, **arguments)

    def metric(self, name):
        """A sample's value."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith(f"{name} ")).rpartition(" ")[2])

    def settled(self, seconds=30):
        """Waits until no request is left."""
        until = time.monotonic() + seconds
        while self.metric("fqjax_requests_running") or self.metric("fqjax_requests_waiting"):
            assert time.monotonic() < until
            time.sleep(0.02)


@contextlib.contextmanager
def running(checkpoint, limits=None, settings=None, grace=5.0):
    """A server of a checkpoint, which has a chat template."""
    model, tokenizer = load_hf(checkpoint, jnp.float32)
    tokenizer.chat_template = TEMPLATE
    api = api_of(model, tokenizer, "tiny", limits or Limits(slots=4, queue=8), settings or Settings())
    ready, (listening,) = threading.Event(), bound("127.0.0.1", 0)
    server = server_of(api, grace, ready.set)
    thread = threading.Thread(target=lambda: server.run(sockets=[listening]))
    thread.start()
    try:
        assert ready.wait(60)
        served = Running(model, tokenizer, api, server, f"http://127.0.0.1:{listening.getsockname()[1]}")
        yield served
        for client in served.clients:  # Connections that are left open are warned of when they are collected.
            client.close()
    finally:
        server.stop()
        thread.join(30)
        assert api.engine.join(30) and not thread.is_alive()


@dataclasses.dataclass
class Command:
    """``fqjax serve``, which runs.

    Attributes:
      process: its process, which says on ``stderr`` what comes after the line that it serves.
      url: where it is.
      said: the lines before that one.
    """

    process: subprocess.Popen
    url: str
    said: list[str]


@contextlib.contextmanager
def command(*arguments, **environment):
    """``fqjax serve`` in a process of its own, once it serves."""
    started = [sys.executable, "-m", "fqjax.cli", "serve", *map(str, arguments), "--port", "0"]
    with subprocess.Popen(started, stderr=subprocess.PIPE, text=True, env=os.environ | environment) as process:
        try:
            said = []
            for line in process.stderr:
                said.append(line)
                if line.startswith("serving "):
                    break
            assert said and said[-1].startswith("serving "), said
            yield Command(process, said.pop().split()[3], said)
        finally:
            process.kill()
