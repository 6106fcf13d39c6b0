"use strict";

// Sorts a table by a column when its header is clicked, and in reverse when it is clicked again.
for (const head of document.querySelectorAll("#runs thead th")) {
  head.querySelector("button").addEventListener("click", () => {
    const descending = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const body = head.closest("table").tBodies[0];
    const text = (row) => row.cells[head.cellIndex].textContent.replaceAll(",", "");
    const missing = (row) => ["", "–"].includes(text(row));
    const order = (a, b) => {
      // Runs without a value are last in either order.
      if (missing(a) || missing(b)) return missing(a) - missing(b);
      const ascending = text(a) - text(b) || text(a).localeCompare(text(b), undefined, { numeric: true });
      return descending ? -ascending : ascending;
    };
    body.append(...[...body.rows].sort(order));
  });
}

// Draws the chart: a panel for each network, in it the mean of each setting with its band.
const data = JSON.parse(document.getElementById("data").textContent);
const { panels, groups, metrics, steps } = data;
const chart = document.getElementById("chart");
const controls = document.getElementById("controls");
const caption = document.getElementById("chart-caption");
const size = { panel: 270, left: 58, top: 30, bottom: 42, character: 6.6, gap: 14 };
const state = {
  metric: metrics[0]?.key,
  hidden: new Set(), // indices of groups, and names of splits
  log: false,
  smoothing: 0, // the weight of the past in an exponential moving average
  single: false,
  zoom: null, // limits of both axes, or null for those of all lines
  cursor: null, // a panel and a step whose values are shown
};

// Returns an SVG element.
function element(name, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

// Returns an HTML element.
function html(name, attributes, ...children) {
  const node = document.createElement(name);
  Object.assign(node, attributes);
  node.append(...children);
  return node;
}

const currentMetric = () => metrics.find((each) => each.key === state.metric);
const paint = (group) => `--line: var(--c-${group.color.slice(1)}, ${group.color})`;
const label = (value) => String(Number(value.toPrecision(4)));

// Returns an exponential moving average without the bias towards its start; null stays null.
function smooth(values) {
  const weight = state.smoothing;
  if (!weight || !values) return values;
  let [sum, total] = [0, 0];
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return sum / total;
  });
}

function splitsOfMetric() {
  const found = new Set(data.curves.concat(data.means).filter((c) => c.metric === state.metric).map((c) => c.split));
  return Object.keys(data.splits).filter((split) => found.has(split));
}

// A metric that has none of the chosen splits, such as the learning rate, is shown nevertheless.
function isShown(line) {
  if (line.metric !== state.metric) return false;
  const chosen = splitsOfMetric().filter((split) => !state.hidden.has(split));
  return !chosen.length || chosen.includes(line.split);
}

// Returns the lines of the chart: points [step, value, low, high] of means, [step, value] of runs.
function visibleLines() {
  const lines = [];
  for (const line of data.means.filter(isShown)) {
    if (state.hidden.has(line.group)) continue;
    const [mean, std] = [smooth(line.mean), smooth(line.std)];
    const points = steps[line.steps].map((step, i) => [step, mean[i], mean[i] - (std?.[i] ?? 0), mean[i] + (std?.[i] ?? 0)]);
    lines.push({ ...line, kind: "mean", points, band: std !== null });
  }
  for (const line of data.curves.filter(isShown)) {
    const run = data.runs[line.run];
    if (state.hidden.has(run.group) || !(state.single || run.outside)) continue;
    const values = smooth(line.values);
    const points = steps[line.steps].map((step, i) => [step, values[i]]).filter(([, value]) => value !== null);
    // A run that diverged before its first finite value has a cross alone, at the worst value.
    const start = points.length ? null : steps[line.steps][0];
    if (start === null || run.diverged) lines.push({ ...line, ...run, kind: run.outside ? "outside" : "run", points, start });
  }
  return lines;
}

