// One answer on the page: class, what is proved and what is not, pictures, logits.
import { blobOf, canvasWith, decoded, drawDifference, show } from "./pictures.js";
import { $, atEpsilon, down, h, howOften, inSet, nearest, notices, novel, number, proved, truthOf } from "./words.js";

const fill = (id, content) => {
  $(id).hidden = !content;
  $(id).replaceChildren(...(content ?? []));
};
const verdict = (id, found) => {
  fill(id, found && [found[1]]);
  $(id).className = `line ${found?.[0] ?? ""}`;
};

// `still` says whether the answer is still the latest one: pictures are decoded in the meantime.
export async function render(answer, source, model, still) {
  const { certificate, counterfactual, saliency } = answer, grey = answer.image.shape[0] === 1;
  const images = counterfactual && [...(counterfactual.path ?? []), counterfactual];
  const decodedImages = images && await Promise.all(images.map(image => decoded(blobOf(image.image))));
  const overlay = saliency && await decoded(blobOf(saliency.overlay));
  if (!still()) return;
  $("result").hidden = false;
  $("label").textContent = answer.label;
  $("class").classList.toggle("long", answer.label.length > 6);
  $("claim").replaceChildren(...proved(answer));
  $("claim").classList.toggle("none", !certificate.certified);
  $("caveat").replaceChildren(h("b", {}, "Stable is not right. "), howOften(model, answer));
  fill("truth", answer.novelty && source.truth === null ? null : [truthOf(source, answer)]);
  $("truth").className = source.truth === null ? "line" : `line ${source.truth === answer.label ? "good" : "open"}`;
  const said = notices(model, source, answer);
  fill("notices", said.length ? said.map(text => h("li", {}, text)) : null);
  verdict("at-epsilon", atEpsilon(answer));
  verdict("novelty-line", novel(answer));
  fill("set", inSet(answer) && [inSet(answer)]);
  $("status").textContent = `${answer.label}. ${$("claim").textContent}`;
  $("json").textContent = JSON.stringify(answer, (key, value) =>
    ["image", "overlay", "array"].includes(key) && typeof value === "string" ? `${value.slice(0, 24)}... (${value.length} characters)` : value, 2);
  drawScale(certificate, counterfactual);
  drawLogits(answer, model);

  const hasPicture = Boolean(source.canvas);
  $("original").hidden = !hasPicture;
  if (hasPicture) show(source.canvas, $("original"), grey);
  $("original-caption").textContent = hasPicture ? "The image as sent" : "The image as sent cannot be shown by this browser";
  for (const id of ["found-figure", "difference-figure"]) $(id).hidden = !counterfactual;
  if (counterfactual) showFound(decodedImages.at(-1), counterfactual, hasPicture);
  showPath(counterfactual, decodedImages, hasPicture);
  $("saliency-figure").hidden = !saliency;
  if (saliency) {
    show(overlay, $("saliency-picture"));
    $("saliency-caption").textContent = `Saliency: more light on red pixels speaks for ${answer.label}, on blue ones for ${certificate.runner_up.label}`;
  }
}

function showFound(canvas, image, hasPicture) {
  show(canvas, $("found"));
  $("found-caption").replaceChildren(image.reached === false
    ? "Target not reached; the best image found is of class " : image.margin === undefined ? "Counterfactual, answered as " : "On the path, answered as ",
    h("b", {}, image.label), ` at distance ${number(image.distance)}`);
  const strongest = hasPicture ? drawDifference($("original"), canvas, $("difference")) : 0;
  $("difference-caption").textContent = `Difference: red added, blue removed, up to ${strongest} of 255`;
}

function showPath(counterfactual, canvases, hasPicture) {
  const path = counterfactual?.path, slider = $("along");
  $("path-row").hidden = !path;
  if (!path) return;
  slider.max = path.length - 1;
  slider.value = path.length - 1;
  const say = () => {
    const step = path[slider.value];
    $("along-text").textContent = `image ${Number(slider.value) + 1} of ${path.length}: ${step.label}, margin ${number(step.margin)}, radius ${down(step.radius)}`;
  };
  slider.oninput = () => { say(); showFound(canvases[slider.value], path[slider.value], hasPicture); };
  say();
}

// The image with noise of the certified size, and the class that the service gave it: {pixels, distance, label, same}.
export function renderNoise(noise, reason) {
  $("noise-picture").hidden = !noise;
  $("noise-again").hidden = !noise;
  if (!noise) { $("noise-caption").textContent = reason; return; }
  show(canvasWith(noise.pixels), $("noise-picture"));
  $("noise-caption").replaceChildren(`Noise of norm ${down(noise.distance, 4)}: `, noise.same
    ? "answered again as " : "the class has changed to ", h("b", {}, noise.label), noise.same ? "" : ". This refutes the certificate: please save and report it.");
  $("noise-caption").classList.toggle("refuted", !noise.same);
}

function drawScale(certificate, counterfactual) {
  const { radius, epsilon } = certificate, distance = counterfactual ? nearest(counterfactual) : radius, other = counterfactual?.reached;
  const end = Math.max(distance, radius, epsilon ?? 0, 1e-9) * 1.08, at = value => 100 * value / end;
  const [r, d] = [at(radius), at(distance)], anchor = x => x > 70 ? "end" : x < 15 ? "start" : "middle";
  $("scale").setAttribute("aria-label", `Certified radius ${down(radius)}${counterfactual ? `, image found at distance ${number(distance)}` : ""}`);
  $("scale").innerHTML = `
    <rect x="0" y="28" width="100%" height="14" rx="7" fill="var(--line)"/>
    ${other ? `<rect x="0" y="28" width="${d}%" height="14" rx="7" fill="var(--between)" opacity=".45"/>` : ""}
    <rect x="0" y="28" width="${r}%" height="14" rx="7" fill="var(--proved)"/>
    ${epsilon ? `<line x1="${at(epsilon)}%" x2="${at(epsilon)}%" y1="24" y2="46" stroke="var(--ink)" stroke-width="2" stroke-dasharray="3 2"/>` : ""}
    <text x="${r}%" y="16" text-anchor="${anchor(r)}">stable up to ${down(radius)}</text>
    ${counterfactual ? `<line x1="${d}%" x2="${d}%" y1="22" y2="48" stroke="var(--found)" stroke-width="3"/>
    <text x="${d}%" y="66" text-anchor="${anchor(d)}">${other ? "another class" : "image found"} at ${number(distance)}</text>` : ""}`;
}

function drawLogits(answer, model) {
  const finite = answer.logits.filter(value => value !== null), low = Math.min(...finite), high = Math.max(...finite);
  $("logits").replaceChildren(...answer.logits.flatMap((value, index) => {
    const bar = h("div", { className: `bar ${index === answer.class_id ? "top" : index === answer.certificate.runner_up.class_id ? "next" : ""}` });
    bar.style.width = `${value === null ? 0 : 2 + 98 * (value - low) / (high - low || 1)}%`;
    return [h("span", {}, model.labels[index]), h("span", {}, bar), h("span", { className: "number" }, number(value))];
  }));
}
