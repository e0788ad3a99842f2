// The page: models, sources and options, and one answer at a time.
import { render, renderNoise } from "./answer.js";
import { hideGallery, MOST, showGallery } from "./gallery.js";
import { base64Of, pixelsOf, pngOf, withNoise } from "./pictures.js";
import { ask as get, Failure, fetchBlob, optionsOfServer, predict, predictAll } from "./server.js";
import { code, copy, fileOf, fragment, note, readFragment, save } from "./share.js";
import { clear, drawing, drawOn, fileSource, fittedSource, pastedSource, photograph, showOn } from "./sources.js";
import { $, h, levels, number } from "./words.js";

const pad = $("draw"), NOISE_PIXELS = 512 * 512, QUICK_PIXELS = 128 * 128, DRAW_MS = 120;
const OPTIONS = ["target", "proof", "epsilon", "coverage", "strength", "path", "saliency", "novelty"];
let models = [], known = new Set(), model = null, source = null, files = [], last = null, hasDrawing = false;
let asking = new AbortController(), gathering = new AbortController(), wantedModel = "";
const described = new Map(), withoutNovelty = new Set();

// ---- options

function valueOf(name) {
  const control = $(name);
  if (control.type === "checkbox") return control.checked ? (control.value === "on" ? "true" : control.value) : "";
  if (name === "epsilon") return Number(control.value) > 0 ? control.value : "";
  if (name === "strength") return Number(control.value) > 1 ? control.value : "";
  return name === "proof" && control.value === "fast" ? "" : control.value;
}

function chosen() {
  const found = { model: model.name };
  for (const name of OPTIONS) {
    const value = known.has(name) && !(name === "novelty" && withoutNovelty.has(model.name)) ? valueOf(name) : "";
    if (value) found[name] = value;
  }
  return found;
}

function queryOf(of, inFull) {
  const query = new URLSearchParams({ ...chosen(), ...(inFull && { counterfactual: "true" }), ...(of.resize && { resize: "true" }) });
  if (!inFull) for (const name of ["target", "strength", "path"]) query.delete(name);
  return query;
}

function sayValues() {
  const shape = last?.answer.image.shape ?? [model.input.channels, model.input.height, model.input.width], epsilon = Number($("epsilon").value);
  $("epsilon-text").textContent = epsilon > 0 ? `${number(epsilon)} in L2, ${number(levels(epsilon, shape), 2)} grey levels on every pixel` : "not asked";
  $("strength-text").textContent = `${Number($("strength").value).toFixed(1)} times the nearest distance`;
}

// Targets are the other classes: the predicted one is refused.
function listTargets(predicted) {
  const before = $("target").value;
  $("target").replaceChildren(new Option("nearest other class", ""),
    ...model.labels.filter((_, index) => index !== predicted).map(label => new Option(`towards ${label}`, label)));
  if (model.labels.includes(before) && before !== model.labels[predicted]) $("target").value = before;
}

// ---- the request and its answer

async function ask() {
  if (!source || !model) return;
  asking.abort();
  asking = new AbortController();
  const asked = source, of = model, { signal } = asking, query = queryOf(asked, true);
  note(asked.kind === "file" || !asked.made ? asked.name : asked.made);
  $("answer").classList.add("busy");
  try {
    // The search for a counterfactual of a large picture takes seconds: the class first.
    if (asked.canvas && asked.canvas.width * asked.canvas.height > QUICK_PIXELS) {
      await render((await predict(asked, queryOf(asked, false), signal)).answer, asked, of, () => !signal.aborted);
      renderNoise(null, "Searching for a counterfactual ...");
      $("problem").hidden = true;
    }
    const { answer, text } = await predict(asked, query, signal);
    await render(answer, asked, of, () => !signal.aborted);
    if (signal.aborted) return;
    $("problem").hidden = true;
    last = { answer, text, source: asked };
    listTargets(answer.class_id);
    sayValues();
    showCode(query);
    // Browsers limit how often the address changes.
    const view = fragment(chosen(), asked.sample);
    if (view !== location.hash) history.replaceState(null, "", view);
    await addNoise(signal);
  } catch (error) {
    if (error.name === "AbortError") return;
    if (!(error instanceof Failure)) throw error;
    if (error.kind === "target-is-predicted-class") { $("target").value = ""; return ask(); }
    if (error.kind === "novelty") { withoutNovelty.add(of.name); return ask(); }
    const fixable = ["channels", "image-format", "image-size", "image-too-large", "body-too-large"].includes(error.kind);
    fail(error, fixable && asked.canvas && [1, 3].includes(of.input.channels));
  } finally {
    if (!signal.aborted) $("answer").classList.remove("busy");
  }
}

function fail(error, canFit = false) {
  $("problem").hidden = false;
  $("result").hidden = true;
  $("problem-text").textContent = error.message;
  $("status").textContent = error.message;
  $("fit").hidden = !canFit;
  $("again").hidden = error.status >= 400 && error.status < 500 && error.status !== 429;
}