// Returns the limits that show all means and bands or, without any, all runs.
function fullView(lines) {
  const means = lines.filter((line) => line.kind !== "outside");
  const points = (means.length ? means : lines).flatMap((line) => line.points);
  const values = points.flatMap((point) => point.slice(1)).filter((value) => !state.log || value > 0);
  const ends = (numbers) => [
    numbers.reduce((a, b) => Math.min(a, b), Infinity),
    numbers.reduce((a, b) => Math.max(a, b), -Infinity),
  ];
  let [low, high] = ends(values);
  if (state.log) {
    // A band may reach down to almost zero, where a logarithm has no end.
    low = Math.max(low, Math.min(...ends(points.map((point) => point[1]).filter((value) => value > 0))) / 3);
    if (!(low > 0 && high > low)) [low, high] = low > 0 && low < Infinity ? [low / 2, low * 2] : [0.1, 1];
  } else {
    if (points.every((point) => point[1] >= 0)) low = 0;
    if (!(high > low)) [low, high] = Number.isFinite(low) ? [low - 0.5, low + 0.5] : [0, 1];
  }
  const last = ends(lines.flatMap((line) => line.points.map(([step]) => step)))[1];
  return { x: [0, last > 0 ? last : 1], y: [low, high] };
}

function linearTicks([low, high], count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const places = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) places.push(i * step);
  return places;
}

function logTicks([low, high]) {
  const decades = Math.log10(high / low);
  const factors = decades < 2.5 ? [1, 2, 5] : [1];
  const stride = Math.ceil(decades / 6);
  const places = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    if (power % stride === 0) places.push(...factors.map((factor) => factor * 10 ** power));
  }
  return places.filter((place) => place >= low && place <= high);
}

// Moves labels apart, from the lowest one upwards and then down again from the upper edge.
function spread(labels, gap, [top, bottom]) {
  labels.sort((a, b) => b.y - a.y);
  labels.forEach((each, i) => (each.y = Math.min(each.y, i ? labels[i - 1].y - gap : bottom)));
  for (let i = labels.length - 1; i >= 0; i--) {
    labels[i].y = Math.max(labels[i].y, i + 1 < labels.length ? labels[i + 1].y + gap : top);
  }
}

let plots = []; // the panels as they were drawn last, with their scales

function draw() {
  const width = chart.clientWidth;
  if (!width || !state.metric) return;
  const lines = visibleLines();
  const view = state.zoom ?? fullView(lines);
  const titles = panels.filter((panel) => lines.some((line) => groups[line.group].panel === panel));
  const columns = Math.max(1, Math.min(titles.length, width < 640 ? 1 : width < 1000 ? 2 : 3));
  const even = Math.ceil(titles.length / Math.ceil(titles.length / columns)) || 1;
  const high = titles.length === 1 ? 1.5 * size.panel : size.panel;
  const svg = element("svg", {
    viewBox: `0 0 ${width} ${high * Math.max(1, Math.ceil(titles.length / even))}`,
    role: "img",
    "aria-label": describe(lines),
  });
  plots = titles.map((title, i) => {
    const [column, row] = [i % even, Math.floor(i / even)];
    return drawPanel(svg, title, lines, view, {
      left: (column * width) / even,
      width: width / even,
      top: row * high,
      height: high,
    });
  });
  chart.querySelector("svg")?.remove();
  chart.prepend(svg);
  caption.textContent = explain(lines);
  showCursor();
}

