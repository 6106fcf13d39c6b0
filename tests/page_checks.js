// Returns what is wrong with the page: one text per fault.
const faults = [];
const add = (text, node) => faults.push(`${text}: ${(node?.textContent || node?.outerHTML || "").trim().slice(0, 60)}`);
document.querySelectorAll("details").forEach((node) => (node.open = true));
document.getAnimations().forEach((animation) => animation.finish());

if (!document.documentElement.lang) add("no language");
const room = document.documentElement;
if (room.scrollWidth > room.clientWidth) add(`horizontal overflow, ${room.scrollWidth} pixels`);

let level = 0;
for (const heading of document.querySelectorAll("h1, h2, h3, h4, h5, h6")) {
  const next = Number(heading.tagName[1]);
  if (next > level + 1) add(`heading ${next} after ${level}`, heading);
  level = next;
}
if (document.querySelectorAll("h1").length !== 1) add("not one h1");

const name = (node) => node.textContent.trim() || node.title || node.getAttribute("aria-label") || node.querySelector("img")?.alt;
for (const image of document.querySelectorAll("img, svg")) {
  const named = image.getAttribute("alt") || image.getAttribute("aria-label");
  const icon = image.tagName === "svg" && image.closest("a, button, label");
  if (!named && !icon && !image.closest("[aria-hidden=true]") && !image.parentElement.closest("svg")) add("no alt text", image);
}
for (const input of document.querySelectorAll("input, select, button, a[href]")) {
  if (input.checkVisibility() && !name(input) && !input.labels?.length) add("control without a name", input);
}
for (const link of document.querySelectorAll("p a[href]")) {
  const alone = link.textContent.trim() === link.closest("p").textContent.trim();
  const marked = getComputedStyle(link).textDecorationLine.includes("underline");
  if (link.checkVisibility() && !alone && !marked) add("link known by its color alone", link);
}
for (const frame of document.querySelectorAll("iframe")) {
  if (frame.checkVisibility() && !frame.title) add("frame without a title", frame);
}
for (const node of document.querySelectorAll("*")) {
  const scrolls = getComputedStyle(node).overflowX === "auto" && node.scrollWidth > node.clientWidth + 1;
  if (scrolls && node.tabIndex < 0 && !node.querySelector("input, button, a")) add("no key scrolls this", node);
}

// A color as red, green, blue and alpha, each between 0 and 1.
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
function channels(color) {
  canvas.clearRect(0, 0, 1, 1);
  canvas.fillStyle = color;
  canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data].map((value) => value / 255);
}
function luminance([red, green, blue]) {
  const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * linear(red) + 0.7152 * linear(green) + 0.0722 * linear(blue);
}
const blend = (above, below) => below.map((value, i) => (i < 3 ? above[3] * above[i] + (1 - above[3]) * value : 1));
function background(node) {
  if (!node) return [1, 1, 1, 1];
  const color = channels(getComputedStyle(node).backgroundColor);
  return color[3] > 0.99 ? color : blend(color, background(node.parentElement));
}
function opacity(node) {
  return node ? Number(getComputedStyle(node).opacity) * opacity(node.parentElement) : 1;
}
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
const seen = new Set();
while (walker.nextNode()) {
  const node = walker.currentNode.parentElement;
  const skipped = !walker.currentNode.data.trim() || ["SCRIPT", "STYLE", "NOSCRIPT", "OPTION"].includes(node.tagName);
  if (skipped || !node.checkVisibility({ opacityProperty: true, visibilityProperty: true }) || seen.has(node)) continue;
  seen.add(node);
  const style = getComputedStyle(node);
  const [below, above] = [background(node), channels(node.closest("svg") ? style.fill : style.color)];
  above[3] *= opacity(node);
  const color = blend(above, below);
  const [low, high] = [luminance(color), luminance(below)].sort((a, b) => a - b);
  const ratio = (high + 0.05) / (low + 0.05);
  if (ratio < 4.49) add(`contrast ${ratio.toFixed(2)}`, node);
  const svg = node.closest("svg");
  const scale = svg?.viewBox.baseVal.width ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
  const size = parseFloat(style.fontSize) * scale;
  const superscript = node.tagName === "tspan"; // of a power of ten
  if (size < (superscript ? 7 : 8.5)) add(`letters of ${size.toFixed(1)} pixels`, node);
}
return faults;
