"""Opens pages that senmon-page wrote in a browser, uses everything on them, and says what is wrong.

    pip install websocket-client         the one package it needs
    check_page.py PAGE.html...           exits with 1 and a line for each problem, or with 0
    check_page.py --shots DIR PAGE.html  writes screenshots, too: width and theme are in their names

Each page is opened at three widths, in both themes, once on paper (PDF) and once without scripts. Every button is pressed, every
choice of a list chosen, every heading of a table clicked (of wide tables the first six and the last), everything that takes the focus is given it, and arrow keys are pressed
there. Problems are errors of the script and of the policy (CSP), requests of any kind, what is wider than the window, labels that
overlap within a chart, controls without a name or too small, links to nowhere, identifiers that are there twice, and blocks
that look different after an update with their own data. Needs chromium (or --browser PATH).
"""

import argparse
import base64
import shutil
import sys
import tempfile
from pathlib import Path

import websocket

from browser import Browser, find, size

WIDTHS = (1280, 768, 360)
THEMES = ("light", "dark")

# What is looked for in the state that the page is in. Gives a list of sentences.
INSPECT = r"""
(() => {
  const problems = [], name = node => {
    const block = node.closest(".block");
    const text = (node.textContent || node.getAttribute("aria-label") || "").trim().slice(0, 30);
    return `<${node.tagName.toLowerCase()}> "${text}"${block ? " in block " + block.id : ""}`;
  };
  const seen = node => node.checkVisibility({ visibilityProperty: true }) && node.getClientRects().length > 0;
  const root = document.documentElement;
  if (root.scrollWidth > innerWidth) {
    const wide = [...document.body.querySelectorAll("*")].filter(node => seen(node)
      && node.getBoundingClientRect().right > innerWidth + 0.5
      && !node.parentElement.closest(".scroll, .tokens, nav, .hush"));
    problems.push(`the page is ${root.scrollWidth} wide in a window of ${innerWidth}: ${wide.slice(0, 2).map(name).join(", ")}`);
  }
  for (const svg of document.querySelectorAll(".plot svg")) {
    if (!seen(svg)) continue;
    const texts = [...svg.querySelectorAll("text")].map(node => ({ node, box: node.getBoundingClientRect() }));
    const frame = svg.closest(".scroll") ? null : svg.closest(".plot").getBoundingClientRect();
    texts.forEach(({ node, box }, k) => {
      if (frame && (box.left < frame.left - 2 || box.right > frame.right + 2)) problems.push(`cut off: ${name(node)}`);
      for (const other of texts.slice(k + 1)) {
        const across = Math.min(box.right, other.box.right) - Math.max(box.left, other.box.left);
        const down = Math.min(box.bottom, other.box.bottom) - Math.max(box.top, other.box.top);
        if (across > 1 && down > 2) problems.push(`overlap: ${name(node)} and ${name(other.node)}`);
      }
    });
  }
  for (const node of document.querySelectorAll("button, select, summary, a, [tabindex]")) {
    if (!seen(node)) continue;
    const label = node.getAttribute("aria-label") || node.textContent || node.labels?.[0]?.textContent;
    if (!label?.trim()) problems.push(`no name: ${node.outerHTML.slice(0, 80)}`);
    const box = node.getBoundingClientRect();
    if (node.matches("button, select") && Math.min(box.width, box.height) < 20) problems.push(`too small: ${name(node)}`);
  }
  for (const node of document.querySelectorAll(".plot svg[role=img], .grid")) {
    if (!node.getAttribute("aria-label")) problems.push(`no description: ${name(node)}`);
  }
  for (const table of document.querySelectorAll("table")) {
    if (!table.caption?.textContent) problems.push(`no caption: ${name(table)}`);
    if (table.querySelector("th:not([scope])")) problems.push(`a heading without scope: ${name(table)}`);
  }
  for (const link of document.querySelectorAll("a[href^='#']")) {
    if (!document.getElementById(link.hash.slice(1))) problems.push(`a link to nowhere: ${link.hash}`);
  }
  const ids = [...document.querySelectorAll("[id]")].map(node => node.id);
  ids.filter((id, k) => ids.indexOf(id) !== k).forEach(id => problems.push(`the identifier ${id} is there twice`));
  for (const part of document.querySelectorAll(".block .static")) {
    if (seen(part)) problems.push(`not drawn: block ${part.closest(".block").id}`);
  }
  for (const plot of document.querySelectorAll(".plot")) {
    if (seen(plot) && !plot.firstElementChild) problems.push(`an empty chart: block ${plot.closest(".block").id}`);
  }
  return [...new Set(problems)];
})()
"""

