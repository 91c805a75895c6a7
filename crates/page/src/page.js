// Draws the blocks of a page from the JSON in it, and draws them again when they change.
//
//   senmon.update(id, data)   gives the block `id` new data, as Block::to_json of the crate writes them, and draws it again.
//                             What the reader has chosen (layer, sorting, hidden lines) stays. Throws where there is no such
//                             block or the data are of another kind.
//   senmon.data(id)           the data of the block `id`.
//
// A page with an address of server-sent events calls the first for each block that comes.
//
// No text becomes markup: elements are made one by one, and text is put into text nodes.
"use strict";
(() => {

const page = JSON.parse(document.getElementById("senmon-data").textContent);
const blocks = new Map(); // identifier -> {data, host, state}; the host is missing until the block is shown
const draws = new Map();  // plot -> {draw, width}, for a new width or theme

// ---- Elements and text

const UNSEEN = /[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\u061c\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]/g;

// Characters that cannot be seen but change what is seen, by their numbers.
function visible(text) {
  return String(text).replace(UNSEEN, c => `‹U+${c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}›`);
}

// An element with attributes, listeners (on...) and children; strings are text, null is nothing.
function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(2)) {
    if (child !== null && child !== undefined) node.append(child instanceof Node ? child : visible(child));
  }
  return node;
}
const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

const SPANS = { plain: null, strong: "strong", emphasis: "em", code: "code" };
const rich = spans => (spans ?? []).map(span => {
  const [kind, value] = Object.entries(span)[0];
  if (kind === "link") return el("a", { href: "#" + value.to }, value.text);
  return SPANS[kind] ? el(SPANS[kind], {}, value) : visible(value);
});
const paragraph = (spans, name) => (spans?.length ? el("p", { class: name }, rich(spans)) : null);

// ---- Numbers; the rules are those of format.rs

function grouped(text) {
  const [whole, rest] = text.split(".");
  const commas = whole.length < 5 ? whole : whole.replace(/\B(?=(\d{3})+$)/g, ",");
  return rest === undefined ? commas : commas + "." + rest;
}
const trimmed = text => (text.includes(".") ? text.replace(/\.?0+$/, "") : text);

function significant(size, digits) {
  if (size === 0) return "0";
  if (size >= 1e15 || size < 1e-4) return size.toExponential(Math.max(digits, 1) - 1).replace("e+", "e");
  if (Number.isInteger(size)) return grouped(size.toFixed(0));
  const exponent = Number(size.toExponential().split("e")[1]);
  return grouped(trimmed(size.toFixed(Math.min(20, Math.max(0, digits - 1 - exponent)))));
}
function compact(size, digits) {
  if (size >= 1e15) return significant(size, digits);
  for (const [unit, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
    if (size >= unit * 0.9995) {
      const scaled = size / unit, before = scaled >= 100 ? 3 : scaled >= 10 ? 2 : 1;
      return grouped(trimmed(scaled.toFixed(Math.max(0, digits - before)))) + letter;
    }
  }
  return significant(size, digits);
}
const AUTO = { style: "auto", digits: 4 };

function fmt(value, format = AUTO) {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value), digits = Math.min(format.digits, 20);
  const fixed = number => (number < 1e15 ? grouped(number.toFixed(digits)) : significant(number, 4));
  const styles = {
    fixed: () => fixed(size),
    percent: () => fixed(size * 100) + "%",
    times: () => fixed(size) + "×",
    compact: () => compact(size, digits),
    auto: () => significant(size, digits),
  };
  const body = styles[format.style]();
  const sign = !/[1-9]/.test(body) ? "" : value < 0 ? "−" : format.signed ? "+" : "";
  return sign + body + (format.unit ? "\u00a0" + format.unit : "");
}

// A number at an axis: as many digits as its neighbours need to differ, no unit and no plus sign.
function tickText(value, format, step) {
  const scale = format.style === "percent" ? 100 : 1;
  if (format.style === "compact" && Math.abs(value) >= 1000) return fmt(value, { style: "compact", digits: 4 });
  if (Math.abs(value) >= 1e6) return fmt(value, { style: "compact", digits: 4 });
  if (step * scale < 1e-4) return fmt(value, { ...AUTO, digits: 3 });
  const digits = Math.max(0, -Math.floor(Math.log10(step * scale) + 1e-9));
  return fmt(value, { style: { percent: "percent", times: "times" }[format.style] ?? "fixed", digits });
}

// ---- Scales

// Round numbers from `low` to `high`, about `count` of them.
function ticks(low, high, count) {
  const raw = (high - low) / Math.max(1, count), power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(k => k * power).find(k => k >= raw * 0.999);
  const list = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) list.push(k * step);
  return { list, step };
}
function logTicks(low, high, count) {
  const from = Math.floor(Math.log10(low)), to = Math.ceil(Math.log10(high)), list = [];
  const within = t => t >= low * 0.999 && t <= high * 1.001;
  for (const steps of [[1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 5], [1, 2, 5], [1, 3], [1]]) {
    list.length = 0;
    for (let k = from; k <= to; k++) list.push(...steps.map(s => s * 10 ** k).filter(within));
    if (list.length <= Math.max(3, count)) break;
  }
  const every = Math.ceil(list.length / Math.max(2, count));
  // Within less than a decade there may be no such number.
  return list.length > 1 ? { list: list.filter((_, k) => k % every === 0), step: 0 } : ticks(low, high, count);
}

// From values to pixels. An axis without an extent is given one.
function scale(low, high, from, to, log) {
  if (!(low < high)) { const pad = log ? 1 : Math.abs(low) * 0.1 || 1; low = log ? low / 2 : low - pad; high = log ? high * 2 : high + pad; }
  const map = log ? Math.log : v => v;
  const a = map(low), b = map(high);
  const at = value => (log && value <= 0 ? NaN : from + (map(value) - a) / (b - a) * (to - from));
  return Object.assign(at, { low, high, ticks: count => (log ? logTicks : ticks)(low, high, count) });
}

const pen = document.createElement("canvas").getContext("2d");
function textWidth(text, weight = 400) {
  pen.font = `${weight} 12px ${getComputedStyle(document.body).fontFamily}`;
  return pen.measureText(visible(text)).width;
}
function shortened(text, width) {
  if (textWidth(text) <= width) return text;
  let end = text.length;
  while (end > 1 && textWidth(text.slice(0, end) + "…") > width) end--;
  return text.slice(0, end).trimEnd() + "…";
}

const seriesColour = place => `--c: var(--s${place % 8 + 1})`;

// ---- The read-out: beside the pointer for those who point, spoken for those who walk with keys

const tip = el("div", { class: "tip", hidden: true });
const voice = el("div", { class: "hush", "aria-live": "polite" });
document.body.append(tip, voice);

