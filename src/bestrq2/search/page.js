// Map, lists and player of `bestrq2 explore`; gradio gives `element`, `props`, `trigger` and `watch`.
const canvas = element.querySelector("canvas"), context = canvas.getContext("2d");
const [tip, legend, player] = [".tip", ".legend", ".player"].map((name) => element.querySelector(name));
const audio = player.querySelector("audio"), now = player.querySelector(".now");
const LIGHT = ["#0067a5", "#c8500a", "#7d4aa8", "#00735e", "#a8326e", "#a07c00", "#8b4a2b", "#4d9de0", "#5f7f1f", "#d1495b", "#3d3a8c", "#2a9d8f"];
const DARK = ["#56b4e9", "#f28e4f", "#c59cec", "#42c6a5", "#ee86b8", "#dcc04e", "#c98f6b", "#8f9df0", "#a9c95c", "#ff8f9c", "#b3b0ff", "#7fe0d4"];
// `places` are pixels of the canvas, x and y in turn; `box` is the part of the map that it shows.
let points, places, groups, names = [], chosen = null, box = [0, 0, 1, 1], lasso = null;

const dark = () => document.body.classList.contains("dark");
const grey = () => (dark() ? "#767d88" : "#9aa1aa");
const colour = (group) => (names[group] === "none" ? null : (dark() ? DARK : LIGHT)[group]) ?? grey();
const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const numbers = (text) => new Uint16Array(bytes(text).buffer);

function read() {
  points = numbers(props.value.points);
  groups = numbers(props.value.groups);
  names = props.value.names;
  chosen = null;
  fillLegend();
  redraw();
}

function fillLegend() {
  const counts = new Uint32Array(names.length);
  for (const group of groups) counts[group]++;
  legend.replaceChildren(...names.map((name, group) => {
    const entry = document.createElement("button"), count = document.createElement("small");
    const key = document.createElement("i");
    key.style.background = colour(group);
    count.textContent = counts[group].toLocaleString("en");
    entry.append(key, name, count);
    entry.title = `Select all ${count.textContent}`;
    entry.addEventListener("click", () => choose((row) => groups[row] === group));
    return entry;
  }));
}

// Drawing: discs are mixed into the pixels, which takes 27 ms for 10,000 points and 0.4 s for a million.

function layOut() {
  const ratio = devicePixelRatio, margin = 14 * ratio, [left, top, right, bottom] = box.map((side) => side * 65535);
  canvas.width = Math.round(canvas.clientWidth * ratio);
  canvas.height = Math.round(canvas.clientHeight * ratio);
  const across = (canvas.width - 2 * margin) / (right - left), down = (canvas.height - 2 * margin) / (bottom - top);
  places = new Float32Array(points.length);
  for (let i = 0; i < points.length; i += 2) {
    places[i] = margin + (points[i] - left) * across;
    places[i + 1] = margin + (points[i + 1] - top) * down;
  }
}

function draw() {
  if (!points || !canvas.clientWidth) return;
  layOut();
  const { width, height } = canvas, count = groups.length, shown = (box[2] - box[0]) * (box[3] - box[1]);
  const image = context.createImageData(width, height), pixels = image.data;
  const radius = devicePixelRatio * Math.min(5, Math.max(0.8, canvas.clientWidth / 3 / Math.sqrt(count * shown + 1)));
  const disc = [], reach = Math.ceil(radius);
  for (let y = -reach; y <= reach; y++) {
    for (let x = -reach; x <= reach; x++) {
      const cover = Math.min(1, Math.max(0, radius + 0.5 - Math.hypot(x, y)));
      if (cover) disc.push([x, y, 0.85 * cover]);
    }
  }
  const palette = names.map((_, group) => colour(group).match(/\w\w/g).map((part) => parseInt(part, 16)));
  function splat(row, opacity) {
    const px = Math.round(places[2 * row]), py = Math.round(places[2 * row + 1]), ink = palette[groups[row]];
    if (px < reach || py < reach || px >= width - reach || py >= height - reach) return;
    for (const [x, y, cover] of disc) {
      const at = 4 * ((py + y) * width + px + x), over = cover * opacity, under = pixels[at + 3] / 255 * (1 - over);
      const both = over + under;
      pixels[at] = (ink[0] * over + pixels[at] * under) / both;
      pixels[at + 1] = (ink[1] * over + pixels[at + 1] * under) / both;
      pixels[at + 2] = (ink[2] * over + pixels[at + 2] * under) / both;
      pixels[at + 3] = 255 * both;
    }
  }
  // Steps of a prime that does not divide the count visit every row and mix the groups, so that none covers the others.
  const step = [104729, 7919].find((prime) => count % prime) ?? 1;
  for (let k = 0, row = 0; k < count; k++, row = (row + step) % count) {
    if (!chosen || !chosen[row]) splat(row, chosen ? 0.12 : 1);
  }
  if (chosen) for (let row = 0; row < count; row++) if (chosen[row]) splat(row, 1);
  context.putImageData(image, 0, 0);
  context.strokeStyle = getComputedStyle(canvas).color;
  context.lineWidth = 2 * devicePixelRatio;
  for (const row of marked()) {
    context.beginPath();
    context.arc(places[2 * row], places[2 * row + 1], radius + 4 * devicePixelRatio, 0, 7);
    context.stroke();
  }
  if (lasso) {
    context.setLineDash([6, 5]);
    context.beginPath();
    for (const point of lasso) context.lineTo(...point);
    context.closePath();
    context.stroke();
  }
}

