// Numbers and sentences of an answer. No sentence states more than the certificate and the card do.

export const $ = id => document.getElementById(id);

export function h(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// Certified values are rounded down for display: a proof of 2.366 is no proof of 2.37.
export function down(value, digits = 3) {
  if (!(value > 0)) return "0";
  const unit = 10 ** (Math.floor(Math.log10(value)) + 1 - digits);
  let rounded = Number((Math.floor(value / unit) * unit).toPrecision(digits));
  if (rounded > value) rounded = Number((rounded - unit).toPrecision(digits));
  return rounded.toString();
}

export const number = (value, digits = 3) => value === null ? "not finite" : Number(value.toPrecision(digits)).toString();
export const percent = share => `${(Math.floor(share * 1000 + 1e-6) / 10).toFixed(1)} %`;
const whole = value => value.toLocaleString("en");

// Grey levels on every value at once that have this L2 norm.
export const levels = (radius, shape) => 255 * radius / Math.sqrt(shape[0] * shape[1] * shape[2]);

// With `strength` the counterfactual lies beyond the nearest image of another class that was found.
export const nearest = counterfactual => counterfactual.nearest_distance ?? counterfactual.distance;

export function proved({ certificate, image }) {
  if (!certificate.certified) return ["Nothing is proved about this image: two classes are too close to tell apart."];
  const sentence = ["Proved: no change smaller than ", h("b", {}, down(certificate.radius)), " (L2) alters this answer. That is ",
    `${down(levels(certificate.radius, image.shape), 2)} grey levels on every pixel at once.`];
  const { length } = certificate.references;
  return length ? [...sentence, ` Proved at ${length} reference image${length > 1 ? "s" : ""}.`] : sentence;
}

// How often such answers are right: accuracy and certified accuracy of the card, and its calibration where it applies.
export function howOften(model, answer) {
  const { accuracy, certified_accuracy: measured = [], calibration, data = {} } = model.card, { certificate, image } = answer;
  if (accuracy === null || accuracy === undefined) return `The card of ${model.name} states no accuracy: how often it is right is not known.`;
  const n = measured.length ? `${whole(measured[0].n)} ` : "";
  const isOther = image.resized || image.conversion !== null;
  let text = `Of ${n}test images${data.name ? ` (${data.name})` : ""} this model answered ${percent(accuracy)} right`;
  const share = entry => certificate.proof === "best" ? entry.with_references ?? entry.value : entry.value;
  const within = measured.filter(entry => entry.epsilon <= certificate.radius).sort((a, b) => b.epsilon - a.epsilon)[0];
  const entry = within ?? [...measured].sort((a, b) => a.epsilon - b.epsilon)[0];
  if (entry) text += `, and ${percent(share(entry))} right with a radius above ${number(entry.epsilon)}${within ? "" : ", which is more than here"}`;
  text += entry && isOther ? "; that radius is about pictures of its own size and channels." : ".";
  // The thresholds are about radii of the fast proof at the input of the model.
  if (calibration && certificate.proof === "fast" && !isOther) {
    const reached = calibration.thresholds.filter(entry => entry.radius <= certificate.radius).sort((a, b) => b.radius - a.radius)[0];
    if (reached) text += ` Of ${whole(reached.accepted)} held-out images with a radius of at least ${number(reached.radius)}, ${whole(reached.errors)}
      ${reached.errors === 1 ? "was" : "were"} wrong.`;
  }
  return text;
}

export function truthOf(source, answer) {
  if (source.truth === null) return "These figures are about images like its test images; whether yours is one, the model does not say.";
  return source.truth === answer.label
    ? `True label of this sample: ${source.truth}. The answer is right.`
    : `True label of this sample: ${source.truth}. The answer is wrong, and stable all the same.`;
}

// What was done to the picture before the model saw it.
export function notices(model, source, { image }) {
  const [channels, height, width] = image.shape, found = [];
  if (source.made) found.push(source.made);
  if (image.resized) found.push(`Resized from ${width} x ${height} to ${model.input.width} x ${model.input.height} by the service. The radius is about the picture of ${width} x ${height}.`);
  if (image.conversion === "rgb_to_grey") found.push("Converted to grey by the service. The radius is about the colours that were sent.");
  if (image.conversion === "grey_to_rgb") found.push("Converted from grey to RGB by the service. The radius is about the grey that was sent.");
  return found;
}

export function atEpsilon({ certificate, counterfactual, class_id, image }) {
  const { epsilon, radius } = certificate;
  if (epsilon === null) return null;
  const size = `${number(epsilon)} (${number(levels(epsilon, image.shape), 2)} grey levels)`;
  if (certificate.robust_at_epsilon) return ["good", `Epsilon ${size}: proved. Every smaller change leaves the class unchanged.`];
  const known = counterfactual && counterfactual.class_id !== class_id && nearest(counterfactual) < epsilon;
  return ["open", known
    ? `Epsilon ${size}: not robust. An image of class ${counterfactual.label} is known at ${number(nearest(counterfactual))}.`
    : `Epsilon ${size}: not proved. The proof ends at ${down(radius)}, and no image of another class is known below epsilon.`];
}

export function inSet(answer) {
  if (!answer.set) return null;
  const changed = answer.certificate.epsilon ? `, however one is changed below ${number(answer.certificate.epsilon)}` : "";
  return `Certified set: {${answer.set.map(entry => entry.label).join(", ")}}. Sets like this hold the true class of ${percent(answer.coverage)} of images
    like those of the calibration${changed}.`;
}

export function novel(answer) {
  if (!answer.novelty) return null;
  const { novel, score, radius, certified } = answer.novelty;
  return [novel ? "open" : "good", `${novel ? "Novel: unlike the images that the model knows" : "Not novel: like the images that the model knows"}
    (score ${number(score)}${certified ? `; proved for every change smaller than ${down(radius)}` : ""}).`];
}