// `lines` are [label, value, colour]; `boxOf` finds what they speak of, in the window.
let tipBox = null;
function showTip(boxOf, title, lines, aloud) {
  tip.replaceChildren(el("b", {}, title), ...lines.map(([label, value, colour]) =>
    el("div", {}, el("span", {}, colour ? el("i", { style: colour }) : null, label), el("span", {}, value))));
  tip.hidden = false;
  tipBox = boxOf;
  placeTip();
  if (aloud) voice.textContent = [title, ...lines.map(([label, value]) => `${label} ${value}`)].map(visible).join("; ");
}
function placeTip() {
  const box = tipBox(), { width, height } = tip.getBoundingClientRect(), room = document.documentElement.clientWidth;
  if (box.bottom < 0 || box.top > innerHeight) return hideTip();
  const top = box.top - height - 10 > 0 ? box.top - height - 10 : Math.min(box.bottom + 10, innerHeight - height - 4);
  tip.style.left = Math.max(6, Math.min(room - width - 6, (box.left + box.right) / 2 - width / 2)) + "px";
  tip.style.top = Math.max(4, Math.min(top, innerHeight - height - 4)) + "px";
}
function hideTip() { tip.hidden = true; }
// What is scrolled takes its read-out along.
addEventListener("scroll", () => { if (!tip.hidden) placeTip(); }, { passive: true, capture: true });
// What was sent away stays away when its chart is drawn again.
let read = null;
addEventListener("keydown", event => {
  if (event.key !== "Escape") return;
  if (read) read.on = false;
  hideTip();
});
addEventListener("pointerdown", event => { if (!event.target.closest?.("[tabindex]")) hideTip(); });

// One stop of the tab key for a whole chart, whose `count` items the arrow keys walk over. `find(event)` is the item under
// the pointer or null, `step(key, at)` the next one or null, `show(at, aloud)` marks it and shows its read-out. What is read
// stays so when the chart is drawn again.
function explore(node, state, { count, find, step, show, hide, start = 0 }) {
  const place = state.place ??= { at: start, on: false };
  place.at = Math.min(place.at, count - 1);
  const leave = () => { place.on = false; hide(); hideTip(); };
  const go = (next, aloud) => { if (next === null) return leave(); [place.at, place.on] = [next, true]; read = place; show(next, aloud); };
  node.addEventListener("pointermove", event => go(find(event), false));
  node.addEventListener("pointerdown", event => go(find(event), false));
  node.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") leave(); });
  node.addEventListener("focus", () => { if (!restoring && node.matches(":focus-visible")) go(place.at, true); });
  node.addEventListener("blur", () => { if (node.isConnected) leave(); });
  node.addEventListener("keydown", event => {
    const next = event.ctrlKey || event.metaKey || event.altKey ? null : step(event.key, place.at);
    if (next === null) return;
    event.preventDefault();
    go(next, true);
  });
  if (place.on && node.isConnected) show(place.at, false);
}
// The step over `count` items in one row, or in rows of `across`.
const stepper = (count, across = count) => (key, at) => {
  const moves = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: across < count ? across : 1, ArrowUp: across < count ? -across : -1,
    PageDown: Math.ceil(across / 10), PageUp: -Math.ceil(across / 10), Home: -at, End: count - 1 - at };
  if (!(key in moves)) return null;
  const next = at + moves[key];
  return next < 0 || next >= count ? at : next;
};

// ---- What charts share

// Redraws without taking the focus from the reader, or what was scrolled to; what was read aloud is not read again.
let restoring = false;
function inPlace(host, work) {
  const stops = () => [...host.querySelectorAll("button, select, summary, a, [tabindex]")];
  const scrolls = () => [...host.querySelectorAll(".scroll, .tall, .tokens")];
  const focus = stops().indexOf(document.activeElement), places = scrolls().map(s => [s.scrollLeft, s.scrollTop]);
  work();
  scrolls().forEach((s, k) => { if (places[k]) [s.scrollLeft, s.scrollTop] = places[k]; });
  restoring = true;
  if (focus >= 0) stops()[focus]?.focus({ preventScroll: true });
  restoring = false;
}

const observer = new ResizeObserver(entries => requestAnimationFrame(() => {
  for (const { target } of entries) guarded(() => redraw(target));
}));
function redraw(plot, always = false) {
  const known = draws.get(plot), width = Math.floor(plot.clientWidth);
  if (!known || !plot.isConnected || width < 1 || (!always && width === known.width)) return;
  known.width = width;
  inPlace(plot, () => known.draw(plot, width));
}
// What goes wrong with one chart leaves the others as they are.
function guarded(work) {
  try { work(); } catch (error) { console.error("senmon:", error); }
}
function repaint() {
  for (const plot of draws.keys()) guarded(() => redraw(plot, true));
}
function forget() {
  for (const plot of draws.keys()) if (!plot.isConnected) { draws.delete(plot); observer.unobserve(plot); }
}

// Title, note, tools and the plot, or the table in its place.
function chart(block, { tools = [], draw, table, empty }) {
  const { data, state } = block;
  if (empty) [tools, draw] = [[], plot => plot.replaceChildren(el("p", { class: "note" }, "There are no data."))];
  const plot = el("div", { class: "plot" });
  const toggle = el("button", { type: "button", class: "quiet", onclick() { state.table = !state.table; show(); } });
  function show() {
    toggle.textContent = state.table ? "Show as chart" : "Show as table";
    toggle.setAttribute("aria-label", `${toggle.textContent}: ${visible(data.title)}`);
    draws.delete(plot);
    if (state.table) {
      observer.unobserve(plot);
      state.tableState ??= {};
      plot.replaceChildren(tableView({ data: table(), state: state.tableState, name: block.data.id, tall: true }));
    } else {
      draws.set(plot, { draw, width: 0 });
      redraw(plot);
      observer.observe(plot);
    }
  }
  block.host.replaceChildren(el("figure", {},
    el("figcaption", {}, el("div", {}, el("h3", {}, data.title), toggle), paragraph(data.note, "note")),
    tools.length ? el("div", { class: "tools" }, tools) : null, plot));
  show();
}

const MARKS = ["M-4,0a4,4 0 1,0 8,0a4,4 0 1,0-8,0z", "M-3.6,-3.6h7.2v7.2h-7.2z", "M0,-5L4.6,3.6H-4.6z", "M0,-5.2L5.2,0L0,5.2L-5.2,0z",
  "M0,5L4.6,-3.6H-4.6z", "M-1.6,-5h3.2v3.4h3.4v3.2h-3.4v3.4h-3.2v-3.4h-3.4v-3.2h3.4z"];
const mark = (place, x, y) =>
  svg("path", { class: "mark", style: seriesColour(place), d: MARKS[place % MARKS.length], transform: `translate(${x} ${y})` });

// Buttons that hide and show the series.
function legend(block, swatch) {
  const { data, state } = block;
  state.hidden ??= new Set();
  if (data.series.length < 2) return [];
  return data.series.map((series, place) => {
    const button = el("button", { type: "button", class: "key series", "aria-pressed": String(!state.hidden.has(series.name)), onclick() {
      state.hidden[state.hidden.has(series.name) ? "delete" : "add"](series.name);
      button.setAttribute("aria-pressed", String(!state.hidden.has(series.name)));
      block.host.querySelectorAll(".plot").forEach(plot => redraw(plot, true));
    } }, svg("svg", { width: 22, height: 12, "aria-hidden": "true" }, swatch(series, place)), series.name);
    return button;
  });
}
const barSwatch = (_, place) => svg("rect", { class: "bar", style: seriesColour(place), x: 5, width: 12, height: 12, rx: 2 });
const lineSwatch = (series, place) => [
  series.points ? null : svg("path", { class: "line", style: seriesColour(place), d: "M1,6H21" }), mark(place, 11, 6)];

const shownSeries = ({ data, state }) =>
  data.series.map((series, place) => ({ ...series, place })).filter(series => !state.hidden.has(series.name));

