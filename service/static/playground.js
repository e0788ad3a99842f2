"use strict";
const $ = id => document.getElementById(id);
const pad = $("draw").getContext("2d", { willReadFrequently: true });
let models = [], current = null, turn = 0;

// A server with API keys asks for one; the page does not store it.
const withKey = headers => $("key").value ? { ...headers, "X-API-Key": $("key").value.trim() } : headers;
const model = () => models.find(m => m.name === $("model").value);
// Certified values are rounded down for display: a proof of 2.366 is no proof of 2.37.
const down = (value, digits = 3) => {
  if (!(value > 0)) return "0";
  const unit = 10 ** (Math.floor(Math.log10(value)) + 1 - digits);
  let rounded = Number((Math.floor(value / unit) * unit).toPrecision(digits));
  if (rounded > value) rounded = Number((rounded - unit).toPrecision(digits));
  return rounded.toString();
};
const number = (value, digits = 3) => value === null ? "not finite" : Number(value.toPrecision(digits)).toString();

// ---- the request: {body, type, resize, picture, say}; `picture` is a canvas with the pixels of `body`

function canvasOf(width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = width; canvas.height = height;
  return canvas;
}

// The npy format, version 1.0: magic, header length, a Python literal padded to 64 bytes, then the values.
function npy(values, shape) {
  let header = `{'descr': '|u1', 'fortran_order': False, 'shape': (${shape.join(", ")}), }`;
  header = header.padEnd(Math.ceil((header.length + 11) / 64) * 64 - 11) + "\n";
  const bytes = new Uint8Array(10 + header.length + values.length);
  bytes.set([0x93, 0x4e, 0x55, 0x4d, 0x50, 0x59, 1, 0, header.length & 255, header.length >> 8]);
  bytes.set(new TextEncoder().encode(header), 10);
  bytes.set(values, 10 + header.length);
  return bytes;
}

// A canvas of the model's size as an array with the model's channels: browsers encode PNG with alpha, which is refused.
function arrayOf(canvas, say) {
  const { channels } = model().input;
  const rgba = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  const count = canvas.width * canvas.height;
  const values = new Uint8Array(count * channels);
  for (let i = 0; i < count; i++) {
    const [r, g, b] = rgba.subarray(4 * i, 4 * i + 3);
    if (channels === 1) values[i] = Math.round(0.299 * r + 0.587 * g + 0.114 * b);
    else values.set([r, g, b], 3 * i);
  }
  const shape = channels === 1 ? [canvas.height, canvas.width] : [canvas.height, canvas.width, channels];
  return { body: npy(values, shape), type: "application/x-npy", resize: false, picture: canvas, say };
}

// A drawing, placed as the digits of MNIST are: 20 pixels high in 28, the centre of mass in the middle.
function drawing() {
  const { height, width } = model().input;
  const size = pad.canvas.width, data = pad.getImageData(0, 0, size, size).data;
  let left = size, top = size, right = -1, bottom = -1, mass = 0, sumX = 0, sumY = 0;
  for (let y = 0; y < size; y++) for (let x = 0; x < size; x++) {
    const value = data[4 * (y * size + x)];
    if (value < 20) continue;
    left = Math.min(left, x); right = Math.max(right, x); top = Math.min(top, y); bottom = Math.max(bottom, y);
    mass += value; sumX += value * x; sumY += value * y;
  }
  const canvas = canvasOf(width, height), context = canvas.getContext("2d");
  context.fillRect(0, 0, width, height);
  if (mass) {
    const scale = 20 / 28 * Math.min(width, height) / Math.max(right - left + 1, bottom - top + 1);
    context.imageSmoothingQuality = "high";
    context.setTransform(scale, 0, 0, scale, width / 2 - sumX / mass * scale, height / 2 - sumY / mass * scale);
    context.drawImage(pad.canvas, 0, 0);
  }
  return arrayOf(canvas, "Your drawing, centred and scaled like the digits of MNIST.");
}