let waiting = false;
function redraw() {
  if (!waiting) requestAnimationFrame(() => { waiting = false; draw(); });
  waiting = true;
}

// Selection

/** Rows that the open list shows. */
const listed = () => [...document.querySelectorAll(".ringed")].filter((list) => list.offsetParent)
  .flatMap((list) => [...list.querySelectorAll("[data-play]")].map((button) => Number(button.dataset.play)));
let ringed = [];
function marked() {
  return audio.dataset.row ? [...ringed, Number(audio.dataset.row)] : ringed;
}

function choose(test) {
  const bits = new Uint8Array(Math.ceil(groups.length / 8));
  chosen = new Uint8Array(groups.length);
  let some = false;
  for (let row = 0; row < groups.length; row++) {
    if (!test(row)) continue;
    some = chosen[row] = 1;
    bits[row >> 3] |= 1 << (row & 7);
  }
  if (!some) chosen = null;
  ringed = [];
  redraw();
  // In pieces: arguments of a call are limited.
  let text = "";
  for (let at = 0; at < bits.length; at += 4096) text += String.fromCharCode(...bits.subarray(at, at + 4096));
  trigger("select", { rows: btoa(text) });
}

function isInside(x, y, polygon) {
  let inside = false;
  for (let i = 0, j = polygon.length - 1; i < polygon.length; j = i++) {
    const [ax, ay] = polygon[i], [bx, by] = polygon[j];
    if ((ay > y) !== (by > y) && x < (bx - ax) * (y - ay) / (by - ay) + ax) inside = !inside;
  }
  return inside;
}

function nearest([x, y]) {
  let best = -1, least = (12 * devicePixelRatio) ** 2;
  for (let row = 0; row < groups.length; row++) {
    const far = (places[2 * row] - x) ** 2 + (places[2 * row + 1] - y) ** 2;
    if (far < least) [least, best] = [far, row];
  }
  return best;
}

function pixel(event) {
  const frame = canvas.getBoundingClientRect();
  return [(event.clientX - frame.left) * devicePixelRatio, (event.clientY - frame.top) * devicePixelRatio];
}

canvas.addEventListener("pointerdown", (event) => {
  if (event.button) return;
  canvas.setPointerCapture(event.pointerId);
  tip.hidden = true;
  lasso = [pixel(event)];
});
canvas.addEventListener("pointermove", (event) => {
  if (lasso) { lasso.push(pixel(event)); redraw(); } else name(event);
});
canvas.addEventListener("pointercancel", () => { lasso = null; redraw(); });
canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
canvas.addEventListener("pointerup", () => {
  const path = lasso;
  lasso = null;
  redraw();
  if (!path) return;
  const [[x, y]] = path;
  if (path.some(([a, b]) => Math.hypot(a - x, b - y) > 6 * devicePixelRatio)) {
    choose((row) => isInside(places[2 * row], places[2 * row + 1], path));
  } else {
    const row = nearest(path[0]);
    if (row < 0) return;
    play(row);
    trigger("like", { row });
  }
});