const canvasOf = (data, width, height, name) => svg("svg", { width, height, role: "img", tabindex: 0,
  "aria-label": `${visible(data.title)}. ${visible(data.summary ?? "")} The arrow keys read single values.`, class: name });

const render = {};

// ---- Bars

render.bars = block => chart(block, { tools: legend(block, barSwatch), table: () => barsTable(block.data),
  empty: !block.data.categories.length || !block.data.series.length,
  draw: (plot, width) => (block.data.direction === "vertical" ? drawColumns : drawBars)(block, plot, width) });

function barsTable(data) {
  const columns = [{ name: data.category || "category" }], rows = data.categories.map(name => [name]);
  for (const series of data.series) {
    const parts = series.low.length ? [["", "values"], [" from", "low"], [" to", "high"]] : [["", "values"]];
    for (const [ending, part] of parts) {
      columns.push({ name: series.name + ending, format: data.format });
      rows.forEach((row, k) => row.push(series[part][k]));
    }
  }
  return { title: data.title, columns, rows };
}
function barExtent(data, series) {
  const all = series.flatMap(s => [...s.values, ...s.low, ...s.high]).filter(Number.isFinite);
  if (data.reference) all.push(data.reference.value);
  const low = Math.min(0, ...all), high = Math.max(0, ...all);
  return low < high ? [low, high] : [0, 1];
}
function barTip(block, place, series) {
  const { data } = block, lines = [];
  for (const s of series) {
    const range = s.low.length ? ` (${fmt(s.low[place], data.format)} to ${fmt(s.high[place], data.format)})` : "";
    lines.push([series.length > 1 ? s.name : data.axis || s.name, fmt(s.values[place], data.format) + range, seriesColour(s.place)]);
  }
  if (data.reference) lines.push([data.reference.label, fmt(data.reference.value, data.format)]);
  return [data.categories[place], lines];
}
function exploreBars(block, root, series, bands, find) {
  const bars = place => root.querySelectorAll(`.bar[data-at="${place}"]`);
  const clear = () => root.querySelectorAll(".bar.at").forEach(bar => bar.classList.remove("at"));
  const count = block.data.categories.length;
  if (!count) return;
  explore(root, block.state, { count, find, step: stepper(count), hide: clear, show(at, aloud) {
    clear();
    bars(at).forEach(bar => bar.classList.add("at"));
    if (aloud) (bars(at)[0] ?? bands[at]).scrollIntoView({ block: "nearest" });
    showTip(() => (bars(at)[0] ?? bands[at]).getBoundingClientRect(), ...barTip(block, at, series), aloud);
  } });
}

function drawBars(block, plot, width) {
  const { data } = block, series = shownSeries(block);
  const left = Math.ceil(Math.min(width * 0.42, Math.max(30, ...data.categories.map(name => textWidth(name))) + 12));
  const thick = series.length > 1 ? 13 : 18, band = Math.max(1, series.length) * (thick + 2) + (series.length > 1 ? 14 : 10);
  const [low, high] = barExtent(data, series);
  // Room behind the longest bar for its number.
  const room = Math.max(0, ...series.flatMap(s => s.values.map(v => textWidth(fmt(v, data.format))))) + 12;
  const x = scale(low, high, left + (low < 0 ? room : 0), Math.max(left + 40, width - room), false);
  const top = data.reference ? 24 : 4, bottom = top + band * data.categories.length, height = bottom + 22 + (data.axis ? 20 : 0);
  const root = canvasOf(data, width, height), bands = [];
  const { list, step } = x.ticks((x(high) - x(low)) / 90);
  let free = -Infinity;
  for (const tick of list) {
    const text = tickText(tick, data.format, step), half = textWidth(text) / 2;
    root.append(svg("line", { class: "rule", x1: x(tick), x2: x(tick), y1: top, y2: bottom }));
    if (x(tick) - half < free + 10) continue;
    root.append(svg("text", { x: x(tick), y: bottom + 16, "text-anchor": "middle" }, text));
    free = x(tick) + half;
  }
  if (data.axis) root.append(svg("text", { x: left, y: bottom + 36 }, shortened(data.axis, width - left)));
  data.categories.forEach((name, k) => {
    const y = top + k * band;
    const hit = svg("rect", { x: 0, y, width, height: band, fill: "transparent" });
    bands.push(hit);
    root.append(hit, svg("text", { class: "strong", x: left - 10, y: y + band / 2 + 4, "text-anchor": "end" }, shortened(name, left - 12)));
    series.forEach((s, j) => {
      const value = s.values[k], from = y + (band - series.length * (thick + 2)) / 2 + j * (thick + 2) + 1, middle = from + thick / 2;
      if (value === null) return;
      const a = x(Math.min(0, value)), b = x(Math.max(0, value));
      let end = value < 0 ? a : b;
      root.append(svg("rect", { class: "bar", "data-at": k, style: seriesColour(s.place), x: a, y: from, width: Math.max(1, b - a), height: thick, rx: 1.5 }));
      if (s.low.length && s.low[k] !== null && s.high[k] !== null) {
        root.append(svg("path", { class: "whisker", d: `M${x(s.low[k])},${middle}H${x(s.high[k])}M${x(s.low[k])},${middle - 4}v8M${x(s.high[k])},${middle - 4}v8` }));
        end = value < 0 ? Math.min(end, x(s.low[k])) : Math.max(end, x(s.high[k]));
      }
      root.append(svg("text", { class: "strong halo", x: end + (value < 0 ? -6 : 6), y: middle + 4, "text-anchor": value < 0 ? "end" : "start" }, fmt(value, data.format)));
    });
  });
  root.append(svg("line", { class: "base", x1: x(0), x2: x(0), y1: top, y2: bottom }));
  if (data.reference) {
    const at = x(data.reference.value), text = shortened(`${data.reference.label} ${fmt(data.reference.value, data.format)}`, width), half = textWidth(text) / 2;
    // Below the numbers, which have a rim of paper.
    root.insertBefore(svg("line", { class: "reference", x1: at, x2: at, y1: top - 4, y2: bottom }), bands[0] ?? null);
    root.append(svg("text", { class: "strong", x: Math.max(half, Math.min(width - half, at)), y: 14, "text-anchor": "middle" }, text));
  }
  plot.replaceChildren(root);
  exploreBars(block, root, series, bands, event => {
    const at = Math.floor((event.clientY - root.getBoundingClientRect().top - top) / band);
    return at >= 0 && at < data.categories.length ? at : null;
  });
}