function drawPanel(svg, title, lines, view, place) {
  const own = lines.filter((line) => groups[line.group].panel === title);
  const named = endLabels(own);
  const longest = Math.min(0.42 * place.width, size.character * Math.max(0, ...named.map((each) => each.text.length)));
  const box = {
    x: [place.left + size.left, place.left + place.width - size.gap - longest],
    y: [place.top + size.top, place.top + place.height - size.bottom],
  };
  const scale = (value) => (state.log ? Math.log10(value) : value);
  const [low, high] = view.y.map(scale);
  const x = (step) => box.x[0] + ((step - view.x[0]) / (view.x[1] - view.x[0])) * (box.x[1] - box.x[0]);
  const y = (value) => box.y[1] - ((scale(value) - low) / (high - low)) * (box.y[1] - box.y[0]);
  const text = (attributes, content) => svg.append(element("text", attributes, content));
  for (const value of state.log ? logTicks(view.y) : linearTicks(view.y, 5)) {
    svg.append(element("line", { class: "grid", x1: box.x[0], x2: box.x[1], y1: y(value), y2: y(value) }));
    text({ x: box.x[0] - 6, y: y(value) + 4, "text-anchor": "end" }, label(value));
  }
  for (const step of linearTicks(view.x, Math.max(2, (box.x[1] - box.x[0]) / 90))) {
    text({ x: x(step), y: box.y[1] + 17, "text-anchor": "middle" }, step >= 10000 ? `${label(step / 1000)}k` : label(step));
  }
  if (panels.length > 1) text({ class: "title", x: box.x[0], y: box.y[0] - 12 }, title);
  text({ x: (box.x[0] + box.x[1]) / 2, y: box.y[1] + 35, "text-anchor": "middle" }, "training steps");
  const middle = (box.y[0] + box.y[1]) / 2;
  const turned = `translate(${place.left + 12} ${middle}) rotate(-90)`;
  const metric = currentMetric();
  text({ transform: turned, "text-anchor": "middle" }, metric.label);
  const clip = `clip-${title.replace(/\W/g, "_")}-${Math.round(place.left)}-${Math.round(place.top)}`;
  const frame = { x: box.x[0], y: box.y[0], width: box.x[1] - box.x[0], height: box.y[1] - box.y[0] };
  const plot = element("g", { "clip-path": `url(#${clip})` });
  svg.append(element("clipPath", { id: clip }, element("rect", frame)), plot);
  const drawable = ([, value]) => !state.log || value > 0;
  for (const line of own) {
    const style = paint(groups[line.group]);
    const points = line.points.filter(drawable);
    const path = (pairs) => pairs.map(([px, py], i) => `${i ? "L" : "M"}${px.toFixed(1)} ${py.toFixed(1)}`).join("");
    if (line.band) {
      const floor = view.y[0];
      const edge = (index) => points.map((point) => [x(point[0]), y(state.log ? Math.max(point[index], floor) : point[index])]);
      plot.append(element("path", { class: `band ${line.split}`, style, d: `${path([...edge(3), ...edge(2).reverse()])}Z` }));
    }
    const d = path(points.map((point) => [x(point[0]), y(point[1])]));
    plot.append(element("path", { class: `line ${line.kind} ${line.split}`, style, d }));
    if (line.kind === "outside" && line.diverged) {
      const worst = box.y[metric.lowerIsBetter ? 0 : 1];
      const [step, value] = points.at(-1) ?? [line.start ?? 0, null];
      // A value beyond the axis has its cross at the edge.
      const [cx, cy] = [x(step), value === null ? worst : Math.min(Math.max(y(value), box.y[0]), box.y[1])];
      const cross = `M${cx - 4} ${cy - 4}l8 8m0 -8l-8 8`;
      svg.append(element("path", { class: "cross", style, d: cross }));
    }
  }
  const labels = named.map((each) => ({ ...each, y: Math.min(Math.max(y(each.end[1]), box.y[0]), box.y[1]) + 4 }));
  spread(labels, 15, [box.y[0] + 4, box.y[1] + 4]);
  for (const each of labels) {
    text({ class: "end", style: paint(groups[each.group]), x: box.x[1] + 7, y: each.y }, each.text);
  }
  return { title, own, box, x, y, view, scale };
}

// Returns a label for each setting of a panel, at the end of its mean or else of its longest run.
function endLabels(own) {
  const ends = new Map();
  const rank = (line) => (line.kind === "mean" ? 2 : 0) + (line.split === "test" ? 1 : 0);
  for (const line of [...own].sort((a, b) => rank(a) - rank(b))) {
    const end = line.points.findLast(([, value]) => !state.log || value > 0);
    if (end) ends.set(line.group, end);
  }
  if (ends.size > 12) return [];
  return [...ends].map(([group, end]) => ({ group, end, text: shorten(groups[group].label) }));
}

const shorten = (text) => (text.length > 28 ? `${text.slice(0, 27)}…` : text);

