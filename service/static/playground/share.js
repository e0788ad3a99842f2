// An answer for use elsewhere: the request as a command and as a program, a link, the files for an audit.
import { $, h } from "./words.js";

const SUFFIX = { "image/png": "png", "image/jpeg": "jpg", "image/webp": "webp", "image/bmp": "bmp", "image/gif": "gif" };
export const fileOf = source => `image.${SUFFIX[source.type] ?? "bin"}`;

export function code(source, query, model, hasKey) {
  const url = path => new URL(path, document.baseURI).href, key = hasKey ? ` -H "X-API-Key: $KEY"` : "", file = fileOf(source);
  const fetchIt = source.sample === null ? "" : `curl${key} '${url(`models/${model}/samples/${source.sample}`)}' -o ${file}\n`;
  return {
    curl: `${fetchIt}curl${key} '${url(`predict?${query}`)}' \\\n  -H 'Content-Type: ${source.type}' --data-binary @${file}`,
    python: `import json, urllib.request

headers = {"Content-Type": "${source.type}"${hasKey ? `, "X-API-Key": "..."` : ""}}
with open("${file}", "rb") as image:
    request = urllib.request.Request(
        "${url(`predict?${query}`)}",
        data=image.read(), headers=headers)
with urllib.request.urlopen(request) as response:
    answer = json.load(response)
print(answer["label"], answer["certificate"]["radius"])`,
    audit: `lipcert audit answer.json ${file} --model models/zoo/${model}`,
  };
}

export async function copy(text, button) {
  const before = button.textContent;
  try {
    if (navigator.clipboard) await navigator.clipboard.writeText(text);
    else copyBySelection(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not copied: select the text";
  }
  setTimeout(() => { button.textContent = before; }, 1500);
}

// Pages without TLS have no clipboard.
function copyBySelection(text) {
  const area = h("textarea", { value: text });
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  if (!done) throw new Error("not copied");
}

export function save(name, content, type) {
  const link = h("a", { href: URL.createObjectURL(new Blob([content], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

// The view as the fragment of the address: names and values of controls, and the number of the sample.
export function fragment(options, sample) {
  const values = new URLSearchParams(options);
  if (sample !== null) values.set("sample", sample);
  return `#${values}`;
}

export const readFragment = () => Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
export const note = text => { $("source").textContent = text; };