async function fileSource(file) {
  const source = { body: file, type: file.type || "image/png", resize: false, picture: null, say: file.name };
  try {
    const bitmap = await createImageBitmap(file);
    const canvas = canvasOf(bitmap.width, bitmap.height);
    canvas.getContext("2d").drawImage(bitmap, 0, 0);
    const { height, width } = model().input;
    source.picture = canvas;
    source.resize = bitmap.width !== width || bitmap.height !== height;
    if (source.resize) source.say += `: ${bitmap.width} x ${bitmap.height}, resized by the server; the radius refers to this file`;
    show(canvas);
  } catch { /* not an image for the browser either: the answer of the server states the reason */ }
  return source;
}

function show(canvas) {
  const size = pad.canvas.width, scale = size / Math.max(canvas.width, canvas.height);
  pad.fillStyle = "#000"; pad.fillRect(0, 0, size, size);
  pad.imageSmoothingEnabled = scale < 1;
  pad.drawImage(canvas, (size - canvas.width * scale) / 2, (size - canvas.height * scale) / 2, canvas.width * scale, canvas.height * scale);
  pad.imageSmoothingEnabled = true;
}

async function choose(file) { current = await fileSource(file); await ask(); }

async function sample(url) {
  const response = await fetch(url);
  const blob = await response.blob();
  await choose(new File([blob], url.split("/").pop(), { type: blob.type }));
}