# Presses everything, and looks after each press at what a press may break. Gives what was done and what was wrong.
USE = r"""
(async inspect => {
  const problems = [], known = new Set(inspect()), done = { presses: 0, stops: 0, keys: 0, updates: 0, points: 0 };
  // After the next frame; a busy machine may leave out frames.
  const frame = () => new Promise(go => { requestAnimationFrame(() => setTimeout(go, 0)); setTimeout(go, 500); });
  // Each problem once, with the press that it followed.
  const look = what => {
    for (const problem of inspect()) if (!known.has(problem)) { known.add(problem); problems.push(`${problem} (${what})`); }
  };
  const seen = node => node.isConnected && node.checkVisibility() && node.getClientRects().length > 0;
  const label = node => (node.getAttribute("aria-label") || node.textContent).trim().slice(0, 40);
  const key = node => (node.closest(".block")?.id ?? "page") + "/" + label(node);
  for (const summary of document.querySelectorAll("summary")) { summary.click(); done.presses++; }
  await frame();
  // Presses make new buttons: until there is none that was not pressed.
  const pressed = new Set(), tables = new Set();
  for (let round = 0; round < 3000; round++) {
    const next = [...document.querySelectorAll("button:not(:disabled)")].find(node =>
      seen(node) && !node.matches("th:nth-child(n + 7):not(:last-child) button") && !node.matches(".theme") && !label(node).startsWith("Show as chart") && !pressed.has(key(node)));
    if (!next) break;
    // A table looks the same whichever of its many columns it is sorted by: it is inspected once.
    const what = key(next), sorted = next.matches("th button") && next.closest(".block").id;
    const saves = what.includes("Save as") || tables.has(sorted);
    if (sorted) tables.add(sorted);
    pressed.add(what);
    next.focus();
    next.click();
    done.presses++;
    await frame();
    if (!saves) look("after " + what);
    if (next.matches(".key")) { next.isConnected && next.click(); await frame(); }
  }
  for (const select of document.querySelectorAll("select")) {
    if (!seen(select)) continue;
    for (const place of [...select.options].map((_, k) => k).filter(k => k < 3 || k === select.options.length - 1)) {
      select.selectedIndex = place;
      select.dispatchEvent(new Event("change"));
      done.presses++;
      await frame();
      look(`layer ${place} of ${select.closest(".block")?.id}`);
    }
  }
  // Back to charts.
  for (const button of document.querySelectorAll("button")) if (seen(button) && label(button).startsWith("Show as chart")) button.click();
  await frame();
  const stops = [...document.querySelectorAll("a[href], button:not(:disabled), select, summary, [tabindex]")].filter(seen);
  for (const node of stops) {
    if (!node.isConnected) continue;
    node.focus();
    done.stops++;
    if (document.activeElement !== node) problems.push(`takes no focus: ${label(node)}`);
    if (!node.matches(".grid, .tokens, svg[tabindex]")) continue;
    for (const key of ["Home", "ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp", "PageDown", "End", "ArrowRight"]) {
      node.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
      done.keys++;
    }
    await frame();
    const tip = document.querySelector(".tip"), box = tip.getBoundingClientRect();
    if (tip.hidden) problems.push(`no read-out: ${label(node)}`);
    else if (box.left < 0 || box.right > innerWidth || box.top < 0 || box.bottom > innerHeight) problems.push(`a read-out outside of the window: ${label(node)}`);
    node.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape", bubbles: true }));
    if (!tip.hidden) problems.push(`Escape leaves the read-out: ${label(node)}`);
    node.blur();
    // Under the pointer: the middle.
    const target = node.querySelector(":scope > span") ?? node;
    target.scrollIntoView({ block: "center" });
    await frame();
    const area = (node.querySelector("canvas, span") ?? node).getBoundingClientRect();
    const at = { clientX: area.left + Math.min(area.width, 300) / 2, clientY: area.top + area.height / 2, bubbles: true };
    target.dispatchEvent(new PointerEvent("pointermove", at));
    done.points++;
    if (tip.hidden && node.matches(".grid, .tokens, svg")) problems.push(`no read-out under the pointer: ${label(node)}`);
    node.dispatchEvent(new PointerEvent("pointerleave", { pointerType: "mouse" }));
  }
  // An update with a block's own data changes nothing that is seen. Words and figures are Rust's before, the script's after.
  for (const host of document.querySelectorAll(".block")) {
    if (!host.isConnected || host.parentElement.closest(".block")) continue;
    const text = () => host.innerText.replace(/\s+/g, " ").trim(), before = text();
    senmon.update(host.id, JSON.parse(JSON.stringify(senmon.data(host.id))));
    await frame();
    done.updates++;
    if (text() !== before) problems.push(`block ${host.id} differs after an update with its own data: "${before.slice(0, 60)}" and "${text().slice(0, 60)}"`);
  }
  // The focus stays where it is, and so does what is read under the pointer.
  for (const host of document.querySelectorAll(".block")) {
    const stop = [...host.querySelectorAll("button, select, [tabindex]")].filter(node => seen(node) && !node.disabled)[1];
    if (!stop || host.matches("[data-kind=selector], [data-kind=details]")) continue;
    const what = label(stop);
    stop.focus();
    senmon.update(host.id, {});
    await frame();
    if (!host.contains(document.activeElement) || label(document.activeElement) !== what) problems.push(`block ${host.id} loses the focus in an update`);
  }
  document.activeElement.blur();
  const grid = [...document.querySelectorAll(".grid")].find(seen);
  if (grid) {
    grid.scrollIntoView({ block: "center" });
    await frame();
    const box = grid.querySelector("canvas").getBoundingClientRect(), host = grid.closest(".block");
    grid.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + 2, clientY: box.top + 2 }));
    const values = [...senmon.data(host.id).values], before = document.querySelector(".tip").innerText;
    senmon.update(host.id, { values: values.map((v, k) => (k ? v : 123456)) });
    await frame();
    const after = document.querySelector(".tip");
    if (after.hidden || after.innerText === before) problems.push(`the read-out of ${host.id} does not follow an update`);
    senmon.update(host.id, { values });
    host.querySelector(".grid").dispatchEvent(new PointerEvent("pointerleave", { pointerType: "mouse" }));
  }
  const refuses = (id, data) => { try { senmon.update(id, data); return false; } catch { return true; } };
  const some = document.querySelector(".block")?.id;
  if (!refuses("senmon-none", {}) || (some && !refuses(some, { kind: "none" }))) problems.push("senmon.update takes what it should refuse");
  look("after updates");
  return { problems: [...new Set(problems)], done };
})
"""