let hovered = -1;
async function name(event) {
  const row = nearest(pixel(event));
  if (row === hovered && !tip.hidden) return;
  hovered = row;
  tip.hidden = true;
  if (row < 0) return;
  const { title } = await describe(row);
  if (row !== hovered || lasso) return;
  tip.textContent = title;
  tip.hidden = false;
  const x = places[2 * row] / devicePixelRatio, y = places[2 * row + 1] / devicePixelRatio;
  tip.style.left = `${Math.max(0, Math.min(x + 10, canvas.clientWidth - tip.offsetWidth))}px`;
  tip.style.top = `${y + 14}px`;
}

const described = new Map();
async function describe(row) {
  if (!described.has(row)) described.set(row, await (await fetch(`sounds/${row}/name`)).json());
  return described.get(row);
}

// Sound: one player for the page; a list is played one after another.

let queue = [];
async function play(row, start = 0) {
  const address = `sounds/${row}?start=${start}`, wasPlaying = !audio.paused && audio.dataset.address === address;
  audio.pause();
  if (wasPlaying) return;
  Object.assign(audio.dataset, { row, address });
  player.hidden = false;
  redraw();
  for (const button of document.querySelectorAll("[data-play]")) {
    button.classList.toggle("playing", button.dataset.play === String(row) && Number(button.dataset.start) === start);
  }
  const { title } = await describe(row);
  now.textContent = start ? `${title}, from ${start.toFixed(1)} s` : title;
  const answer = await fetch(address);
  if (audio.dataset.address !== address) return;
  if (!answer.ok) { now.textContent = await answer.text(); return next(); }
  URL.revokeObjectURL(audio.src);
  audio.src = URL.createObjectURL(await answer.blob());
  audio.play().catch(() => {});
}
function next() {
  const following = queue.shift();
  if (following) play(...following);
}
audio.addEventListener("ended", next);
player.querySelector(".next").addEventListener("click", next);
player.querySelector(".close").addEventListener("click", () => {
  queue = [];
  audio.pause();
  delete audio.dataset.row;
  player.hidden = true;
  redraw();
});

document.addEventListener("click", (event) => {
  const button = event.target.closest(".sounds button");
  if (!button) return;
  const list = [...button.closest(".sounds").querySelectorAll("[data-play]")];
  const sounds = list.map((one) => [Number(one.dataset.play), Number(one.dataset.start)]);
  if (button.dataset.play) { queue = []; play(Number(button.dataset.play), Number(button.dataset.start)); }
  if (button.dataset.like) trigger("like", { row: Number(button.dataset.like) });
  if (button.dataset.all === "play") { queue = sounds; next(); }
  if (button.dataset.all === "choose" || button.dataset.rows) {
    const rows = new Set(button.dataset.rows?.split(" ").map(Number) ?? sounds.map(([row]) => row));
    choose((row) => rows.has(row));
  }
});

// View

element.querySelector(".view").addEventListener("click", (event) => {
  const action = event.target.dataset.view;
  if (action === "none") choose(() => false);
  if (action === "whole") box = [0, 0, 1, 1];
  if (action === "zoom" && chosen) {
    const sides = [1, 1, 0, 0];
    for (let row = 0; row < groups.length; row++) {
      if (!chosen[row]) continue;
      const x = points[2 * row] / 65535, y = points[2 * row + 1] / 65535;
      sides[0] = Math.min(sides[0], x); sides[1] = Math.min(sides[1], y);
      sides[2] = Math.max(sides[2], x); sides[3] = Math.max(sides[3], y);
    }
    const spare = 0.02 * (sides[2] - sides[0] + sides[3] - sides[1]) + 0.001;
    box = [sides[0] - spare, sides[1] - spare, sides[2] + spare, sides[3] + spare];
  }
  redraw();
});

new ResizeObserver(redraw).observe(canvas);
new MutationObserver(() => { fillLegend(); redraw(); }).observe(document.body, { attributeFilter: ["class"] });
// Lists are filled, and tabs opened, by gradio; the map rings what is listed.
new MutationObserver(() => {
  const rows = listed();
  if (String(rows) === String(ringed)) return;
  ringed = rows;
  redraw();
}).observe(element.closest(".gradio-container"), { childList: true, subtree: true, attributeFilter: ["style", "class"] });
watch("value", read);
read();