// Describes the chart for those who cannot see it.
function describe(lines) {
  const name = currentMetric().label;
  const ends = lines
    .filter((line) => line.kind === "mean")
    .slice(0, 12)
    .map((line) => `${groups[line.group].name}, ${data.splits[line.split] ?? "layers"}: ${label(line.points.at(-1)[1])}`);
  return `${name} against training steps. Means at the end: ${ends.join("; ") || "none"}.`;
}

// Returns the caption: what lines and bands are, and how many seeds they have.
function explain(lines) {
  const seeds = lines.filter((line) => line.kind === "mean").map((line) => line.seeds);
  const [fewest, most] = [Math.min(...seeds), Math.max(...seeds)];
  const parts = [];
  if (most === 1) parts.push("Lines are single runs.");
  else if (seeds.length) {
    const many = fewest < most ? `${fewest} to ${most}` : most;
    parts.push(`Lines are means over ${many} seeds, bands one sample standard deviation on either side.`);
  }
  const splits = splitsOfMetric();
  if (splits.length > 1) {
    const others = splits.filter((split) => split !== "test" && !state.hidden.has(split)).map((split) => data.splits[split]);
    if (!state.hidden.has("test") && splits.includes("test")) parts.push("Bold lines are test values.");
    if (others.length) parts.push(`Thin lines are ${others.join(" and ")} values.`);
  }
  if (currentMetric().kind === "Layers") {
    parts.push("Values are means over the layers of a part of the network; among parameters, over kernels.");
  }
  if (lines.some((line) => line.kind === "outside")) {
    parts.push("Dashed lines are single runs that no mean contains; a cross ends a run that diverged.");
  }
  if (state.single) parts.push("Faint lines are single runs.");
  if (state.smoothing) parts.push(`All lines are exponential moving averages with weight ${state.smoothing}.`);
  if (data.settings > groups.length) parts.push(`The first ${groups.length} of ${data.settings} settings are shown.`);
  if (state.single && data.all > data.runs.length) parts.push(`Of ${data.all} runs, ${data.runs.length} can be shown singly.`);
  return parts.join(" ");
}

// Shows the values of a panel at a step, in a box beside a vertical line.
function showCursor() {
  chart.querySelectorAll("#tip, .cursor").forEach((node) => node.remove());
  const plot = plots.find((each) => each.title === state.cursor?.panel);
  if (!plot) return;
  const [px, step] = [plot.x(state.cursor.step), state.cursor.step];
  chart.querySelector("svg").append(element("line", { class: "cursor", x1: px, x2: px, y1: plot.box.y[0], y2: plot.box.y[1] }));
  const rows = plot.own.flatMap((line) => {
    const point = line.points.find((each) => each[0] === step);
    if (!point || line.kind === "run") return [];
    const spreadText = line.band ? ` ± ${label(point[3] - point[1])}` : "";
    const name = line.kind === "mean" ? groups[line.group].label : line.name;
    return [{ value: point[1], group: line.group, text: `${name}, ${data.splits[line.split] ?? "layers"}: ${label(point[1])}${spreadText}` }];
  });
  rows.sort((a, b) => b.value - a.value);
  const tip = html("div", { id: "tip", role: "status" }, html("b", {}, `step ${step}`));
  for (const row of rows.slice(0, 14)) {
    const swatch = html("span", { className: "swatch" });
    swatch.style.cssText = paint(groups[row.group]);
    tip.append(html("div", {}, swatch, row.text));
  }
  chart.append(tip);
  const left = px + 12 + tip.offsetWidth > chart.clientWidth ? px - 12 - tip.offsetWidth : px + 12;
  tip.style.left = `${Math.min(Math.max(left, 0), Math.max(0, chart.clientWidth - tip.offsetWidth))}px`;
  tip.style.top = `${plot.box.y[0]}px`;
}

const stepsOf = (plot) => [...new Set(plot.own.flatMap((line) => line.points.map(([step]) => step)))].sort((a, b) => a - b);

function place(event) {
  const frame = chart.getBoundingClientRect();
  return [event.clientX - frame.left, event.clientY - frame.top];
}

const inside = (value, [low, high]) => value >= low && value <= high;
const plotAt = ([px, py]) => plots.find(({ box }) => inside(px, box.x) && inside(py, box.y));
let drag = null; // where a zoom began