function drawColumns(block, plot, width) {
  const { data } = block, series = shownSeries(block), count = data.categories.length;
  const [low, high] = barExtent(data, series), height = 300, top = data.axis || data.reference ? 28 : 12;
  const draft = ticks(low, high, 5), left = Math.ceil(Math.max(...draft.list.map(t => textWidth(tickText(t, data.format, draft.step))))) + 12;
  const band = (width - left) / Math.max(1, count), widest = Math.max(1, ...data.categories.map(name => textWidth(name)));
  const numeric = data.categories.every(name => /^\d+$/.test(name)), upright = !numeric && widest + 8 > band;
  const foot = (upright ? Math.min(widest, 110) + 10 : 20) + (data.category ? 20 : 0), bottom = height - foot;
  const y = scale(low, high, bottom, top, false), root = canvasOf(data, width, height), bands = [];
  const reference = data.reference ? shortened(`${data.reference.label} ${fmt(data.reference.value, data.format)}`, width / 2) : "";
  if (data.axis) root.append(svg("text", { x: 0, y: 12 }, shortened(data.axis, width - (reference ? textWidth(reference) + 45 : 0))));
  for (const tick of draft.list) {
    root.append(svg("line", { class: "rule", x1: left, x2: width, y1: y(tick), y2: y(tick) }),
      svg("text", { x: left - 8, y: y(tick) + 4, "text-anchor": "end" }, tickText(tick, data.format, draft.step)));
  }
  const every = niceStep(upright ? 17 / band : (widest + 10) / band);
  data.categories.forEach((name, k) => {
    const x = left + k * band, thick = Math.max(1, (band * (band > 12 ? 0.78 : 0.86)) / Math.max(1, series.length));
    const hit = svg("rect", { x, y: top, width: band, height: bottom - top, fill: "transparent" });
    bands.push(hit);
    root.append(hit);
    series.forEach((s, j) => {
      const value = s.values[k];
      if (value === null) return;
      const from = x + (band - thick * series.length) / 2 + j * thick, a = y(Math.max(0, value)), b = y(Math.min(0, value));
      root.append(svg("rect", { class: "bar", "data-at": k, style: seriesColour(s.place), x: from, y: a, width: Math.max(0.5, thick - (thick > 4 ? 1 : 0)), height: Math.max(1, b - a), rx: thick > 6 ? 1.5 : 0 }));
      if (s.low.length && s.low[k] !== null && s.high[k] !== null) {
        const m = from + thick / 2;
        root.append(svg("path", { class: "whisker", d: `M${m},${y(s.low[k])}V${y(s.high[k])}M${m - 3},${y(s.low[k])}h6M${m - 3},${y(s.high[k])}h6` }));
      }
    });
    if (k % every === 0) {
      const at = x + band / 2;
      root.append(upright
        ? svg("text", { x: at, y: bottom + 8, "text-anchor": "end", transform: `rotate(-90 ${at} ${bottom + 8})`, dy: 4 }, shortened(name, 110))
        : svg("text", { x: at, y: bottom + 16, "text-anchor": "middle" }, name));
    }
  });
  root.append(svg("line", { class: "base", x1: left, x2: width, y1: y(0), y2: y(0) }));
  if (data.category) root.append(svg("text", { x: left, y: height - 4 }, shortened(data.category, width - left)));
  if (data.reference) {
    const at = y(data.reference.value), from = width - textWidth(reference);
    // The label is above, where no bar is.
    root.append(svg("line", { class: "reference", x1: left, x2: width, y1: at, y2: at }),
      svg("line", { class: "reference", x1: from - 30, x2: from - 8, y1: 8, y2: 8 }),
      svg("text", { class: "strong", x: from, y: 12 }, reference));
  }
  plot.replaceChildren(root);
  exploreBars(block, root, series, bands, event => {
    const at = Math.floor((event.clientX - root.getBoundingClientRect().left - left) / band);
    return at >= 0 && at < count ? at : null;
  });
}

// Every how many labels one is written where `need` labels share the room of one.
function niceStep(need) {
  for (let power = 1; ; power *= 10) for (const k of [1, 2, 4, 5, 8]) if (k * power >= need) return k * power;
}

// ---- Lines

render.lines = block => chart(block, { tools: legend(block, lineSwatch), table: () => linesTable(block.data),
  empty: !block.data.series.some(s => s.x.length), draw: (plot, width) => drawLines(block, plot, width) });

function linesTable({ title, series, x, y }) {
  const band = series.some(s => s.low.length);
  const columns = [{ name: "line" }, { name: x.label, format: x.format }, { name: y.label, format: y.format },
    ...(band ? [{ name: "from", format: y.format }, { name: "to", format: y.format }] : [])];
  const rows = series.flatMap(s => s.x.map((at, k) => [s.name, at, s.y[k], ...(band ? [s.low[k] ?? null, s.high[k] ?? null] : [])]));
  return { title, columns, rows };
}
function extent(axis, values) {
  let low = Infinity, high = -Infinity;
  for (const v of values) if (v !== null && (!axis.log || v > 0)) { if (v < low) low = v; if (v > high) high = v; }
  if (low > high) [low, high] = axis.log ? [1, 10] : [0, 1];
  return [axis.min ?? low, axis.max ?? high];
}

