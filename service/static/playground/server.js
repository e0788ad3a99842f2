// Requests to the server that served this page, and one clear line for each way in which they fail.
import { $ } from "./words.js";

const PATIENCE_MS = 60_000;

// `kind` is the last part of the type of a problem document, "" for another failure.
export class Failure extends Error {
  constructor(message, kind = "", status = 0) {
    super(message);
    this.kind = kind;
    this.status = status;
  }
}

// A server with API keys asks for one; the page does not store it.
const withKey = headers => $("key").value.trim() ? { ...headers, "X-API-Key": $("key").value.trim() } : headers;

async function request(path, { headers = {}, signal, ...rest } = {}) {
  const controller = new AbortController();
  let late = false, response;
  const timer = setTimeout(() => { late = true; controller.abort(); }, PATIENCE_MS);
  signal?.addEventListener("abort", () => controller.abort());
  try {
    response = await fetch(path, { ...rest, headers: withKey(headers), signal: controller.signal });
  } catch (error) {
    if (late) throw new Failure(`The server gave no answer in ${PATIENCE_MS / 1000} seconds.`);
    if (error.name === "AbortError") throw error;
    throw new Failure("The server cannot be reached. It may have stopped, or this device is offline.");
  } finally {
    clearTimeout(timer);
  }
  if (response.ok) return response;
  if (response.status === 401 || response.status === 403) $("key-field").hidden = false;
  let problem = null;
  try { problem = await response.json(); } catch { /* a page of a proxy */ }
  if (typeof problem?.detail === "string") throw new Failure(problem.detail, String(problem.type ?? "").split(":").pop(), response.status);
  throw new Failure(`Something between this page and the server answered "${response.status} ${response.statusText}". The server may be starting or have stopped.`, "", response.status);
}

// Returns the bytes as text, too: an archived answer is the one that was received.
export async function ask(path, options) {
  const response = await request(path, options);
  let text = "";
  try {
    text = await response.text();
    return { answer: JSON.parse(text), text };
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The answer is not whole JSON: the connection broke, or something between this page and the server has replaced it.");
  }
}

export const fetchBlob = async path => (await request(path)).blob();

export const predict = (source, query, signal) =>
  ask(`predict?${query}`, { method: "POST", headers: { "Content-Type": source.type }, body: source.body, signal });

export const predictAll = (images, options, signal) =>
  ask("predict/batch", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ images, ...options }), signal });

// Options that this server has; a page of a newer release may ask an older one.
export async function optionsOfServer() {
  const { answer } = await ask("openapi.json");
  return new Set(Object.keys(answer.components.schemas.PredictRequest.properties));
}
