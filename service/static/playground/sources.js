// From a drawing, sample, file or camera to a source: {kind, body, type, resize, canvas, made, truth, sample, name}.
// `canvas` has the pixels of `body` as this browser decodes them; `made` says what was done to the picture here.
import { canvasOf, decoded, fitted, pixelsOf, placed, pngOf } from "./pictures.js";
import { h } from "./words.js";

const CAMERA_SIDE = 256;
export const isDigits = model => model.labels.every(label => /^\d$/.test(label));

function source(kind, canvas, body, type, more = {}) {
  return { kind, canvas, body, type, resize: false, made: null, truth: null, sample: null, name: kind, ...more };
}

function fromCanvas(kind, canvas, model, channels, made) {
  const { height, width } = model.input;
  const resize = canvas.width !== width || canvas.height !== height;
  return source(kind, canvas, pngOf(pixelsOf(canvas, channels)), "image/png", { resize, made });
}

export function drawing(pad, model) {
  const { height, width } = model.input, digits = isDigits(model);
  const canvas = digits ? placed(pad, width, height) : fitted(pad, width, height);
  return fromCanvas("drawing", canvas, model, 1, digits ? "Drawn here, then centred and scaled like the digits of MNIST." : `Drawn here, then scaled to ${width} x ${height} in the browser.`);
}

export const fittedSource = (from, model) => ({
  ...fromCanvas("file", fitted(from.canvas, model.input.width, model.input.height), model, model.input.channels,
    "Fitted to the model in the browser: the answer is about the fitted picture, not about your file."), name: from.name });

export async function fileSource(file, model, more = {}) {
  const made = source("file", null, file, file.type || "image/png", { name: file.name, ...more });
  try {
    made.canvas = await decoded(file);
    made.resize = made.canvas.width !== model.input.width || made.canvas.height !== model.input.height;
  } catch { /* not an image for the browser either: the answer of the server states the reason */ }
  return made;
}

// A pasted picture or a photograph has no file worth sending: PNG without alpha, on white.
export async function pastedSource(blob, model) {
  const found = await decoded(blob);
  return pictureSource("pasted", found, found.width, found.height, model, "Pasted: written as an RGB file in the browser.");
}

function pictureSource(kind, from, width, height, model, made) {
  const canvas = canvasOf(width, height), context = canvas.getContext("2d");
  context.fillStyle = "#fff";
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  const scale = Math.max(width / (from.videoWidth ?? from.width), height / (from.videoHeight ?? from.height));
  const [w, tall] = [(from.videoWidth ?? from.width) * scale, (from.videoHeight ?? from.height) * scale];
  context.drawImage(from, (width - w) / 2, (height - tall) / 2, w, tall);
  return fromCanvas(kind, canvas, model, 3, made);
}

// ---- the camera: a dialog with its picture; resolves to a source, or to null

export async function photograph(model) {
  const stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  const video = h("video", { autoplay: true, muted: true, playsInline: true, srcObject: stream });
  const take = h("button", { type: "button" }, "Take the picture"), cancel = h("button", { type: "button" }, "Cancel");
  const dialog = h("dialog", { ariaLabel: "Camera" }, video, h("div", { className: "row" }, take, cancel));
  document.body.append(dialog);
  dialog.showModal();
  const taken = await new Promise(resolve => {
    take.onclick = () => { if (video.videoWidth) resolve(pictureSource("camera", video, CAMERA_SIDE, CAMERA_SIDE, model, "Photographed: the middle of the picture, as an RGB file made in the browser.")); };
    cancel.onclick = dialog.oncancel = () => resolve(null);
  });
  for (const track of stream.getTracks()) track.stop();
  dialog.remove();
  return taken;
}

// ---- the pad

export function showOn(pad, canvas) {
  const context = pad.getContext("2d"), size = pad.width, scale = size / Math.max(canvas.width, canvas.height);
  clear(pad);
  context.imageSmoothingEnabled = scale < 1;
  context.drawImage(canvas, (size - canvas.width * scale) / 2, (size - canvas.height * scale) / 2, canvas.width * scale, canvas.height * scale);
}

export function clear(pad) {
  const context = pad.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "#000";
  context.fillRect(0, 0, pad.width, pad.height);
}

// Calls `changed(done)` while a stroke grows and when it ends; `start` before the first point.
export function drawOn(pad, start, changed) {
  const context = pad.getContext("2d", { willReadFrequently: true });
  let pressed = false;
  const point = event => {
    const box = pad.getBoundingClientRect();
    return [(event.clientX - box.left) * pad.width / box.width, (event.clientY - box.top) * pad.height / box.height];
  };
  const draw = event => { context.lineTo(...point(event)); context.stroke(); };
  pad.addEventListener("pointerdown", event => {
    start();
    pressed = true;
    pad.setPointerCapture(event.pointerId);
    Object.assign(context, { strokeStyle: "#fff", lineWidth: 21, lineCap: "round", lineJoin: "round" });
    context.beginPath();
    context.moveTo(...point(event));
    draw(event);
  });
  pad.addEventListener("pointermove", event => { if (pressed) { draw(event); changed(false); } });
  for (const end of ["pointerup", "pointercancel"]) pad.addEventListener(end, () => { if (pressed) { pressed = false; changed(true); } });
}