function fitted() {
  const { height, width } = model().input, canvas = canvasOf(width, height), from = current.picture;
  const context = canvas.getContext("2d");
  context.fillRect(0, 0, width, height);
  const scale = Math.min(width / from.width, height / from.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(from, (width - from.width * scale) / 2, (height - from.height * scale) / 2, from.width * scale, from.height * scale);
  return arrayOf(canvas, "Fitted in the browser: the radius refers to the fitted image.");
}

// ---- the request and its answer

async function ask() {
  if (!current || !model()) return;
  const mine = ++turn, asked = current;
  $("source").textContent = asked.say;
  $("answer").classList.add("busy");
  const query = new URLSearchParams({ model: model().name, counterfactual: "true", proof: $("proof").value });
  if ($("target").value) query.set("target", $("target").value);
  if (asked.resize) query.set("resize", "true");
  let answer, failure = null;
  try {
    const response = await fetch(`predict?${query}`, { method: "POST", headers: withKey({ "Content-Type": asked.type }), body: asked.body });
    answer = await response.json();
    if (!response.ok) failure = answer.detail || response.statusText;
    askForKey(response);
  } catch (error) { failure = `The server does not respond (${error.message}).`; }
  if (mine !== turn) return;
  $("answer").classList.remove("busy");
  say(failure);
  if (failure) {
    const fixable = /:(channels|image-format|image-size|image-too-large|body-too-large)$/.test(answer?.type ?? "");
    $("problem").lastElementChild.hidden = !fixable || !asked.picture || ![1, 3].includes(model().input.channels);
    return;
  }
  await render(answer, asked);
}

function say(failure) {
  $("problem").hidden = !failure;
  $("result").hidden = !!failure;
  $("problem").firstElementChild.textContent = failure ?? "";
  $("problem").lastElementChild.hidden = true;
}

function askForKey(response) {
  if (response.status === 401 || response.status === 403) $("key-field").hidden = false;
}

async function render(answer, asked) {
  const { certificate, counterfactual } = answer;
  $("label").textContent = answer.label;
  const { shape, conversion } = answer.image;
  const values = shape[0] * shape[1] * shape[2];
  $("claim").className = certificate.certified ? "" : "none";
  $("claim").innerHTML = certificate.certified
    ? `<b>Certified:</b> no change with an L2 norm below <b>${down(certificate.radius)}</b> changes this class; that is
       ${down(certificate.radius_255 / Math.sqrt(values), 2)} grey levels on every pixel at once.${certificate.references.length
         ? ` Proved at ${certificate.references.length} reference image${certificate.references.length > 1 ? "s" : ""}.` : ""}`
    : "<b>Nothing is certified</b> for this image: two classes are too close.";
  $("json").textContent = JSON.stringify(answer, (key, value) => key === "image" && typeof value === "string" ? `${value.slice(0, 24)}... (${value.length} characters)` : value, 2);
  drawScale(certificate.radius, counterfactual);
  drawLogits(answer);

  const converted = { rgb_to_grey: "; converted to grey for the model, and the certificate refers to these colours",
    grey_to_rgb: "; converted to RGB for the model, and the certificate refers to these greys" }[conversion] ?? "";
  $("original-caption").textContent = `Image as sent${converted}`;
  copy(asked.picture, $("original"), shape[0] === 1);
  const bitmap = await createImageBitmap(blobOf(counterfactual.image));
  const picture = canvasOf(bitmap.width, bitmap.height);
  picture.getContext("2d").drawImage(bitmap, 0, 0);
  copy(picture, $("found"), false);
  $("found-caption").replaceChildren(counterfactual.reached ? "Counterfactual, classified as " : "Target not reached; the best image found is classified as ", bold(counterfactual.label));
  const strongest = drawDifference($("original"), $("found"), $("difference"));
  $("difference-caption").textContent = `Difference: red added, blue removed, up to ${strongest} of 255`;
}

function blobOf(base64) {
  return new Blob([Uint8Array.from(atob(base64), character => character.charCodeAt(0))], { type: "image/png" });
}

function bold(text) { const b = document.createElement("b"); b.textContent = text; return b; }

function copy(from, to, grey) {
  to.width = from.width; to.height = from.height;
  const context = to.getContext("2d", { willReadFrequently: true });
  context.drawImage(from, 0, 0);
  if (!grey) return;
  const pixels = context.getImageData(0, 0, to.width, to.height), d = pixels.data;
  for (let i = 0; i < d.length; i += 4) d[i] = d[i + 1] = d[i + 2] = Math.round(0.299 * d[i] + 0.587 * d[i + 1] + 0.114 * d[i + 2]);
  context.putImageData(pixels, 0, 0);
}

function drawDifference(before, after, to) {
  const { width, height } = after;
  to.width = width; to.height = height;
  if (before.width !== width || before.height !== height) return 0;
  const a = before.getContext("2d").getImageData(0, 0, width, height).data;
  const b = after.getContext("2d").getImageData(0, 0, width, height).data;
  const signed = new Float64Array(width * height);
  let strongest = 0;
  for (let i = 0; i < signed.length; i++) {
    let sum = 0;
    for (let c = 0; c < 3; c++) { const d = b[4 * i + c] - a[4 * i + c]; sum += d; strongest = Math.max(strongest, Math.abs(d)); }
    signed[i] = sum / 3;
  }
  const context = to.getContext("2d"), pixels = context.createImageData(width, height), scale = 1 / Math.max(1, strongest);
  for (let i = 0; i < signed.length; i++) {
    const s = signed[i] * scale, faint = 255 * (1 - Math.abs(s));
    pixels.data.set(s > 0 ? [255, faint, faint, 255] : [faint, faint, 255, 255], 4 * i);
  }
  context.putImageData(pixels, 0, 0);
  return strongest;
}

function drawScale(radius, counterfactual) {
  const end = Math.max(counterfactual.distance, radius, 1e-9) * 1.08, at = value => 100 * value / end;
  const [r, d] = [at(radius), at(counterfactual.distance)];
  const anchor = x => x > 75 ? "end" : x < 12 ? "start" : "middle";
  const other = counterfactual.reached;
  $("scale").setAttribute("aria-label", `Certified radius ${down(radius)}, counterfactual at distance ${number(counterfactual.distance)}`);
  $("scale").innerHTML = `
    <rect x="0" y="28" width="100%" height="14" rx="7" fill="var(--line)"/>
    ${other ? `<rect x="0" y="28" width="${d}%" height="14" rx="7" fill="var(--between)" opacity=".45"/>` : ""}
    <rect x="0" y="28" width="${r}%" height="14" rx="7" fill="var(--proved)"/>
    <line x1="${d}%" x2="${d}%" y1="22" y2="48" stroke="var(--found)" stroke-width="3"/>
    <text x="${r}%" y="16" text-anchor="${anchor(r)}">certified up to ${down(radius)}</text>
    <text x="${d}%" y="66" text-anchor="${anchor(d)}">${other ? "another class" : "image found"} at distance ${number(counterfactual.distance)}</text>`;
}

function drawLogits(answer) {
  const finite = answer.logits.filter(value => value !== null);
  const [low, high] = [Math.min(...finite), Math.max(...finite)], box = $("logits");
  box.replaceChildren();
  answer.logits.forEach((value, index) => {
    const name = document.createElement("span"), track = document.createElement("span"), bar = document.createElement("div"), figure = document.createElement("span");
    name.textContent = model().labels[index];
    bar.className = `bar ${index === answer.class_id ? "top" : index === answer.certificate.runner_up.class_id ? "next" : ""}`;
    bar.style.width = `${value === null ? 0 : 2 + 98 * (value - low) / (high - low || 1)}%`;
    figure.className = "number";
    figure.textContent = number(value);
    track.append(bar);
    box.append(name, track, figure);
  });
}

// ---- the page

function chosenModel() {
  const { labels, input } = model();
  $("target").replaceChildren(new Option("nearest other class", ""), ...labels.map(label => new Option(`towards ${label}`, label)));
  const digits = input.channels === 1 && input.height === 28 && input.width === 28;
  $("samples").hidden = !digits;
}

function stroke(event) {
  const box = pad.canvas.getBoundingClientRect(), size = pad.canvas.width;
  return [(event.clientX - box.left) * size / box.width, (event.clientY - box.top) * size / box.height];
}

let drawn = false, pressed = false, timer = 0;
function clearPad() { pad.fillStyle = "#000"; pad.fillRect(0, 0, pad.canvas.width, pad.canvas.height); drawn = true; }

pad.canvas.addEventListener("pointerdown", event => {
  if (!drawn) clearPad();
  pressed = true;
  pad.canvas.setPointerCapture(event.pointerId);
  pad.strokeStyle = "#fff"; pad.lineWidth = 21; pad.lineCap = pad.lineJoin = "round";
  pad.beginPath(); pad.moveTo(...stroke(event)); pad.lineTo(...stroke(event)); pad.stroke();
});
pad.canvas.addEventListener("pointermove", event => {
  if (!pressed) return;
  pad.lineTo(...stroke(event)); pad.stroke();
  clearTimeout(timer);
  timer = setTimeout(() => { current = drawing(); ask(); }, 120);
});
pad.canvas.addEventListener("pointerup", () => { pressed = false; clearTimeout(timer); current = drawing(); ask(); });

$("clear").addEventListener("click", () => { clearPad(); current = null; $("result").hidden = $("problem").hidden = true; $("source").textContent = "Draw with the mouse or a finger."; });
$("file").addEventListener("change", event => { if (event.target.files[0]) { drawn = false; choose(event.target.files[0]); event.target.value = ""; } });
for (const name of ["target", "proof"]) $(name).addEventListener("change", ask);
$("model").addEventListener("change", async () => { chosenModel(); if (current && current.body instanceof Blob) current = await fileSource(current.body); ask(); });
$("problem").lastElementChild.addEventListener("click", () => { current = fitted(); ask(); });
for (const name of ["dragover", "drop", "dragleave"]) document.addEventListener(name, event => {
  event.preventDefault();
  pad.canvas.classList.toggle("over", name === "dragover");
  if (name === "drop" && event.dataTransfer.files[0]) { drawn = false; choose(event.dataTransfer.files[0]); }
});
for (let digit = 0; digit < 10; digit++) {
  const button = document.createElement("button"), image = document.createElement("img");
  image.src = `static/samples/mnist-${digit}.png`;
  image.alt = `Sample digit ${digit}`;
  button.append(image);
  button.addEventListener("click", () => { drawn = false; sample(image.src); });
  $("samples").append(button);
}

$("key").addEventListener("change", start);

async function start() {
  const response = await fetch("models", { headers: withKey({}) }), answer = await response.json();
  askForKey(response);
  if (!response.ok) return say(answer.detail);
  models = answer.models;
  $("model").replaceChildren(...models.map(m => new Option(m.name, m.name, m.default, m.default)));
  chosenModel();
  await sample("samples/image.png");
}

start();
