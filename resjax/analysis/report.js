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

// Draws the primary metric of each run in a chart that zooms, hides lines and shows values.
const { groups, metrics, steps, runs } = JSON.parse(document.getElementById("data").textContent);
const chart = document.getElementById("chart");
const controls = document.getElementById("controls");
const margin = { left: 48, right: 12, top: 10, bottom: 40 };
const height = 420;
const hidden = new Set();
const lines = runs.flatMap((run) =>
  ["train", "test"].map((split) => ({
    split,
    group: run.group,
    metric: run.metric,
    name: run.name,
    points: steps[run[split].steps]
      .map((step, i) => [step, run[split].values[i]])
      .filter(([, value]) => value !== null),
  })),
);
let [metric] = Object.keys(metrics);
let view = full();

// Returns the limits that show all lines of the metric; the axes include zero.
function full() {
  const points = lines.filter((line) => line.metric === metric).flatMap((line) => line.points);
  const limits = (axis) => {
    const values = points.map((point) => point[axis]).concat(0);
    const [low, high] = [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
    return low < high ? [low, high] : [0, 1]; // an axis needs an extent
  };
  return { x: limits(0), y: limits(1) };
}

function element(name, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function ticks([low, high], count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const places = [];
  for (let i = Math.ceil(low / step); i * step <= high; i++) places.push(i * step);
  return places;
}

const label = (value) => String(Number(value.toPrecision(6)));
const visible = (line) => line.metric === metric && !hidden.has(line.split) && !hidden.has(line.group);

function draw() {
  const width = chart.clientWidth;
  const right = width - margin.right;
  const bottom = height - margin.bottom;
  const x = (step) => margin.left + ((step - view.x[0]) / (view.x[1] - view.x[0])) * (right - margin.left);
  const y = (value) => bottom - ((value - view.y[0]) / (view.y[1] - view.y[0])) * (bottom - margin.top);
  const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, height });
  svg.append(
    element(
      "clipPath",
      { id: "plot" },
      element("rect", { x: margin.left, y: margin.top, width: right - margin.left, height: bottom - margin.top }),
    ),
  );
  for (const value of ticks(view.y, 6)) {
    svg.append(element("line", { class: "grid", x1: margin.left, x2: right, y1: y(value), y2: y(value) }));
    svg.append(element("text", { x: margin.left - 8, y: y(value) + 4, "text-anchor": "end" }, label(value)));
  }
  for (const step of ticks(view.x, Math.max(2, width / 120))) {
    svg.append(element("text", { x: x(step), y: bottom + 18, "text-anchor": "middle" }, label(step)));
  }
  const middle = (margin.left + right) / 2;
  svg.append(element("text", { x: middle, y: height - 4, "text-anchor": "middle" }, "training steps"));
  const centre = (margin.top + bottom) / 2;
  svg.append(
    element(
      "text",
      { transform: `translate(12 ${centre}) rotate(-90)`, "text-anchor": "middle" },
      metrics[metric],
    ),
  );
  const plot = element("g", { "clip-path": "url(#plot)" });
  const drawn = lines.filter(visible).map((line) => {
    const places = line.points.map(([step, value]) => [x(step), y(value)]);
    const path = element("path", {
      class: `series ${line.split}`,
      style: `--color: ${groups[line.group].color}`,
      d: places.map(([px, py], i) => `${i ? "L" : "M"}${px.toFixed(1)} ${py.toFixed(1)}`).join(""),
    });
    plot.append(path);
    return { line, places, path };
  });
  svg.append(plot);
  chart.replaceChildren(svg);
  listen(svg, plot, drawn, { x: [margin.left, right], y: [margin.top, bottom] });
}

