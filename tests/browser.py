"""Headless Chromium over the DevTools protocol: looks at local pages at a phone's width."""

import json
import os
import shutil
import subprocess
import tempfile
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

WIDTH = 360
FLAGS = """--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-extensions
--disable-background-networking --disable-component-update --disable-sync --no-first-run
--no-proxy-server --hide-scrollbars --remote-debugging-port=0""".split()
BLOCK_NETWORK = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"

# Runs in the loaded page: waits for MathJax and the images, then tells what the reader would see.
INSPECT = r"""
(async () => {
  const patience = new Promise((stop) => setTimeout(stop, 30000));
  await Promise.race([window.MathJax?.startup?.promise, patience]);
  await document.fonts.ready;
  const all = (selector) => [...document.querySelectorAll(selector)];
  const start = (text) => text.trim().slice(0, 60);
  const base = (path) => path.trim().split("/").pop();
  const images = [...document.images];
  images.forEach((image) => { image.loading = "eager"; });
  const decoded = (image) => image.decode().then(() => true, () => false);
  const loaded = await Promise.all(images.map(decoded));

  const raw = [], skip = "script, style, code, pre, textarea, noscript, mjx-container";
  const markup = /\$\$|\\[(\[]|\$[^$]*\\\w|\$[^$\s]+\$|^:::|\{[a-z:]+\}`/;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());)
    if (markup.test(node.data) && !node.parentElement.closest(skip))
      raw.push(start(node.data));

  const width = document.documentElement.clientWidth;
  const contained = (node) => node && (contained(node.parentElement)
    || /auto|scroll|hidden|clip/.test(getComputedStyle(node).overflowX));
  const wide = all("body *").filter((node) =>
    node.getBoundingClientRect().right > width + 1 && !contained(node.parentElement));
  return {
    unrendered: all(".math").filter((node) => !node.querySelector("mjx-container"))
      .map((node) => start(node.textContent)),
    errors: all("mjx-merror, [data-mjx-error]")
      .map((node) => node.getAttribute("data-mjx-error") || start(node.textContent)),
    raw,
    broken: images.filter((_, i) => !loaded[i]).map(({src}) => base(src)),
    unlabelled: images.filter(({alt, src}) => ["", base(src)].includes(base(alt)))
      .map(({src}) => base(src)),
    width: document.documentElement.scrollWidth,
    wide: wide.filter((node) => !wide.includes(node.firstElementChild)).slice(0, 3)
      .map((node) => `<${node.localName} class="${node.className}"> ${start(node.textContent)}`),
    links: all("a[href]").map((link) => link.getAttribute("href")),
  };
})()
"""


def executable() -> str | None:
    """Path of a Chromium, or None."""
    names = ["chromium", "chromium-browser", "google-chrome", "chrome"]
    return next(filter(None, map(shutil.which, names)), None)


class Site:
    """Serves a folder on a free port of 127.0.0.1."""

    def __init__(self, folder: Path):
        class Quiet(SimpleHTTPRequestHandler):
            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class Browser:
    """One Chromium with one tab; `look` loads a page and returns a list of complaints."""

    def __init__(self):
        from websocket import create_connection

        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        profile = f"--user-data-dir={self.profile.name}"
        self.process = subprocess.Popen(
            [executable(), *FLAGS, BLOCK_NETWORK, profile, "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "TMPDIR": self.profile.name},
        )
        self.socket = create_connection(self._endpoint(), timeout=60, suppress_origin=True)
        self.count, self.events, self.session = 0, [], None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ["Page", "Runtime", "Network"]:
            self.send(f"{domain}.enable")
        metrics = dict(width=WIDTH, height=740, deviceScaleFactor=1, mobile=True)
        self.send("Emulation.setDeviceMetricsOverride", **metrics)

    def _endpoint(self) -> str:
        file = Path(self.profile.name, "DevToolsActivePort")
        for _ in range(600):
            lines = file.read_text().splitlines() if file.exists() else []
            if len(lines) == 2:
                return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        self.process.kill()
        raise RuntimeError("Chromium did not open its DevTools port")

    def receive(self) -> dict:
        message = json.loads(self.socket.recv())
        if "method" in message:
            self.events.append(message)
        return message

    def send(self, method: str, **params) -> dict:
        self.count += 1
        message = dict(id=self.count, method=method, params=params)
        if self.session:
            message["sessionId"] = self.session
        self.socket.send(json.dumps(message))
        while (reply := self.receive()).get("id") != self.count:
            pass
        if "error" in reply:
            raise RuntimeError(f"{method}: {reply['error']['message']}")
        return reply["result"]

    def look(self, url: str, site: str) -> tuple[list[str], list[str]]:
        """Loads a page of `site`; returns (complaints, links)."""
        self.events = []
        self.send("Page.navigate", url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.receive()
        reply = self.send(
            "Runtime.evaluate", expression=INSPECT, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in reply:
            return [f"the page could not be inspected: {reply['exceptionDetails']}"], []
        found = reply["result"]["value"]
        return [*page_complaints(found), *event_complaints(self.events, site)], found["links"]

    def close(self):
        self.socket.close()
        self.process.terminate()
        self.process.wait(timeout=20)
        self.profile.cleanup()


def page_complaints(found: dict) -> list[str]:
    """What the page itself shows."""
    complaints = [f"mathematics not rendered: {text!r}" for text in found["unrendered"]]
    complaints += [f"MathJax error: {text!r}" for text in found["errors"]]
    complaints += [f"raw markup in the text: {text!r}" for text in found["raw"]]
    complaints += [f"image does not load: {name}" for name in found["broken"]]
    complaints += [f"image without alt text: {name}" for name in found["unlabelled"]]
    if found["width"] > WIDTH:
        complaints.append(
            f"wider than a {WIDTH} px screen: {found['width']} px; widest parts: {found['wide']}"
        )
    return complaints


def event_complaints(events: list[dict], site: str) -> list[str]:
    """What went wrong while the page loaded: scripts and requests."""
    complaints, urls = [], {}
    for event in events:
        method, p = event["method"], event["params"]
        if method == "Runtime.exceptionThrown":
            details = p["exceptionDetails"]
            text = details.get("exception", {}).get("description") or details["text"]
            complaints.append(f"script error: {text.splitlines()[0]}")
        elif method == "Runtime.consoleAPICalled" and p["type"] == "error":
            text = " ".join(str(a.get("value", a.get("description"))) for a in p["args"])
            complaints.append(f"script error on the console: {text}")
        elif method == "Network.requestWillBeSent":
            url = urls[p["requestId"]] = p["request"]["url"]
            if url.startswith(("http", "ws")) and not url.startswith(site):
                complaints.append(f"remote request while loading: {url}")
        elif method == "Network.webSocketCreated":
            complaints.append(f"remote request while loading: {p['url']}")
        elif method == "Network.responseReceived" and p["response"]["status"] >= 400:
            response = p["response"]
            complaints.append(f"local request failed ({response['status']}): {response['url']}")
        elif method == "Network.loadingFailed" and not p.get("canceled"):
            url = urls.get(p["requestId"], "")
            if url.startswith(site):
                complaints.append(f"local request failed ({p['errorText']}): {url}")
    return [c for c in complaints if not c.endswith("/favicon.ico")]