chart.addEventListener("pointerdown", (event) => {
  const plot = plotAt(place(event));
  if (event.button !== 0 || !plot) return;
  drag = { plot, start: place(event), rect: element("rect", { class: "zoom" }) };
  chart.querySelector("svg").append(drag.rect);
  chart.setPointerCapture(event.pointerId);
});
chart.addEventListener("pointermove", (event) => {
  const now = place(event);
  if (drag) {
    const [from, to] = [0, 1].map((axis) => [drag.start[axis], now[axis]].sort((a, b) => a - b));
    const frame = { x: from[0], y: to[0], width: from[1] - from[0], height: to[1] - to[0] };
    for (const [name, value] of Object.entries(frame)) drag.rect.setAttribute(name, value);
    return;
  }
  const plot = plotAt(now);
  const found = plot && stepsOf(plot);
  state.cursor = found?.length
    ? { panel: plot.title, step: found.reduce((a, b) => (Math.abs(plot.x(b) - now[0]) < Math.abs(plot.x(a) - now[0]) ? b : a)) }
    : null;
  showCursor();
});
chart.addEventListener("pointerup", (event) => {
  if (!drag) return;
  const { plot, start, rect } = drag;
  const now = place(event);
  drag = null;
  rect.remove();
  // Dragging along one axis zooms that axis only.
  const range = (axis, name, value) => {
    const ends = [start[axis], now[axis]].map((at) => Math.min(Math.max(at, plot.box[name][0]), plot.box[name][1]));
    if (Math.abs(ends[1] - ends[0]) < 8) return plot.view[name];
    return ends.map(value).sort((a, b) => a - b);
  };
  const share = (at, [low, high]) => (at - low) / (high - low);
  const between = ([low, high], part) => low + part * (high - low);
  const zoom = {
    x: range(0, "x", (at) => between(plot.view.x, share(at, plot.box.x))),
    y: range(1, "y", (at) => {
      const value = between(plot.view.y.map(plot.scale), 1 - share(at, plot.box.y));
      return state.log ? 10 ** value : value;
    }),
  };
  if (zoom.x === plot.view.x && zoom.y === plot.view.y) return;
  state.zoom = zoom;
  draw();
});
chart.addEventListener("pointercancel", () => {
  drag?.rect.remove();
  drag = null;
});
chart.addEventListener("pointerleave", () => {
  state.cursor = null;
  showCursor();
});
chart.addEventListener("dblclick", () => change({ zoom: null }));
chart.addEventListener("keydown", (event) => {
  if (!plots.length || !event.key.startsWith("Arrow")) return;
  event.preventDefault();
  let index = Math.max(0, plots.findIndex((plot) => plot.title === state.cursor?.panel));
  if (event.key === "ArrowUp") index = Math.max(0, index - 1);
  if (event.key === "ArrowDown") index = Math.min(plots.length - 1, index + 1);
  const found = stepsOf(plots[index]);
  if (!found.length) return;
  const at = found.findLastIndex((step) => step <= (state.cursor?.step ?? -1));
  const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key] ?? 0;
  state.cursor = { panel: plots[index].title, step: found[Math.min(Math.max(at + move, 0), found.length - 1)] };
  showCursor();
});

function change(changes) {
  Object.assign(state, changes);
  draw();
}