function drawLines(block, plot, width) {
  const { data } = block, series = shownSeries(block), height = Math.round(Math.min(380, Math.max(250, width * 0.42)));
  const top = data.y.label ? 28 : 12, bottom = height - (data.x.label ? 44 : 24);
  let [low, high] = extent(data.y, [...series.flatMap(s => [...s.y, ...s.low, ...s.high]), ...data.references.map(r => r.value)]);
  const pad = data.y.log ? (high / low) ** 0.04 : (high - low) * 0.04;
  low = data.y.min ?? (data.y.log ? low / pad : low - pad);
  high = data.y.max ?? (data.y.log ? high * pad : high + pad);
  const y = scale(low, high, bottom, top, data.y.log), yTicks = y.ticks(5);
  const yText = yTicks.list.map(t => (yTicks.step ? tickText(t, data.y.format, yTicks.step) : fmt(t, { ...AUTO, style: t >= 1000 ? "compact" : "auto" })));
  const left = Math.ceil(Math.max(20, ...yText.map(t => textWidth(t)))) + 12, right = width - 12;
  const x = scale(...extent(data.x, series.flatMap(s => s.x)), left, right, data.x.log), xTicks = x.ticks((right - left) / (data.x.log ? 70 : 90));
  const root = canvasOf(data, width, height), clip = `${data.id}-clip`;
  if (data.y.label) root.append(svg("text", { x: 0, y: 12 }, shortened(data.y.label, width)));
  if (data.x.label) root.append(svg("text", { x: right, y: height - 6, "text-anchor": "end" }, shortened(data.x.label, right)));
  yTicks.list.forEach((tick, k) => root.append(svg("line", { class: "rule", x1: left, x2: right, y1: y(tick), y2: y(tick) }),
    svg("text", { x: left - 8, y: y(tick) + 4, "text-anchor": "end" }, yText[k])));
  let free = -Infinity;
  for (const tick of xTicks.list) {
    const text = xTicks.step ? tickText(tick, data.x.format, xTicks.step) : fmt(tick, { ...AUTO, style: tick >= 1000 ? "compact" : "auto" });
    const half = textWidth(text) / 2, at = x(tick), middle = Math.min(at, width - half);
    root.append(svg("line", { class: "base", x1: at, x2: at, y1: bottom, y2: bottom + 4 }));
    if (middle - half < free + 10) continue;
    root.append(svg("text", { x: middle, y: bottom + 18, "text-anchor": "middle" }, text));
    free = middle + half;
  }
  root.append(svg("line", { class: "base", x1: left, x2: right, y1: bottom, y2: bottom }),
    svg("clipPath", { id: clip }, svg("rect", { x: left - 6, y: top - 6, width: right - left + 12, height: bottom - top + 8 })));
  const inside = svg("g", { "clip-path": `url(#${clip})` }), labels = [];
  for (const reference of data.references) {
    const at = y(reference.value), text = shortened(`${reference.label} ${fmt(reference.value, data.y.format)}`, right - left);
    inside.append(svg("line", { class: "reference", x1: left, x2: right, y1: at, y2: at }));
    // At one end of the line, above or below it, where the fewest points are and no other label.
    const wide = textWidth(text), busy = (from, place) => series.reduce((sum, s) => sum + s.x.filter((v, k) =>
      x(v) >= from && x(v) <= from + wide && Math.abs(y(s.y[k] ?? NaN) - place + 4) < 12).length, 0);
    const free = [[right - wide, at - 6], [right - wide, at + 15], [left + 4, at - 6], [left + 4, at + 15]]
      .filter(([from, place]) => place > top && place < bottom && labels.every(([other, there]) => Math.abs(other - from) > Math.max(wide, 150) || Math.abs(there - place) > 14))
      .map(([from, place]) => [from, place, busy(from, place)]).sort((a, b) => a[2] - b[2])[0];
    if (!free) continue;
    labels.push(free);
    root.append(svg("text", { class: "strong halo", x: free[0], y: free[1] }, text));
  }
  for (const s of series) {
    const px = s.x.map(x), py = s.y.map(v => (v === null ? NaN : y(v))), ok = k => Number.isFinite(px[k]) && Number.isFinite(py[k]);
    if (s.low.length) {
      const there = s.x.map((_, k) => k).filter(k => s.low[k] !== null && s.high[k] !== null);
      const edge = (part, k) => { const at = y(s[part][k]); return `${px[k].toFixed(1)},${(Number.isFinite(at) ? at : bottom).toFixed(1)}`; };
      if (there.length) inside.append(svg("path", { class: "band", style: seriesColour(s.place),
        d: "M" + [...there.map(k => edge("high", k)), ...there.reverse().map(k => edge("low", k))].join("L") + "Z" }));
    }
    let path = "";
    px.forEach((at, k) => { if (ok(k)) path += `${k && ok(k - 1) ? "L" : "M"}${at.toFixed(1)},${py[k].toFixed(1)}`; });
    if (!s.points) inside.append(svg("path", { class: "line", style: seriesColour(s.place), d: path }));
    // Marks tell the lines apart without colour: a few along each, not at the same places.
    const there = px.map((_, k) => k).filter(ok), marks = s.points || there.length <= 12 ? there : [];
    if (!marks.length && data.series.length > 1) {
      for (let m = 0; m < 5; m++) {
        const goal = left + (right - left) * (m + (s.place % 6 + 1) / 7) / 5;
        const near = there.reduce((a, b) => (Math.abs(px[b] - goal) < Math.abs(px[a] - goal) ? b : a));
        if (Math.abs(px[near] - goal) < 20) marks.push(near);
      }
    }
    inside.append(...marks.map(k => mark(s.place, px[k].toFixed(1), py[k].toFixed(1))));
  }
  const cursor = svg("g", { "pointer-events": "none" });
  root.append(inside, svg("rect", { x: left, y: top, width: right - left, height: bottom - top, fill: "transparent" }), cursor);
  // Labels above the lines.
  root.querySelectorAll("text.halo").forEach(text => root.append(text));
  plot.replaceChildren(root);

  const stops = [...new Set(series.flatMap(s => s.x))].filter(v => Number.isFinite(x(v))).sort((a, b) => a - b), places = stops.map(x);
  if (!stops.length) return;
  explore(root, block.state, { count: stops.length, start: stops.length - 1, step: stepper(stops.length), hide: () => cursor.replaceChildren(),
    find(event) { return nearest(places, event.clientX - root.getBoundingClientRect().left); },
    show(at, aloud) {
      cursor.replaceChildren(svg("line", { class: "cursor", x1: places[at], x2: places[at], y1: top, y2: bottom }));
      const lines = [];
      for (const s of series) {
        const k = nearest(s.x, stops[at]);
        if (k === null || s.y[k] === null || Math.abs(x(s.x[k]) - places[at]) > 6) continue;
        const range = s.low.length ? ` (${fmt(s.low[k], data.y.format)} to ${fmt(s.high[k], data.y.format)})` : "";
        lines.push([s.name, fmt(s.y[k], data.y.format) + range, seriesColour(s.place)]);
        if (y(s.y[k]) >= top - 6 && y(s.y[k]) <= bottom + 2) cursor.append(mark(s.place, x(s.x[k]), y(s.y[k])));
      }
      const boxOf = () => new DOMRect(root.getBoundingClientRect().left + places[at], root.getBoundingClientRect().top + top, 0, bottom - top);
      showTip(boxOf, `${data.x.label} ${fmt(stops[at], data.x.format)}`.trim(), lines, aloud);
    } });
}
// The place of the number nearest to `value` in an ascending list.
function nearest(list, value) {
  if (!list.length) return null;
  let low = 0, high = list.length - 1;
  while (high - low > 1) { const middle = (low + high) >> 1; if (list[middle] <= value) low = middle; else high = middle; }
  return Math.abs(list[low] - value) <= Math.abs(list[high] - value) ? low : high;
}

// ---- Heat maps

render.heat = block => chart(block, { tools: [heatScale(block.data)], table: () => heatTable(block.data),
  empty: !block.data.values.length, draw: (plot, width) => drawHeat(block, plot, width) });

function heatEnds({ scale: kind, values }) {
  if (kind.kind !== "whole") return { low: kind.low, high: kind.high, centre: kind.centre?.value };
  const [low, high] = extent({}, values);
  return { low, high: high > low ? high : low + 1 };
}
function heatScale(data) {
  const { low, high, centre } = heatEnds(data), diverging = centre !== undefined;
  const beyond = data.values.some(v => v !== null && v > high) ? "≥ " : "", below = data.values.some(v => v !== null && v < low) ? "≤ " : "";
  return el("div", { class: "scale " + (diverging ? "diverging" : "sequential"), role: "img",
    "aria-label": visible(`Colours: ${data.value || "values"} from ${fmt(low, data.format)} to ${fmt(high, data.format)}`) }, el("b", {}, data.value), el("i"),
    el("span", {}, below + fmt(low, data.format)),
    el("span", {}, diverging ? `${data.scale.centre.label} ${fmt(centre, data.format)}` : ""),
    el("span", {}, beyond + fmt(high, data.format)));
}
function heatTable(data) {
  const across = data.columns.length;
  return { title: data.title, columns: [{ name: data.row || "row" }, ...data.columns.map(name => ({ name, format: data.format }))],
    rows: data.rows.map((name, k) => [name, ...data.values.slice(k * across, (k + 1) * across)]) };
}

// Colours of the theme as numbers; a canvas knows no variables.
function palette(name, count) {
  const probe = document.body.appendChild(el("i", { hidden: true }));
  const list = Array.from({ length: count }, (_, k) => {
    probe.style.color = `var(--${name}${count > 1 ? k : ""})`;
    return getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map(Number);
  });
  probe.remove();
  return list;
}
function mixed(stops, part) {
  const at = Math.max(0, Math.min(1, part)) * (stops.length - 1), k = Math.min(Math.floor(at), stops.length - 2);
  return stops[k].map((c, j) => Math.round(c + (stops[k + 1][j] - c) * (at - k)));
}

