"""A headless Chromium, spoken to over its pipe in the DevTools protocol; no driver is needed."""

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
from pathlib import Path

BINARY = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


class Page:
    """A tab. `events` holds what the browser said without being asked."""

    def __init__(self, write, read):
        self._write, self._read, self._rest = write, read, b""
        self._numbers, self.events, self._session = itertools.count(1), [], {}

    def _message(self, deadline):
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], max(deadline - time.monotonic(), 0))
            if not ready:
                raise TimeoutError("Chromium did not answer")
            self._rest += os.read(self._read, 1 << 20)
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def ask(self, method, timeout=60, **params):
        number = next(self._numbers)
        request = {"id": number, "method": method, "params": params, **self._session}
        os.write(self._write, json.dumps(request).encode() + b"\0")
        deadline = time.monotonic() + timeout
        while True:
            message = self._message(deadline)
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def attach(self):
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        found = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": found["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def show(self, path, width, dark=False, javascript=True):
        """Loads a file in a window of that width, and waits until it is there."""
        self.events.clear()
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 700}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Emulation.setScriptExecutionDisabled", value=not javascript)
        self.ask("Page.navigate", url=Path(path).resolve().as_uri())
        deadline = time.monotonic() + 60
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._message(deadline))

    def evaluate(self, code):
        found = self.ask("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def errors(self):
        """What went wrong since the page was loaded, and every request but that for itself."""
        wrong = []
        for event in self.events:
            method, params = event["method"], event["params"]
            if method == "Runtime.exceptionThrown" or (
                method == "Log.entryAdded" and params["entry"]["level"] == "error"
            ):
                wrong.append(params)
            if method == "Network.requestWillBeSent":
                url = params["request"]["url"]
                if params["type"] != "Document" and not url.startswith("data:"):
                    wrong.append(url)
        return wrong

    def screenshot(self, path):
        """Writes the whole page as a PNG."""
        found = self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        Path(path).write_bytes(base64.b64decode(found["data"]))


@contextlib.contextmanager
def opened():
    """Yields a `Page` of a browser of its own."""
    to_browser, write = os.pipe()
    read, from_browser = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = (
            f"exec 3<&{to_browser} 4>&{from_browser}; exec {BINARY} --headless=new --no-sandbox "
            f"--disable-gpu --disable-dev-shm-usage --no-first-run --hide-scrollbars "
            f"--remote-debugging-pipe --user-data-dir={profile} about:blank"
        )
        quiet = subprocess.DEVNULL
        process = subprocess.Popen(
            ["bash", "-c", command], pass_fds=(to_browser, from_browser), stdout=quiet, stderr=quiet
        )
        os.close(to_browser)
        os.close(from_browser)
        try:
            page = Page(write, read)
            page.attach()
            yield page
        finally:
            with contextlib.suppress(OSError):
                os.write(write, b'{"id":0,"method":"Browser.close"}\0')
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            os.close(write)
            os.close(read)