function download(name, blob) {
  const link = html("a", { download: name, href: URL.createObjectURL(blob) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// Returns the chart as a drawing that needs no style sheet.
function drawing() {
  const svg = chart.querySelector("svg");
  const copy = svg.cloneNode(true);
  const looks = ["fill", "fill-opacity", "stroke", "stroke-width", "stroke-dasharray", "opacity", "font-size", "font-weight", "font-family"];
  const originals = svg.querySelectorAll("*");
  copy.querySelectorAll("*").forEach((node, i) => {
    const style = getComputedStyle(originals[i]);
    node.removeAttribute("class");
    node.setAttribute("style", looks.map((look) => `${look}: ${style.getPropertyValue(look)}`).join("; "));
  });
  const { width, height } = svg.getBoundingClientRect();
  copy.setAttribute("width", width);
  copy.setAttribute("height", height);
  copy.prepend(element("rect", { width: "100%", height: "100%", fill: getComputedStyle(document.body).backgroundColor }));
  return { text: new XMLSerializer().serializeToString(copy), width, height };
}

const fileName = (kind) => `${state.metric.replace(/\W+/g, "_")}.${kind}`;

function downloadSvg() {
  download(fileName("svg"), new Blob([drawing().text], { type: "image/svg+xml" }));
}

function downloadPng() {
  const { text, width, height } = drawing();
  const image = new Image();
  image.onload = () => {
    const canvas = html("canvas", { width: 3 * width, height: 3 * height });
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    canvas.toBlob((blob) => download(fileName("png"), blob), "image/png");
  };
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(text)}`;
}

function downloadCsv() {
  const quote = (text) => `"${String(text).replace(/^[=+\-@]/, "'$&").replaceAll('"', '""')}"`;
  const rows = ["line,run,split,step,value,deviation,seeds"];
  for (const line of visibleLines()) {
    for (const point of line.points) {
      const deviation = line.band ? point[3] - point[1] : "";
      const names = [groups[line.group].name, line.name ?? "", line.split].map(quote);
      rows.push([...names, point[0], point[1], deviation, line.seeds ?? ""].join(","));
    }
  }
  download(fileName("csv"), new Blob([`${rows.join("\n")}\n`], { type: "text/csv" }));
}

function box(text, checked, onChange, group) {
  const input = html("input", { type: "checkbox", checked });
  input.addEventListener("change", () => onChange(input.checked));
  const line = html("label", {}, input);
  if (group) {
    line.style.cssText = paint(group);
    line.append(html("span", { className: "swatch" }));
  }
  line.append(text);
  return line;
}

const fieldset = (name, ...nodes) => html("fieldset", {}, html("legend", {}, name), ...nodes);
const toggle = (key) => (checked) => {
  state.hidden[checked ? "delete" : "add"](key);
  draw();
};

const select = html("select", { id: "metric" });
for (const kind of new Set(metrics.map((metric) => metric.kind))) {
  const options = metrics.filter((metric) => metric.kind === kind).map((metric) => new Option(metric.label, metric.key));
  select.append(html("optgroup", { label: kind }, ...options));
}
const splitBoxes = html("fieldset", {});
function offerSplits() {
  const boxes = splitsOfMetric().map((split) => box(data.splits[split], !state.hidden.has(split), toggle(split)));
  splitBoxes.replaceChildren(html("legend", {}, "Data"), ...boxes);
  splitBoxes.hidden = boxes.length < 2;
}
select.addEventListener("change", () => {
  change({ metric: select.value, zoom: null, cursor: null });
  offerSplits();
});
const slider = html("input", { type: "range", id: "smoothing", min: 0, max: 0.95, step: 0.05, value: 0 });
slider.addEventListener("input", () => change({ smoothing: Number(slider.value) }));
const log = box("Log scale", false, (checked) => change({ log: checked, zoom: null }));
log.firstChild.id = "log";
const single = box("Single runs", false, (checked) => change({ single: checked }));
single.firstChild.id = "single";
const button = (text, action) => {
  const node = html("button", { type: "button" }, text);
  node.addEventListener("click", action);
  return node;
};

if (metrics.length) {
  // As in the figures: the whole training split where it was evaluated.
  if (data.means.concat(data.curves).some((line) => line.split === "train_set")) state.hidden.add("train");
  offerSplits();
  controls.append(
    html("div", {}, html("label", {}, "Metric ", select), log, html("label", {}, "Smoothing ", slider), single),
    splitBoxes,
    fieldset("Lines", ...groups.map((group, index) => box(group.name, true, toggle(index), group))),
    html("div", {}, button("Reset zoom", () => change({ zoom: null })), button("PNG", downloadPng), button("SVG", downloadSvg), button("CSV", downloadCsv)),
  );
  new ResizeObserver(draw).observe(chart);
} else {
  caption.textContent = "No run has measured anything yet.";
}