function drawHeat(block, plot, width) {
  const { data } = block, across = data.columns.length, down = data.rows.length;
  const { low, high, centre } = heatEnds(data), stops = palette(centre === undefined ? "seq" : "div", 5);
  const part = v => (centre === undefined ? (v - low) / (high - low) : v < centre ? (v - low) / (centre - low) / 2 : 0.5 + (v - centre) / (high - centre) / 2);
  const left = Math.ceil(Math.min(width * 0.35, Math.max(...data.rows.map(name => textWidth(name))))) + 12;
  const texts = across * down <= 240, widest = texts ? Math.ceil(Math.max(...data.values.map(v => textWidth(fmt(v, data.format))))) + 10 : 0;
  let wide = Math.max(texts ? widest : 5, Math.min(texts ? 96 : 28, Math.floor((width - left - 4) / across * 2) / 2));
  let high1 = texts ? 30 : Math.max(6, Math.min(wide, 22, Math.floor(560 / down)));
  // A map of things against themselves is square.
  if (!texts && across === down) high1 = wide = Math.max(5, Math.min(wide, Math.floor(620 / down)));

  const ratio = Math.max(2, devicePixelRatio || 1);
  const canvas = el("canvas", { width: across * wide * ratio, height: down * high1 * ratio, style: `width:${across * wide}px;height:${down * high1}px` });
  const paint = canvas.getContext("2d"), [paper] = palette("paper", 1), gap = wide >= 12 ? 1 : 0; // in whole pixels of the screen, as halves of a CSS pixel are
  paint.scale(ratio, ratio);
  paint.font = `12px ${getComputedStyle(document.body).fontFamily}`;
  paint.textAlign = "center";
  paint.textBaseline = "middle";
  data.values.forEach((value, at) => {
    if (value === null) return;
    const x = at % across * wide, y = Math.floor(at / across) * high1, colour = mixed(stops, part(value));
    paint.fillStyle = `rgb(${colour})`;
    paint.fillRect(x, y, wide - gap, high1 - gap);
    if (!texts) return;
    // Black or white, whichever is further from the colour.
    const light = colour.map(c => ((c / 255 + 0.055) / 1.055) ** 2.4).reduce((sum, c, k) => sum + c * [0.2126, 0.7152, 0.0722][k], 0);
    paint.fillStyle = light > 0.18 ? "#000" : "#fff";
    paint.fillText(fmt(value, data.format), x + wide / 2, y + high1 / 2 + 1);
  });
  const cell = el("div", { class: "cell", hidden: true });
  const grid = el("div", { class: "grid", tabindex: 0, role: "img", style: `width:${across * wide}px`,
    "aria-label": `${visible(data.title)}. ${visible(data.summary ?? "")} The arrow keys read single values.` }, canvas, cell);

  const rowStep = niceStep(14 / high1), rows = svg("svg", { width: left, height: down * high1, "aria-hidden": "true" });
  data.rows.forEach((name, k) => {
    if (k % rowStep === 0) rows.append(svg("text", { x: left - 8, y: (k + 0.5) * high1 + 4, "text-anchor": "end" }, shortened(name, left - 12)));
  });
  const label = Math.max(...data.columns.map(name => textWidth(name))), numeric = data.columns.every(name => /^\d+$/.test(name));
  const upright = !numeric && label + 6 > wide, columnStep = niceStep(upright ? 17 / wide : (label + 10) / wide);
  const foot = upright ? Math.min(label, 120) + 12 : 20;
  const columns = svg("svg", { width: across * wide, height: foot, "aria-hidden": "true" });
  data.columns.forEach((name, k) => {
    if (k % columnStep) return;
    const x = (k + 0.5) * wide, half = textWidth(name) / 2;
    columns.append(upright ? svg("text", { x, y: 8, dy: 4, "text-anchor": "end", transform: `rotate(-90 ${x} 8)` }, shortened(name, 120))
      : svg("text", { x: Math.max(half, Math.min(across * wide - half, x)), y: 15, "text-anchor": "middle" }, name));
  });
  const axes = [data.row && `↓ ${data.row}`, data.column && `→ ${data.column}`].filter(Boolean).join("\u2003");
  plot.replaceChildren(el("div", { class: "heat" }, rows, el("div", { class: "scroll" }, grid, columns)), el("p", { class: "axes", style: `padding-left:${left}px` }, axes));

  explore(grid, block.state, { count: across * down, step: stepper(across * down, across), hide: () => { cell.hidden = true; },
    find(event) {
      const box = canvas.getBoundingClientRect(), x = Math.floor((event.clientX - box.left) / wide), y = Math.floor((event.clientY - box.top) / high1);
      return x >= 0 && x < across && y >= 0 && y < down ? y * across + x : null;
    },
    show(at, aloud) {
      const x = at % across, y = Math.floor(at / across);
      cell.hidden = false;
      cell.style.cssText = `left:${x * wide}px;top:${y * high1}px;width:${wide - gap}px;height:${high1 - gap}px`;
      if (aloud) cell.scrollIntoView({ block: "nearest", inline: "nearest" });
      const lines = [[data.value || "value", fmt(data.values[at], data.format)]];
      if (centre !== undefined) lines.push([data.scale.centre.label, fmt(centre, data.format)]);
      showTip(() => cell.getBoundingClientRect(), `${data.row} ${data.rows[y]}, ${data.column} ${data.columns[x]}`.trim(), lines, aloud);
    } });
}

// ---- Coloured text

render.tokens = block => {
  const { data, state } = block;
  state.layer = Math.min(state.layer ?? data.chosen, Math.max(0, data.layers.length - 1));
  const keys = el("div", { class: "tools keys" });
  const choose = chooser("Layer", data.layers.map(layer => layer.label), state.layer, at => { state.layer = at; paintTokens(block, keys); });
  chart(block, { tools: data.layers.length > 1 ? [choose] : [], empty: !data.tokens.length, table: () => tokensTable(block), draw(plot) {
    plot.replaceChildren(keys, tokensView(block, keys));
    paintTokens(block, keys);
  } });
};

const named = (data, category) => data.names[category] ?? String(category);

// Spaces, line ends and tabs as signs, where they are all that a token is.
function tokenText(token) {
  if (token === "") return "∅";
  return token.replace(/\t/g, "⇥").replace(/\r/g, "␍").replace(/\n/g, "⏎\n");
}
function tokensTable({ data, state }) {
  const layer = data.layers[state.layer], slots = Array.from({ length: data.slots }, (_, k) => k);
  const columns = [{ name: "place", format: { style: "fixed", digits: 0 } }, { name: "token" }, ...slots.flatMap(k =>
    [{ name: `${data.category} ${k + 1}` }, ...(layer?.weights.length ? [{ name: `weight ${k + 1}`, format: { style: "fixed", digits: 3 } }] : [])])];
  const rows = data.tokens.map((token, t) => [t, token, ...slots.flatMap(k => {
    const at = t * data.slots + k, there = layer && layer.picks[at] >= 0;
    return [there ? named(data, layer.picks[at]) : null, ...(layer?.weights.length ? [there ? layer.weights[at] : null] : [])];
  })]);
  return { title: data.title + (layer ? `, layer ${layer.label}` : ""), columns, rows };
}

