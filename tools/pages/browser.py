"""A headless Chromium, spoken to by its DevTools protocol."""

import base64
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import websocket


def find(given):
    """The browser's binary."""
    path = given or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        sys.exit("there is no chromium: install it, or name one by --browser")
    return path


class Browser:
    """A headless browser, spoken to over its DevTools protocol."""

    def __init__(self, path):
        self.folder = tempfile.mkdtemp()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-extensions"]
        address = ["--remote-debugging-port=0", "--remote-allow-origins=*", f"--user-data-dir={self.folder}", "about:blank"]
        self.process = subprocess.Popen([path, *flags, *address], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port_file = Path(self.folder, "DevToolsActivePort")
        for _ in range(300):
            if port_file.exists() and len(port_file.read_text().split()) == 2:
                break
            if self.process.poll() is not None:
                sys.exit(f"{path} does not start: exit status {self.process.returncode}")
            time.sleep(0.1)
        else:
            sys.exit(f"{path} does not answer")
        self.port = int(port_file.read_text().split()[0])
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/json") as answer:
            target = next(target for target in json.load(answer) if target["type"] == "page")
        self.socket = websocket.create_connection(target["webSocketDebuggerUrl"], timeout=600)
        self.count = 0
        self.events = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        self.count += 1
        own = self.count
        self.socket.send(json.dumps({"id": own, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == own:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]
            self.events.append(message)

    def run(self, script):
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"].get("exception", {}).get("description", "an exception"))
        return result["result"].get("value")

    def open(self, url, scripts=True):
        self.events = []
        self.call("Page.navigate", url=url)
        end = time.monotonic() + 60
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            if time.monotonic() > end:
                raise RuntimeError("the page does not load within a minute")
            self.run("1")
            time.sleep(0.02)
        # What the script does after loading. (Without scripts there are no timers either.)
        if scripts:
            self.run("new Promise(go => requestAnimationFrame(() => setTimeout(go, 50)))")

    def complaints(self, url):
        """What the page said that it should not have, and what it asked the network for."""
        for event in self.events:
            kind, params = event.get("method"), event.get("params", {})
            if kind == "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                yield "exception: " + details.get("exception", {}).get("description", details["text"]).split("\n")[0]
            elif kind == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                yield "console: " + " ".join(str(part.get("value", part.get("description", ""))) for part in params["args"])[:300]
            elif kind == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                yield "log: " + params["entry"]["text"][:300]
            elif kind == "Network.requestWillBeSent":
                asked = params["request"]["url"]
                if asked.split("?")[0] != url.split("?")[0] and not asked.startswith(("data:", "blob:")):
                    yield f"a request: {asked[:200]}"

    def shot(self, path, full=True):
        picture = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=full)
        path.write_bytes(base64.b64decode(picture["data"]))

    def close(self):
        try:
            self.call("Browser.close")
        except Exception:
            pass
        self.socket.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def size(browser, width, height):
    # Scrolling that takes its time would go on while the next thing is tried.
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-reduced-motion", "value": "reduce"}])
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
