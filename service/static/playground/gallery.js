// Answers to several images at once; a click shows one in full.
import { canvasOf } from "./pictures.js";
import { predict } from "./server.js";
import { $, down, h } from "./words.js";

export const MOST = 32;
const AT_ONCE = 3, SIDE = 64;

function thumbnail(canvas) {
  const small = canvasOf(SIDE, SIDE);
  if (!canvas) return small;
  const scale = SIDE / Math.max(canvas.width, canvas.height), context = small.getContext("2d");
  context.imageSmoothingEnabled = scale < 1;
  context.drawImage(canvas, (SIDE - canvas.width * scale) / 2, (SIDE - canvas.height * scale) / 2, canvas.width * scale, canvas.height * scale);
  return small;
}

export function hideGallery() {
  $("gallery").hidden = true;
  $("gallery-list").replaceChildren();
}

// `queryOf(source)` are the options of a request without counterfactual; `open(source)` shows a source in full.
export async function showGallery(sources, queryOf, open, signal) {
  $("gallery").hidden = false;
  $("gallery-title").textContent = `${sources.length} images`;
  const rows = sources.map(source => {
    const words = h("span", {}, "..."), button = h("button", { type: "button", title: source.name }, thumbnail(source.canvas), words);
    button.addEventListener("click", () => open(source));
    return { source, words, button };
  });
  $("gallery-list").replaceChildren(...rows.map(row => row.button));
  const waiting = [...rows];
  const work = async () => {
    for (let row; (row = waiting.shift());) {
      try {
        const { answer } = await predict(row.source, queryOf(row.source), signal), { certificate } = answer;
        row.words.replaceChildren(h("b", {}, answer.label), h("br"), certificate.certified ? `stable up to ${down(certificate.radius)}` : "nothing proved");
      } catch (error) {
        if (error.name === "AbortError") return;
        row.words.textContent = "no answer";
        row.button.title = `${row.source.name}: ${error.message}`;
      }
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, work));
}
