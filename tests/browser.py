"""A headless Chromium, driven through its own debugging pipe: no driver to install, no port, no network."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SECONDS = 120
"""How long an answer may take: the two cores of a test machine may be busy."""
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
KEYS = {
    "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Escape": 27, "Enter": 13, "Tab": 9,
    "End": 35, "Home": 36, "PageDown": 34, "PageUp": 33,
}  # fmt: skip


class Browser:
    """One browser process. It talks JSON between zero bytes on its file descriptors 3 and 4."""

    def __init__(self, process: subprocess.Popen[bytes], to: int, out: int) -> None:
        self.process, self._to, self._out = process, to, out
        self._held, self._number = b"", 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **params: object) -> dict[str, Any]:
        """Send one command and wait for its answer; events that come meanwhile are kept."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data) :]
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def wait(self, method: str, session: str) -> dict[str, Any]:
        """Take the next event of this name."""
        while True:
            for i, event in enumerate(self.events):
                if event.get("method") == method and event.get("sessionId") == session:
                    return self.events.pop(i)["params"]
            self.events.append(self._read())

    def _read(self) -> dict[str, Any]:
        end = time.monotonic() + SECONDS
        while b"\0" not in self._held:
            ready, _, _ = select.select([self._out], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"chromium said nothing for {SECONDS} seconds"
            more = os.read(self._out, 1 << 20)
            assert more, "chromium ended"
            self._held += more
        text, _, self._held = self._held.partition(b"\0")
        return json.loads(text)

    @contextmanager
    def page(
        self, path: Path, *, width: int = 1200, height: int = 900, scheme: str = "light"
    ) -> Iterator[Page]:
        """A fresh tab, without stored choices, with a file in it after its scripts ran."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.resize(width, height)
        page.emulate(scheme=scheme)
        page.call("Page.navigate", url=path.resolve().as_uri())
        self.wait("Page.loadEventFired", session)
        try:
            yield page
        finally:
            self.call("Target.disposeBrowserContext", browserContextId=context)


class Page:
    """One tab."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser, self.session = browser, session

    def call(self, method: str, **params: object) -> dict[str, Any]:
        return self.browser.call(method, self.session, **params)

    def run(self, script: str) -> Any:
        """Value of a JavaScript expression; a promise is waited for."""
        got = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in got, got["exceptionDetails"]
        return got["result"].get("value")

    def resize(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    def emulate(self, *, scheme: str = "light", media: str = "") -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)

    def press(self, key: str) -> None:
        """A real key, as the keyboard sends it."""
        for kind in ("rawKeyDown", "char", "keyUp") if key == "Enter" else ("rawKeyDown", "keyUp"):
            text = {"text": "\r"} if kind == "char" else {}
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=KEYS[key],
                **text,
            )

    def choose(self, select: str, value: str) -> None:
        """Choose in a select box, as its user does."""
        self.run(
            f"(() => {{ const box = document.getElementById({json.dumps(select)});"
            f" box.value = {json.dumps(value)}; box.dispatchEvent(new Event('change')); }})()"
        )

    def settle(self) -> None:
        """Wait until all pictures on view are decoded and drawn."""
        self.run(
            "Promise.all([...document.images].map((image) => image.decode().catch(() => null)))"
            ".then(() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done))))"
        )

    def screenshot(self, *, whole: bool = False) -> np.ndarray:
        """(H, W, 3) uint8 of the view, or of the whole page."""
        self.settle()
        clip = self._clip(whole)
        got = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **clip)
        return np.asarray(Image.open(BytesIO(b64decode(got["data"]))).convert("RGB"))

    def _clip(self, whole: bool) -> dict[str, object]:
        if not whole:
            return {}
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}

    def pdf(self) -> bytes:
        """The page as it prints."""
        return b64decode(self.call("Page.printToPDF", printBackground=False)["data"])

    def complaints(self) -> list[str]:
        """What the console and the browser's log hold: errors, warnings, refused loads."""
        self.run("0")
        found = []
        for event in self.browser.events:
            if event.get("sessionId") != self.session:
                continue
            kind, params = event["method"], event["params"]
            if kind == "Runtime.exceptionThrown":
                found.append(str(params["exceptionDetails"]))
            elif kind == "Runtime.consoleAPICalled":
                found.append(str(params["args"]))
            elif kind == "Log.entryAdded":
                found.append(f"{params['entry']['level']}: {params['entry']['text']}")
        return found

    def loaded(self) -> list[str]:
        """Schemes and files of all that was asked for over the page's life."""
        self.run("0")
        urls = [
            event["params"]["request"]["url"]
            for event in self.browser.events
            if event.get("sessionId") == self.session and event["method"] == "Network.requestWillBeSent"
        ]
        return [url if not url.startswith("data:") else "data:" for url in urls]


def find() -> str | None:
    """Path of an installed Chromium or Chrome."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """Start one; its profile lies in `folder`. Raises AssertionError if none is installed."""
    program = find()
    assert program, "no Chromium here: apt-get install chromium"
    to_read, to_write = os.pipe()
    out_read, out_write = os.pipe()
    inside = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (to_read, out_write)]

    def descriptors() -> None:
        os.dup2(inside[0], 3)
        os.dup2(inside[1], 4)

    command = [
        program,
        "--headless",
        "--remote-debugging-pipe",
        f"--user-data-dir={folder}",
        "--no-first-run",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--hide-scrollbars",
        "--force-color-profile=srgb",
        *(["--no-sandbox"] if os.geteuid() == 0 else []),
    ]
    process = subprocess.Popen(
        command, close_fds=False, preexec_fn=descriptors, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for fd in (to_read, out_write, *inside):
        os.close(fd)
    browser = Browser(process, to_write, out_read)
    try:
        yield browser
        browser.call("Browser.close")
    finally:
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(to_write)
        os.close(out_read)
