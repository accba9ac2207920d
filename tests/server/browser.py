"""Headless Chromium, driven by the DevTools protocol over a pair of pipes."""

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")


class Page:
    """A page that is open.

    Args:
      ask: writes bytes to the browser.
      answers: a file descriptor with what it says.
    """

    def __init__(self, ask, answers):
        self._ask, self._answers, self._held, self._numbers = ask, answers, b"", itertools.count(1)
        self._session, self.said = None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        """What a method of the protocol returns; events that come before are noted in ``said``."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        self._ask(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self.said.append(answer)

    def _next(self, seconds=60):
        until = time.monotonic() + seconds
        while b"\0" not in self._held:
            ready, _, _ = select.select([self._answers], [], [], until - time.monotonic())
            assert ready, "the browser is silent"
            read = os.read(self._answers, 1 << 16)
            assert read, "the browser has ended"
            self._held += read
        message, _, self._held = self._held.partition(b"\0")
        return json.loads(message)

    def value(self, expression):
        """The value of an expression of JavaScript."""
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression, seconds=60):
        """The value of an expression as soon as it is true."""
        until = time.monotonic() + seconds
        while not (found := self.value(expression)):
            assert time.monotonic() < until, (expression, self.value("document.body.innerText"))
            time.sleep(0.01)
        return found

    def open(self, url):
        """Goes to a page."""
        self.call("Page.navigate", url=url)
        self.wait(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    def type(self, text, key="Enter"):
        """Types a text where the cursor is, and then a key."""
        self.call("Input.insertText", text=text)
        code = {"Enter": 13, "Escape": 27}[key]
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def complaints(self):
        """Errors of the page's scripts, of its policy, and of what it wanted to load."""
        self.value("0")  # What was said before has come then.
        kinds = ("Runtime.exceptionThrown", "Log.entryAdded")
        return [event["params"] for event in self.said if event.get("method") in kinds]

    def picture(self, path, width, height, dark=False):
        """Writes a picture of it, as PNG."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        time.sleep(0.2)
        data = self.call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))


@contextlib.contextmanager
def browser():
    """A page of a browser that ends with the block; the test is skipped where there is no browser."""
    if CHROMIUM is None:
        pytest.skip("no Chromium")
    theirs, ask = os.pipe()
    answers, said = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [CHROMIUM, *OPTIONS, f"--user-data-dir={profile}", "--remote-debugging-pipe"]
        # The protocol's pipes are its file descriptors 3 and 4.
        script = f'exec "$@" 3<&{theirs} 4>&{said}'
        with subprocess.Popen(
            ["bash", "-c", script, "bash", *command], pass_fds=(theirs, said), stderr=subprocess.DEVNULL
        ) as process:
            os.close(theirs)
            os.close(said)
            try:
                page = Page(lambda message: os.write(ask, message), answers)
                yield page
                page._session = None
                page.call("Browser.close")
                process.wait(30)
            finally:
                process.kill()
                os.close(ask)
                os.close(answers)