// Noise of the certified size is sent with the picture without it: only if the service reads the same pixels as this
// browser is the size of the noise known.
async function addNoise(signal) {
  const { answer, source: asked } = last, [channels, height, width] = answer.image.shape, { canvas } = asked, { radius } = answer.certificate;
  const without = reason => renderNoise(null, reason);
  if (!answer.certificate.certified) return without("No noise: nothing is certified");
  if (!canvas || canvas.width !== width || canvas.height !== height) return without("No noise: this browser cannot decode the file");
  if (width * height > NOISE_PIXELS) return without("No noise: the picture is too large to add some here");
  const clean = pixelsOf(canvas, channels), noise = withNoise(clean, radius);
  if (!noise.distance) return without("No noise: the radius is below one grey level of one pixel");
  const options = { model: answer.model, ...(asked.resize && { resize: true }) };
  try {
    const sent = [clean, noise.pixels].map(pixels => base64Of(pngOf(pixels)));
    const [first, second] = (await predictAll(sent, options, signal)).answer.predictions;
    if (signal.aborted) return;
    if (first.image.digest !== answer.image.digest) return without("No noise: this browser decodes the file to other pixels than the service");
    renderNoise({ ...noise, label: second.label, same: second.class_id === answer.class_id });
  } catch (error) {
    if (error instanceof Failure) without(`No noise: ${error.message}`);
    else throw error;
  }
}

function showCode(query) {
  const texts = code(last.source, query, model.name, Boolean($("key").value));
  for (const [name, text] of Object.entries(texts)) $(`${name}-text`).textContent = text;
}

// ---- models

async function describe(name) {
  if (!described.has(name)) described.set(name, (await get(`models/${encodeURIComponent(name)}`)).answer);
  return described.get(name);
}

// Returns false if another model was chosen in the meantime.
async function chooseModel(name) {
  wantedModel = name;
  const found = await describe(name);
  if (name !== wantedModel) return false;
  model = found;
  $("model").value = name;
  listTargets(-1);
  const { card } = model, largest = Math.max(...(card.certified_accuracy ?? []).map(entry => entry.epsilon), 0) || 2;
  $("epsilon").max = (Math.ceil(15 * largest) / 10).toFixed(1);
  const coverages = (card.calibration?.quantiles ?? []).map(entry => entry.coverage);
  $("coverage").replaceChildren(new Option("not asked", ""), ...[0.9, 0.95, 0.99].filter(one => coverages.some(c => c >= one))
    .map(one => new Option(`${Math.round(100 * one)} % of images`, one)));
  $("coverage-row").hidden = !known.has("coverage") || !coverages.length;
  $("novelty-row").hidden = !known.has("novelty") || withoutNovelty.has(name);
  return listSamples();
}

async function listSamples() {
  const of = model, samples = of.samples ?? [];
  $("samples").hidden = !samples.length;
  const blobs = await Promise.all(samples.map((_, n) => fetchBlob(`models/${encodeURIComponent(of.name)}/samples/${n}`)));
  if (of !== model) return false;
  for (const image of $("samples").querySelectorAll("img")) URL.revokeObjectURL(image.src);
  $("samples").replaceChildren(...samples.map(({ label }, n) => {
    const image = h("img", { src: URL.createObjectURL(blobs[n]), alt: `Sample ${n + 1}: ${label}`, title: label });
    const button = h("button", { type: "button" }, image);
    button.addEventListener("click", guarded(() => { leaveGallery(); return openSample(n); }));
    return button;
  }));
  of.blobs = blobs;
  return true;
}

async function openSample(n) {
  const { label } = model.samples[n];
  await open(await fileSource(model.blobs[n], model, { kind: "sample", truth: label, sample: n, name: `Sample ${n + 1}, true label: ${label}` }));
}

// After a change of the model: the same drawing or file for its size; a sample of the same label, or the first one.
async function sourceForModel() {
  if (files.length > 1) return openFiles(files);
  if (hasDrawing && source?.kind === "drawing") { source = drawing(pad, model); return ask(); }
  const samples = model.samples ?? [];
  if ((!source || source.kind === "sample") && samples.length) return openSample(Math.max(0, samples.findIndex(({ label }) => label === source?.truth)));
  if (source?.kind === "sample") return open(await fileSource(source.body, model, { name: `Sample of another model; true label there: ${source.truth}` }));
  if (source?.canvas) {
    source.resize = source.canvas.width !== model.input.width || source.canvas.height !== model.input.height;
    return source.made?.startsWith("Fitted") ? open(fittedSource(source, model)) : ask();
  }
  if (!source) note("This model has no samples: draw, or choose a file.");
  return ask();
}

// ---- sources

async function open(made) {
  hasDrawing = false;
  source = made;
  if (made.canvas) showOn(pad, made.canvas);
  await ask();
}