function tokensView(block, keys) {
  const { data, state } = block;
  const text = el("div", { class: "tokens", tabindex: 0, role: "group",
    "aria-label": `${visible(data.title)}. ${visible(data.summary ?? "")} The arrow keys read single tokens, enter marks those of the same ${visible(data.category)}.` });
  data.tokens.forEach((token, t) => text.append(el("span", { "data-at": t }, tokenText(token))));
  const clear = () => text.querySelectorAll(".at").forEach(span => span.classList.remove("at"));
  let here = 0;
  explore(text, state, { count: data.tokens.length, step: stepper(data.tokens.length), hide: clear,
    find: event => { const at = event.target.dataset?.at; return at === undefined ? null : Number(at); },
    show(at, aloud) {
      here = at;
      clear();
      const span = text.children[at], layer = data.layers[state.layer];
      if (!span) return;
      span.classList.add("at");
      if (aloud) span.scrollIntoView({ block: "nearest" });
      const lines = [];
      for (let k = at * data.slots; layer && k < (at + 1) * data.slots; k++) {
        if (layer.picks[k] < 0) continue;
        const colour = state.colours.get(layer.picks[k]);
        lines.push([`${data.category} ${named(data, layer.picks[k])}`, layer.weights.length ? layer.weights[k].toFixed(3) : "",
          colour ? seriesColour(colour - 1) : "--c: var(--muted)"]);
      }
      showTip(() => span.getClientRects()[0] ?? span.getBoundingClientRect(), `“${tokenText(data.tokens[at])}”`, lines, aloud);
    } });
  const only = () => {
    const first = data.layers[state.layer]?.picks[here * data.slots];
    if (first >= 0) { state.only = state.only === first ? null : first; paintTokens(block, keys); }
  };
  text.addEventListener("keydown", event => { if (event.key === "Enter") only(); });
  text.addEventListener("click", event => { if (event.target.dataset.at !== undefined) only(); });
  return text;
}

// The colours of one layer: the most frequent categories have one each.
function paintTokens(block, keys) {
  const { data, state, host } = block, layer = data.layers[state.layer];
  if (state.table) return chartAgain(block);
  const firsts = layer ? layer.picks.filter((_, k) => k % data.slots === 0) : [], counts = new Map();
  firsts.forEach(pick => { if (pick >= 0) counts.set(pick, (counts.get(pick) ?? 0) + 1); });
  const order = [...counts].sort((a, b) => b[1] - a[1] || a[0] - b[0]);
  state.colours = new Map(order.slice(0, 8).map(([category], k) => [category, k + 1]));
  if (!counts.has(state.only)) state.only = null;
  const picked = t => state.only === null || layer.picks.slice(t * data.slots, (t + 1) * data.slots).includes(state.only);
  [...host.querySelectorAll(".tokens > span")].forEach((span, t) => {
    const at = span.classList.contains("at") ? " at" : "";
    span.className = `k${state.colours.get(firsts[t]) ?? 0}${picked(t) ? "" : " far"}${at}`;
  });
  const shown = order.slice(0, 8);
  if (state.only !== null && !state.colours.has(state.only)) shown.push([state.only, counts.get(state.only)]);
  const others = order.slice(8).reduce((sum, [, count]) => sum + count, 0);
  inPlace(keys, () => keys.replaceChildren(el("span", { class: "what" }, `${data.category} · tokens`), ...shown.map(([category, count]) => el("button", { type: "button",
    class: "key" + (state.only === category ? " only" : ""), "aria-pressed": String(state.only === category),
    "aria-label": visible(`${data.category} ${named(data, category)}, ${count} tokens; mark only these`),
    onclick() { state.only = state.only === category ? null : category; paintTokens(block, keys); } },
    el("span", { class: `chip k${state.colours.get(category) ?? 0}` }), `${named(data, category)} · ${count}`)),
    ...(others ? [el("span", { class: "key" }, el("span", { class: "chip k0" }), `${order.length - 8} others · ${others}`)] : [])));
}
const chartAgain = block => inPlace(block.host, () => render[block.data.kind](block));

// Buttons for a few short names, a list with two arrows for more.
function chooser(label, names, chosen, change) {
  if (names.length <= 8 && names.join("").length <= 60) {
    const buttons = names.map((name, k) => el("button", { type: "button", "aria-pressed": String(k === chosen), onclick() {
      buttons.forEach((button, j) => button.setAttribute("aria-pressed", String(j === k)));
      change(k);
    } }, name));
    return el("div", { class: "choose", role: "group", "aria-label": visible(label) }, label, el("span", { class: "group" }, buttons));
  }
  const select = el("select", { onchange: () => pick(select.selectedIndex) }, names.map((name, k) => el("option", { selected: k === chosen }, name)));
  const arrow = (sign, name, move) => el("button", { type: "button", "aria-label": `${name} ${visible(label)}`, onclick: () => pick(select.selectedIndex + move) }, sign);
  const back = arrow("‹", "Previous", -1), on = arrow("›", "Next", 1);
  function ends() { back.disabled = select.selectedIndex <= 0; on.disabled = select.selectedIndex >= names.length - 1; }
  function pick(k) {
    if (k < 0 || k >= names.length) return;
    select.selectedIndex = k;
    ends();
    change(k);
  }
  ends();
  return el("div", { class: "choose" }, el("label", {}, label, " ", select), back, on);
}

// ---- Tables

const SHOWN = 500;

render.table = block => block.host.replaceChildren(...[block.data.title ? el("h3", {}, block.data.title) : null,
  paragraph(block.data.note, "note"), tableView({ ...block, name: block.data.id })].filter(Boolean));

function tableView({ data, state, name, tall = false }) {
  const view = el("div", { class: "view" }), numeric = data.columns.map(column => Boolean(column.format));
  const best = data.columns.map((column, k) => {
    const all = data.rows.map(row => row[k]).filter(v => typeof v === "number");
    return column.best && all.length ? all.reduce((a, b) => (column.best === "highest" ? Math.max(a, b) : Math.min(a, b))) : null;
  });
  function order() {
    const { column, down } = state.sort ?? {};
    if (column === undefined || !data.columns[column]) return data.rows;
    const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true }));
    // What is missing stays at the end.
    return [...data.rows].sort(({ [column]: a }, { [column]: b }) =>
      a === null || b === null ? (a === null) - (b === null) : compare(a, b) * (down ? -1 : 1));
  }
  function sort(k) {
    const first = numeric[k], now = state.sort?.column === k ? state.sort.down : null;
    state.sort = now === null ? { column: k, down: first } : now === first ? { column: k, down: !first } : null;
    show();
  }
  function cell(value, k) {
    const is = typeof value === "number", text = is ? fmt(value, data.columns[k].format ?? AUTO) : value ?? "–";
    const name = [numeric[k] && "number", is && value === best[k] && "best"].filter(Boolean).join(" ") || null;
    return k ? el("td", { class: name }, text) : el("th", { class: name, scope: "row" }, text);
  }
  function show() {
    const rows = order(), shown = state.all ? rows : rows.slice(0, SHOWN);
    const heads = data.columns.map((column, k) => el("th", { scope: "col", class: numeric[k] ? "number" : null,
      "aria-sort": state.sort?.column === k ? (state.sort.down ? "descending" : "ascending") : null },
      el("button", { type: "button", onclick: () => sort(k) }, column.name)));
    const more = rows.length > shown.length
      ? el("button", { type: "button", onclick() { state.all = true; show(); } }, `Show all ${fmt(rows.length)} rows`) : null;
    const save = (kind, text) => el("button", { type: "button", class: "quiet export", "aria-label": `Save as ${kind}: ${visible(data.title)}`,
      onclick: () => download(`${name}.${kind.toLowerCase()}`, text()) }, `Save as ${kind}`);
    inPlace(view, () => view.replaceChildren(
      el("div", { class: "scroll" + (tall || rows.length > 30 ? " tall" : ""), tabindex: 0, role: "region", "aria-label": visible(data.title || "Table") },
        el("table", {}, el("caption", { class: "hush" }, data.title || "Table"), el("thead", {}, el("tr", {}, heads)),
          el("tbody", {}, shown.map(row => el("tr", {}, row.map(cell)))))),
      el("div", { class: "tools export" }, more, save("CSV", () => csv(data, rows)), save("JSON", () => json(data, rows)))));
  }
  show();
  return view;
}