function listen(svg, plot, drawn, box) {
  const clamp = (value, [low, high]) => Math.min(Math.max(value, low), high);
  const place = (event) => {
    const frame = svg.getBoundingClientRect();
    return [clamp(event.clientX - frame.left, box.x), clamp(event.clientY - frame.top, box.y)];
  };
  const within = (px, py) => px >= box.x[0] && px <= box.x[1] && py >= box.y[0] && py <= box.y[1];
  let start = null;
  let frame = null;

  function nearest([px, py]) {
    let best = { distance: 30 };
    for (const line of drawn) {
      line.places.forEach(([qx, qy], i) => {
        const distance = Math.hypot(px - qx, py - qy);
        if (distance < best.distance && within(qx, qy)) best = { ...line, i, distance };
      });
    }
    return best.line ? best : null;
  }

  function clear() {
    chart.classList.remove("picking");
    chart.querySelectorAll("#tip, circle").forEach((node) => node.remove());
    chart.querySelectorAll(".picked").forEach((node) => node.classList.remove("picked"));
  }

  function show(found) {
    clear();
    if (!found) return;
    const { line, places, path, i } = found;
    const [px, py] = places[i];
    const [step, value] = line.points[i];
    chart.classList.add("picking");
    path.classList.add("picked");
    const color = `--color: ${groups[line.group].color}`;
    plot.append(element("circle", { class: "series", style: color, cx: px, cy: py, r: 4.5 }));
    const tip = document.createElement("div");
    tip.id = "tip";
    const split = line.split === "train" ? "training" : "test";
    tip.innerText = `${line.name}\n${split} ${metrics[metric]}: ${label(value)} at step ${step}`;
    chart.append(tip);
    const left = px + 12 + tip.offsetWidth > chart.clientWidth ? px - 12 - tip.offsetWidth : px + 12;
    tip.style.left = `${Math.max(left, 0)}px`;
    tip.style.top = `${Math.max(py - 12 - tip.offsetHeight, 0)}px`;
  }

  svg.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    clear();
    start = place(event);
    frame = element("rect", { class: "zoom" });
    svg.append(frame);
    svg.setPointerCapture(event.pointerId);
  });
  svg.addEventListener("pointermove", (event) => {
    const now = place(event);
    if (!start) return show(nearest(now));
    const [low, high] = [0, 1].map((axis) => [start[axis], now[axis]].sort((a, b) => a - b));
    for (const [name, value] of Object.entries({
      x: low[0],
      y: high[0],
      width: low[1] - low[0],
      height: high[1] - high[0],
    }))
      frame.setAttribute(name, value);
  });
  svg.addEventListener("pointerup", (event) => {
    if (!start) return;
    const now = place(event);
    const range = (axis, name, reversed) => {
      const [low, high] = [start[axis], now[axis]].sort((a, b) => a - b);
      // Dragging along one axis zooms that axis only.
      if (high - low < 8) return null;
      const [from, to] = box[name];
      const value = (at) => {
        const share = reversed ? (to - at) / (to - from) : (at - from) / (to - from);
        return view[name][0] + share * (view[name][1] - view[name][0]);
      };
      return reversed ? [value(high), value(low)] : [value(low), value(high)];
    };
    const zoomed = { x: range(0, "x", false), y: range(1, "y", true) };
    start = null;
    frame.remove();
    if (!zoomed.x && !zoomed.y) return;
    view = { x: zoomed.x ?? view.x, y: zoomed.y ?? view.y };
    draw();
  });
  svg.addEventListener("pointercancel", () => {
    start = null;
    frame?.remove();
  });
  svg.addEventListener("pointerleave", clear);
  svg.addEventListener("dblclick", reset);
}

function reset() {
  view = full();
  draw();
}

function toggle(key, text, color) {
  const box = document.createElement("input");
  box.type = "checkbox";
  box.checked = true;
  box.addEventListener("change", () => {
    if (box.checked) hidden.delete(key);
    else hidden.add(key);
    draw();
  });
  const line = document.createElement("label");
  line.append(box);
  if (color) {
    line.className = "series";
    line.style.setProperty("--color", color);
    const swatch = document.createElement("span");
    swatch.className = "swatch";
    line.append(swatch);
  }
  line.append(text);
  return line;
}

function choices(name, ...boxes) {
  const set = document.createElement("fieldset");
  const legend = document.createElement("legend");
  legend.append(name);
  set.append(legend, ...boxes);
  return set;
}

const zoom = document.createElement("button");
zoom.type = "button";
zoom.append("Reset zoom");
zoom.addEventListener("click", reset);
if (Object.keys(metrics).length > 1) {
  const select = document.createElement("select");
  select.append(...Object.entries(metrics).map(([name, text]) => new Option(text, name)));
  select.addEventListener("change", () => {
    metric = select.value;
    reset();
  });
  controls.append(choices("Metric", select));
}
controls.append(
  choices("Splits", toggle("test", "test"), toggle("train", "training")),
  choices("Runs", ...groups.map((group, index) => toggle(index, group.name, group.color))),
  zoom,
);
new ResizeObserver(draw).observe(chart);