# The tables that Rust wrote, and those that the script made of the same data: numbers must be written alike.
STATIC_TABLES = r"""
Object.fromEntries([...document.querySelectorAll("[data-kind=table]")].map(host => [host.id,
  [...host.querySelectorAll("tbody tr")].map(row => [...row.cells].map(cell => cell.textContent).join("|")).join("\n")]))
"""


def shots(browser, url, folder, name):
    """The whole page for each width and theme, in pieces that can be looked at."""
    for width in (1280, 390):
        for theme in THEMES:
            size(browser, width, 900)
            browser.open(f"{url}?theme={theme}")
            browser.run("document.querySelectorAll('details').forEach(node => { node.open = true; })")
            browser.run("new Promise(go => setTimeout(go, 200))")
            height = browser.run("document.documentElement.scrollHeight")
            piece = 1600
            for part, top in enumerate(range(0, height, piece)):
                clip = {"x": 0, "y": top, "width": width, "height": min(piece, height - top), "scale": 1}
                picture = browser.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
                (folder / f"{name}-{width}-{theme}-{part}.png").write_bytes(base64.b64decode(picture["data"]))


def check(browser, url, downloads):
    """Gives pairs: where something is wrong, and what."""
    done = {}
    # Without scripts: sentences and tables must be there.
    size(browser, WIDTHS[0], 900)
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    browser.open(url, scripts=False)
    static = browser.run(STATIC_TABLES)
    empty = browser.run("[...document.querySelectorAll('.block')].filter(b => !b.closest('details') && !b.innerText.trim()).map(b => b.id)")
    for block in empty:
        yield "without scripts", f"block {block} shows nothing"
    if browser.run("document.documentElement.scrollWidth > innerWidth"):
        yield "without scripts", "the page is wider than the window"
    browser.call("Emulation.setScriptExecutionDisabled", value=False)

    browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads), eventsEnabled=True)
    for width in WIDTHS:
        for theme in THEMES:
            where = f"{width} px, {theme}"
            size(browser, width, 800)
            browser.open(f"{url}?theme={theme}")
            if browser.run("typeof senmon") != "object":
                yield where, "the script did not run to its end"
            if browser.run("document.documentElement.dataset.theme") != theme:
                yield where, "the theme is another one"
            if width == WIDTHS[0]:
                drawn = browser.run(STATIC_TABLES)
                for block, text in static.items():
                    if block in drawn and drawn[block] and drawn[block] != text:
                        pairs = zip(text.split("\n"), drawn[block].split("\n"))
                        first = next((pair for pair in pairs if pair[0] != pair[1]), "another number of rows")
                        yield where, f"table {block} is written differently by Rust and the script: {first}"
            for problem in browser.run(INSPECT):
                yield where, problem
            try:
                result = browser.run(f"({USE})(() => {INSPECT})")
            except (RuntimeError, websocket.WebSocketTimeoutException) as error:
                yield where, f"the page cannot be used to the end: {str(error).splitlines()[0]}"
                continue
            for problem in result["problems"]:
                yield where, problem
            for what, count in result["done"].items():
                done[what] = done.get(what, 0) + count
            # The button that changes the theme, which must be remembered.
            browser.run("document.querySelector('.theme').click()")
            other = browser.run("document.documentElement.dataset.theme")
            if other == theme:
                yield where, "the button does not change the theme"
            for problem in browser.run(INSPECT):
                yield where, f"{problem} (after a change of theme)"
            for problem in browser.complaints(url):
                yield where, problem
            if not any(event.get("method") == "Browser.downloadWillBegin" for event in browser.events):
                if browser.run("document.querySelector('.export') !== null"):
                    yield where, "nothing was saved"
            browser.open(url)
            if browser.run("document.documentElement.dataset.theme") != other:
                yield where, "the theme is not remembered"
    size(browser, WIDTHS[0], 800)
    browser.open(f"{url}?theme=dark")
    paper = browser.call("Page.printToPDF", printBackground=True)
    done["bytes on paper"] = len(base64.b64decode(paper["data"]))
    for problem in browser.complaints(url):
        yield "on paper", problem
    print("done:", ", ".join(f"{count} {what}" for what, count in done.items()), file=sys.stderr)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="+", type=Path, metavar="PAGE.html")
    parser.add_argument("--browser", default=None, help="the browser's binary; by default chromium or google-chrome")
    parser.add_argument("--shots", type=Path, metavar="DIR", help="writes screenshots there")
    args = parser.parse_args()
    missing = [page for page in args.pages if not page.is_file()]
    if missing:
        parser.error(f"no such file: {missing[0]}")
    browser = Browser(find(args.browser))
    downloads = Path(tempfile.mkdtemp())
    wrong = 0
    try:
        for page in args.pages:
            url = page.resolve().as_uri()
            if args.shots:
                args.shots.mkdir(parents=True, exist_ok=True)
                shots(browser, url, args.shots, page.stem)
            for where, problem in check(browser, url, downloads):
                wrong += 1
                print(f"{page}: {where}: {problem}")
    finally:
        browser.close()
        shutil.rmtree(downloads, ignore_errors=True)
    if wrong == 0:
        print(f"{', '.join(map(str, args.pages))}: nothing wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