// Text that a spreadsheet would take for a formula gets an apostrophe before it; JSON has it as it is.
function csv({ columns }, rows) {
  const field = value => {
    if (value === null || value === undefined) return "";
    const text = typeof value === "string" && /^[=+\-@\t\r]/.test(value) ? "'" + value : String(value);
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return [columns.map(column => column.name), ...rows].map(row => row.map(field).join(",")).join("\r\n") + "\r\n";
}
function json({ title, columns }, rows) {
  return JSON.stringify({ title, columns: columns.map(column => column.name), rows }, null, 1) + "\n";
}
function download(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/octet-stream" }));
  const link = el("a", { href: url, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

// ---- Words; on loading they stand in the page already

render.text = ({ data, host }) => host.replaceChildren(...data.paragraphs.map(spans => paragraph(spans, null)).filter(Boolean));

render.figures = ({ data, host }) => host.replaceChildren(el("dl", { class: "figures" }, data.figures.map(figure => el("div", {},
  el("dt", {}, figure.caption), el("dd", { class: "value" }, fmt(figure.value, figure.format)),
  figure.reference ? el("dd", { class: "chance" }, `${figure.reference.label} ${fmt(figure.reference.value, figure.format)}`) : null))));

render.verdict = ({ data, host }) => host.replaceChildren(el("div", { class: `verdict ${data.tone}` },
  data.label ? el("p", { class: "label" }, data.label) : null, paragraph(data.sentence, "sentence"), paragraph(data.note, "note")));

// ---- Blocks that hold blocks

const emptyHosts = list => el("div", { class: "blocks" }, list.map(data =>
  el("div", { class: `block${data.half ? " half" : ""}`, "data-kind": data.kind, id: data.id })));

render.details = ({ data, host, state }, first) => {
  if (!first) host.replaceChildren(el("details", { open: state.open }, el("summary", {}, data.summary), emptyHosts(data.blocks)));
  const details = host.querySelector("details");
  state.open = details.open;
  details.addEventListener("toggle", () => { state.open = details.open; });
  data.blocks.forEach(child => mount(child.id, first));
};

render.selector = ({ data, host, state }, first) => {
  state.chosen = Math.min(state.chosen ?? data.chosen, Math.max(0, data.variants.length - 1));
  if (!first) host.replaceChildren(...data.variants.map(variant => el("div", { class: "variant" }, emptyHosts(variant.blocks))));
  const mounted = new Set(), parts = [...host.querySelectorAll(":scope > .variant")];
  function show(at) {
    state.chosen = at;
    parts.forEach((part, k) => { part.hidden = k !== at; });
    if (!mounted.has(at)) data.variants[at]?.blocks.forEach(child => mount(child.id, first));
    mounted.add(at);
    hideTip();
  }
  host.prepend(chooser(data.label, data.variants.map(variant => variant.label), state.chosen, show));
  show(state.chosen);
};

// ---- Mounting and updating

function register(data) {
  const known = blocks.get(data.id);
  if (known) { known.data = data; known.host = null; } else blocks.set(data.id, { data, host: null, state: {} });
  (data.blocks ?? []).forEach(register);
  (data.variants ?? []).forEach(variant => variant.blocks.forEach(register));
}

// Puts a block into its element. `first`: the element has what was written for readers without scripts.
function mount(id, first) {
  const block = blocks.get(id), words = ["text", "figures", "verdict"].includes(block.data.kind);
  block.host = document.getElementById(id);
  if (block.data.announced) block.host.setAttribute("aria-live", "polite");
  if (first && words) return;
  const written = [...block.host.childNodes];
  try {
    render[block.data.kind](block, first);
  } catch (error) {
    // A block that cannot be drawn leaves what readers without scripts have, and the others as they are.
    block.host.replaceChildren(...written);
    block.host.querySelectorAll(".static").forEach(part => part.classList.remove("static"));
    console.error(`senmon: block ${id}:`, error);
  }
}

function update(id, data) {
  const block = blocks.get(id);
  if (!block) throw new Error(`senmon.update: there is no block ${id}`);
  const next = { ...block.data, ...data, id };
  if (next.kind !== block.data.kind) throw new Error(`senmon.update: block ${id} is ${block.data.kind}, not ${next.kind}`);
  const host = block.host;
  register(next);
  block.host = host;
  if (host?.isConnected) inPlace(host, () => render[next.kind](block, false));
  forget();
}

// ---- The theme: that of the system until the reader chooses, then remembered

const root = document.documentElement, KEY = "senmon-theme";
const remembered = () => { try { return localStorage.getItem(KEY); } catch { return null; } };
const systemDark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : systemDark.matches);
const theme = el("button", { type: "button", class: "theme", onclick() {
  root.dataset.theme = isDark() ? "light" : "dark";
  try { localStorage.setItem(KEY, root.dataset.theme); } catch { /* A page in a frame may have no memory. */ }
  themed();
} });
function themed() {
  theme.textContent = isDark() ? "Light" : "Dark";
  theme.setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`);
  repaint();
}
// ?theme=dark in the address overrides, without being remembered.
const wanted = new URLSearchParams(location.search).get("theme") ?? remembered();
if (wanted === "dark" || wanted === "light") root.dataset.theme = wanted;
document.querySelector(".top .wide").append(theme);
systemDark.addEventListener("change", themed);
// Paper is white: canvases are painted once more for it.
addEventListener("beforeprint", () => { root.style.colorScheme = "light"; repaint(); });
addEventListener("afterprint", () => { root.style.colorScheme = ""; repaint(); });

// The link of the section that is being read.
const links = new Map([...document.querySelectorAll(".top nav a")].map(link => [link.hash.slice(1), link]));
const reading = new IntersectionObserver(entries => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    links.forEach(link => link.removeAttribute("aria-current"));
    links.get(entry.target.id)?.setAttribute("aria-current", "true");
  }
}, { rootMargin: "-20% 0px -75% 0px" });
document.querySelectorAll("main > section").forEach(section => reading.observe(section));

page.sections.forEach(section => section.blocks.forEach(register));
page.sections.forEach(section => section.blocks.forEach(block => mount(block.id, true)));
themed();

// Events of a live page: a block each, or several.
if (page.live) {
  const state = el("span", { class: "live", role: "status" }), events = new EventSource(page.live);
  theme.before(state);
  events.onopen = () => { state.textContent = "live"; };
  // The address leads to another page now.
  events.addEventListener("reload", () => { events.close(); location.reload(); });
  events.onerror = () => { state.textContent = "not connected"; };
  events.onmessage = event => guarded(() => [JSON.parse(event.data)].flat().forEach(data => update(data.id, data)));
}

globalThis.senmon = Object.freeze({ update, data: id => blocks.get(id)?.data });
})();