function leaveGallery() {
  gathering.abort();
  files = [];
  hideGallery();
}

async function openFiles(list) {
  if (!list.length || !model) return;
  leaveGallery();
  files = [...list].slice(0, MOST);
  const sources = await Promise.all(files.map(file => fileSource(file, model)));
  if (sources.length === 1) return open(sources[0]);
  gathering = new AbortController();
  const gathered = showGallery(sources, one => queryOf(one, false), guarded(open), gathering.signal);
  await Promise.all([open(sources[0]), gathered]);
  if (list.length > MOST) note(`The first ${MOST} of ${list.length} images.`);
}

async function paste(event) {
  const pasted = [...event.clipboardData?.files ?? []].filter(file => file.type.startsWith("image/"));
  if (!pasted.length || !model) return;
  event.preventDefault();
  leaveGallery();
  try { await open(await pastedSource(pasted[0], model)); } catch { note("This browser cannot decode the picture in the clipboard."); }
}

async function useCamera() {
  try {
    const taken = await photograph(model);
    if (taken) { leaveGallery(); await open(taken); }
  } catch (error) { note(`The camera is not available (${error.message}).`); }
}

// ---- wiring

const guarded = work => async (...values) => {
  try { await work(...values); } catch (error) { if (error instanceof Failure) fail(error); else if (error.name !== "AbortError") throw error; }
};

let timer = 0;
drawOn(pad, () => { if (!hasDrawing) clear(pad); hasDrawing = true; leaveGallery(); }, done => {
  clearTimeout(timer);
  timer = setTimeout(() => { if (model && hasDrawing) { source = drawing(pad, model); ask(); } }, done ? 0 : DRAW_MS);
});
$("clear").addEventListener("click", () => {
  asking.abort();
  clear(pad);
  hasDrawing = false;
  source = last = null;
  leaveGallery();
  $("result").hidden = $("problem").hidden = true;
  $("answer").classList.remove("busy");
  note("Draw with the mouse or a finger.");
});
$("file").addEventListener("change", guarded(async event => { await openFiles([...event.target.files]); event.target.value = ""; }));
$("camera").hidden = !navigator.mediaDevices?.getUserMedia;
$("camera").addEventListener("click", useCamera);
document.addEventListener("paste", guarded(paste));
for (const name of ["dragover", "drop", "dragleave"]) document.addEventListener(name, guarded(async event => {
  event.preventDefault();
  pad.classList.toggle("over", name === "dragover");
  if (name === "drop") await openFiles([...event.dataTransfer.files]);
}));
for (const name of OPTIONS) $(name).addEventListener("change", ask);
for (const name of ["epsilon", "strength"]) $(name).addEventListener("input", sayValues);
$("model").addEventListener("change", guarded(async () => { if (await chooseModel($("model").value)) { sayValues(); await sourceForModel(); } }));
$("fit").addEventListener("click", guarded(() => open(fittedSource(source, model))));
$("again").addEventListener("click", guarded(() => model && source ? ask() : start()));
$("noise-again").addEventListener("click", guarded(() => last && addNoise(asking.signal)));
$("save").addEventListener("click", () => {
  save("answer.json", last.text, "application/json");
  save(fileOf(last.source), last.source.body, last.source.type);
});
for (const button of document.querySelectorAll("[data-copies]")) button.addEventListener("click", () => copy($(button.dataset.copies).textContent, button));
$("copy-link").addEventListener("click", () => copy(location.href, $("copy-link")));
$("key").addEventListener("change", guarded(() => start()));
window.addEventListener("hashchange", guarded(() => start()));

async function start() {
  const wanted = readFragment();
  known = await optionsOfServer();
  for (const name of ["strength", "saliency", "novelty"]) $(`${name}-row`).hidden = !known.has(name);
  $("path-option").hidden = !known.has("path");
  const { answer } = await get("models");
  models = answer.models;
  $("model").replaceChildren(...models.map(one => new Option(one.name, one.name)));
  $("broken").textContent = answer.broken.length ? `Not served: ${answer.broken.map(one => one.name).join(", ")}.` : "";
  const name = (models.find(one => one.name === wanted.model || one.aliases.includes(wanted.model)) ?? models.find(one => one.default) ?? models[0]).name;
  if (!await chooseModel(name)) return;
  for (const option of OPTIONS) {
    const control = $(option), value = wanted[option];
    if (value === undefined) continue;
    if (control.type === "checkbox") control.checked = value !== "";
    else if (control.tagName !== "SELECT" || [...control.options].some(one => one.value === value)) control.value = value;
  }
  sayValues();
  $("problem").hidden = true;
  const n = Number(wanted.sample ?? 0);
  if (model.samples?.length) await openSample(Number.isInteger(n) && n in model.samples ? n : 0);
  else await sourceForModel();
}

clear(pad);
guarded(start)();
