"""A page in headless Chromium, spoken to over its pipe: what it logs, what it asks the network for, how wide it is."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WAIT = 60.0  # seconds for an answer on a busy machine


def program() -> str | None:
    """The path of Chromium, if there is one."""
    return next((found for name in PROGRAMS if (found := shutil.which(name))), None)


class Browser:
    """One tab of Chromium without a network.

    ``logged`` are console messages, exceptions and the browser's own reports; ``requested`` all addresses asked for.
    """

    def __init__(self, home: Path):
        reads, self._write = os.pipe()
        self._read, writes = os.pipe()
        command = [program() or "", "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--remote-debugging-pipe", f"--user-data-dir={home}"]

        def place() -> None:  # Chromium reads descriptor 3 and writes descriptor 4
            os.dup2(reads, 30)
            os.dup2(writes, 31)
            os.dup2(30, 3)
            os.dup2(31, 4)

        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(
            [*command, "about:blank"], preexec_fn=place, close_fds=False, stdout=quiet, stderr=quiet
        )
        os.close(reads)
        os.close(writes)
        os.set_blocking(self._read, False)
        self._number, self._session, self._buffer = 0, "", b""
        self._events: list[dict[str, Any]] = []
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def open(self, page: Path, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Load a file at that size of the window, in light or dark colors."""
        self._events.clear()
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", features=[scheme])
        self._ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        self._ask("Page.navigate", url=page.resolve().as_uri())
        self._until(lambda event: event["method"] == "Page.loadEventFired")

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        found = self._ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(str(found["exceptionDetails"]))
        return found["result"].get("value")

    def picture(self, path: Path, whole: bool = False) -> None:
        """A PNG of the window, or of the whole page."""
        data = self._ask("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    @property
    def logged(self) -> list[str]:
        known = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self._events if event["method"] in known]

    @property
    def requested(self) -> list[str]:
        sent = (event for event in self._events if event["method"] == "Network.requestWillBeSent")
        return [event["params"]["request"]["url"] for event in sent]

    def _ask(self, method: str, **params: Any) -> Mapping[str, Any]:
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        return self._until(lambda event: event.get("id") == number).get("result", {})

    def _until(self, is_it: Any) -> dict[str, Any]:
        """The first message that is the one waited for; events before it are kept."""
        end = time.monotonic() + WAIT
        while time.monotonic() < end:
            while b"\0" not in self._buffer and time.monotonic() < end:
                try:
                    self._buffer += os.read(self._read, 1 << 20)
                except BlockingIOError:
                    time.sleep(0.01)
            text, _, self._buffer = self._buffer.partition(b"\0")
            message = json.loads(text or b"{}")
            if "error" in message and "id" in message:
                raise RuntimeError(f"Chromium: {message['error']}")
            if "method" in message:
                self._events.append(message)
            if message and is_it({"method": "", **message}):
                return message
        raise TimeoutError("Chromium does not answer")
