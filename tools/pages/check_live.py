"""Watches a training run by its live view in a browser, and says what is wrong.

    check_live.py --senmon BINARY --data FOLDER...            exits with 1 and a line for each problem, or with 0
    check_live.py --shots DIR ...                             writes screenshots, too

A run of `nano` is begun with --dashboard. A page that was opened before the first step must follow it; one that goes away and
comes back must show the same run from its start; when the run is interrupted the page must say so; and when it is resumed at the same address,
the page must find it by itself. The script of the page must not complain. Needs chromium (or --browser PATH).
"""

import argparse
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from browser import Browser, find, size

# What a reader sees: the state's sentence, whether the page is connected, and the last point of the curve of the loss.
SEEN = """(() => ({
  state: document.querySelector("#state")?.innerText ?? "",
  live: document.querySelector(".live")?.textContent ?? "",
  step: senmon.data("loss").series[0].x.at(-1) ?? 0,
  first: senmon.data("loss").series[0].x[0] ?? 0,
  alarms: document.querySelector("#alarm")?.innerText ?? "",
  wide: document.documentElement.scrollWidth > innerWidth,
}))()"""


class Run:
    def __init__(self, args, out):
        self.args, self.out = args, out
        self.process, self.url = None, None

    def start(self, *flags, port="0"):
        command = [args.senmon, "train", "--out", self.out, "--dashboard", port, "--threads", "1", *flags]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        for line in self.process.stderr:
            if found := re.search(r"live view: (http://\S+)", line):
                self.url = found[1]
                return
        sys.exit(f"the run ended before it served its view: exit status {self.process.wait()}")

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        self.process.stderr.read()
        return self.process.wait()


def until(browser, what, seconds=180):
    """Waits for what a reader should see; gives the last that was seen, and whether it came."""
    end = time.monotonic() + seconds
    while True:
        # A page that loads again has no script for a moment.
        try:
            seen = browser.run(SEEN)
        except RuntimeError:
            seen = None
        if seen and what(seen):
            return seen, True
        if time.monotonic() > end:
            return seen, False
        time.sleep(0.2)


def check(args, browser):
    with tempfile.TemporaryDirectory() as folder:
        run = Run(args, Path(folder, "run"))
        data = [flag for path in args.data for flag in ("--data", path)]
        run.start(*data, "--preset", "nano", "--steps", "100000", "--set", "train.eval_every=10", "--set", "balance.aux=0")
        try:
            yield from watch(args, browser, run)
        finally:
            run.process.kill()
            run.process.wait()


def watch(args, browser, run):
    size(browser, 1280, 900)
    browser.open(run.url)
    for step in (1, 5, 12):
        seen, came = until(browser, lambda seen: seen["step"] >= step)
        if not came:
            yield f"the page does not come to step {step}: {seen}"
            return
    if seen["live"] != "live":
        yield f"the page says {seen['live']!r} of its connection"
    for width in (1280, 390):
        for theme in ("light", "dark"):
            size(browser, width, 900)
            browser.open(f"{run.url}/?theme={theme}")
            # What the page says at first was served with it; what comes after that are events.
            first, _ = until(browser, lambda now: now["step"] > seen["step"])
            back, came = until(browser, lambda now: first and now["step"] > first["step"] + 1)
            if not came:
                yield f"after it came back the page does not go on: {back}"
            if back and back["first"] > 1.5:
                yield f"after it came back the page begins at step {back['first']}"
            if back and back["wide"]:
                yield f"the page is wider than a window of {width}"
            if args.shots:
                time.sleep(0.3)
                browser.shot(args.shots / f"live-{width}-{theme}.png")
    yield from (complaint for complaint in browser.complaints(run.url + "/") if "/events?" not in complaint)
    browser.events = []
    status = run.stop()
    if status != 130:
        yield f"the interrupted run ended with {status}"
    seen, came = until(browser, lambda seen: "interrupted" in seen["state"].lower(), 10)
    if not came:
        yield f"the page does not say that the run was interrupted: {seen['state']}"
    _, came = until(browser, lambda seen: seen["live"] == "not connected", 30)
    if not came:
        yield "the page does not say that nobody is there any more"
    if args.shots:
        browser.shot(args.shots / "live-interrupted.png")
    port = run.url.rsplit(":", 1)[1]
    run.start("--resume", port=port)
    back, came = until(browser, lambda now: now["live"] == "live" and now["step"] > seen["step"] + 1)
    if not came:
        yield f"the page does not find the resumed run: {back}"
    elif back["first"] > 1.5:
        yield f"of the resumed run the page shows only what came after step {back['first']}"
    for complaint in browser.complaints(run.url + "/"):
        # Chromium itself tells of an address where nobody answers.
        if "ERR_CONNECTION" not in complaint and "ERR_INCOMPLETE" not in complaint and "/events?" not in complaint:
            yield complaint


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--senmon", default=Path(__file__).parents[2] / "target/release/senmon", type=Path)
    parser.add_argument("--data", nargs="+", required=True, metavar="PATH")
    parser.add_argument("--browser", default=None, help="the browser's binary; by default chromium or google-chrome")
    parser.add_argument("--shots", type=Path, metavar="DIR", help="writes screenshots there")
    args = parser.parse_args()
    if args.shots:
        args.shots.mkdir(parents=True, exist_ok=True)
    browser = Browser(find(args.browser))
    try:
        problems = list(check(args, browser))
    finally:
        browser.close()
    print("\n".join(problems) if problems else "nothing wrong")
    sys.exit(1 if problems else 0)
