// Pictures: pixels, canvases, PNG files, noise. `pixels` is {width, height, channels, values}: 8 bits, H x W x C.

export function canvasOf(width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  return canvas;
}

const context = canvas => canvas.getContext("2d", { willReadFrequently: true });

// The conversion of the service: 0.299 R + 0.587 G + 0.114 B.
export function pixelsOf(canvas, channels) {
  const { width, height } = canvas, rgba = context(canvas).getImageData(0, 0, width, height).data;
  const values = new Uint8Array(width * height * channels);
  for (let i = 0; i < width * height; i++) {
    const [r, g, b] = rgba.subarray(4 * i, 4 * i + 3);
    if (channels === 1) values[i] = Math.round(0.299 * r + 0.587 * g + 0.114 * b);
    else values.set([r, g, b], 3 * i);
  }
  return { width, height, channels, values };
}

export function canvasWith({ width, height, channels, values }) {
  const canvas = canvasOf(width, height), data = context(canvas).createImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    for (let c = 0; c < 3; c++) data.data[4 * i + c] = values[channels * i + (channels === 1 ? 0 : c)];
    data.data[4 * i + 3] = 255;
  }
  context(canvas).putImageData(data, 0, 0);
  return canvas;
}

// Decoded without colour management: the certificate is about the numbers in the file.
export async function decoded(blob) {
  const bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  const canvas = canvasOf(bitmap.width, bitmap.height);
  context(canvas).drawImage(bitmap, 0, 0);
  return canvas;
}

export function blobOf(base64, type = "image/png") {
  return new Blob([Uint8Array.from(atob(base64), character => character.charCodeAt(0))], { type });
}

export function base64Of(bytes) {
  let text = "";
  for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
  return btoa(text);
}

// ---- PNG (ISO/IEC 15948): grey or RGB, not compressed. A browser's own encoder adds alpha, which the service refuses.

const CRC = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n;
});

function chunk(type, data) {
  const bytes = new Uint8Array(data.length + 12), view = new DataView(bytes.buffer);
  view.setUint32(0, data.length);
  bytes.set(new TextEncoder().encode(type), 4);
  bytes.set(data, 8);
  let crc = 0xffffffff;
  for (const byte of bytes.subarray(4, data.length + 8)) crc = CRC[(crc ^ byte) & 255] ^ (crc >>> 8);
  view.setUint32(data.length + 8, ~crc >>> 0);
  return bytes;
}

// zlib (RFC 1950) with stored blocks (RFC 1951).
function stored(raw) {
  const parts = [[0x78, 0x01]];
  for (let at = 0; at < raw.length; at += 65535) {
    const block = raw.subarray(at, at + 65535), size = block.length;
    parts.push([at + size === raw.length ? 1 : 0, size & 255, size >> 8, ~size & 255, (~size >> 8) & 255], block);
  }
  let a = 1, b = 0;
  for (const byte of raw) { a = (a + byte) % 65521; b = (b + a) % 65521; }
  return joined([...parts, [b >> 8, b & 255, a >> 8, a & 255]]);
}

function joined(parts) {
  const bytes = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) { bytes.set(part, at); at += part.length; }
  return bytes;
}

export function pngOf({ width, height, channels, values }) {
  const row = width * channels, raw = new Uint8Array(height * (row + 1));
  for (let y = 0; y < height; y++) raw.set(values.subarray(y * row, (y + 1) * row), y * (row + 1) + 1);
  const head = new Uint8Array(13), view = new DataView(head.buffer);
  view.setUint32(0, width);
  view.setUint32(4, height);
  head.set([8, channels === 1 ? 0 : 2], 8);
  return joined([[137, 80, 78, 71, 13, 10, 26, 10], chunk("IHDR", head), chunk("IDAT", stored(raw)), chunk("IEND", [])]);
}

// ---- noise

// The same picture with 8-bit noise, normally distributed as far as 0 and 255 allow: the largest norm below `radius`.
export function withNoise(pixels, radius) {
  const { values } = pixels, count = values.length, wanted = 255 * radius;
  // A sum of squares of integers, strictly below the square of the radius.
  const most = Math.ceil(wanted * wanted * (1 - 1e-12)) - 1;
  const normal = Float64Array.from(values, () => Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random()));
  // Away from the nearer end where the other side has no room.
  const typical = Math.sqrt(Math.max(most, 0) / count);
  const sign = Int8Array.from(values, (v, i) => v < typical ? 1 : 255 - v < typical ? -1 : normal[i] < 0 ? -1 : 1);
  const room = Uint8Array.from(values, (v, i) => sign[i] > 0 ? 255 - v : v);
  const changes = scale => Uint8Array.from(normal, (size, i) => Math.min(room[i], Math.round(scale * Math.abs(size))));
  const square = change => change.reduce((sum, size) => sum + size * size, 0);
  let [low, high] = [0, 255];
  for (let step = 0; step < 24; step++) {
    const middle = (low + high) / 2;
    if (square(changes(middle)) <= most) low = middle; else high = middle;
  }
  const change = changes(low), first = Math.floor(Math.random() * count);
  let sum = square(change);
  for (let moved = true; moved;) {
    moved = false;
    for (let k = 0; k < count; k++) {
      const i = (first + 7919 * k) % count, cost = 2 * change[i] + 1;
      if (sum + cost > most || change[i] >= room[i]) continue;
      change[i]++;
      sum += cost;
      moved = true;
    }
  }
  return { pixels: { ...pixels, values: values.map((v, i) => v + sign[i] * change[i]) }, distance: Math.sqrt(Math.max(sum, 0)) / 255 };
}

// ---- sizes and drawings

export function fitted(from, width, height) {
  const canvas = canvasOf(width, height), to = context(canvas), scale = Math.min(width / from.width, height / from.height);
  to.fillRect(0, 0, width, height);
  to.imageSmoothingQuality = "high";
  to.drawImage(from, (width - from.width * scale) / 2, (height - from.height * scale) / 2, from.width * scale, from.height * scale);
  return canvas;
}

// A drawing, placed as the digits of MNIST are: 20 pixels high in 28, the centre of mass in the middle.
export function placed(from, width, height) {
  const size = from.width, data = context(from).getImageData(0, 0, size, size).data;
  let left = size, top = size, right = -1, bottom = -1, mass = 0, sumX = 0, sumY = 0;
  for (let y = 0; y < size; y++) for (let x = 0; x < size; x++) {
    const value = data[4 * (y * size + x)];
    if (value < 20) continue;
    left = Math.min(left, x); right = Math.max(right, x); top = Math.min(top, y); bottom = Math.max(bottom, y);
    mass += value; sumX += value * x; sumY += value * y;
  }
  const canvas = canvasOf(width, height), to = context(canvas);
  to.fillRect(0, 0, width, height);
  if (!mass) return canvas;
  const scale = 20 / 28 * Math.min(width, height) / Math.max(right - left + 1, bottom - top + 1);
  to.imageSmoothingQuality = "high";
  to.setTransform(scale, 0, 0, scale, width / 2 - sumX / mass * scale, height / 2 - sumY / mass * scale);
  to.drawImage(from, 0, 0);
  return canvas;
}

// Shows `from` on the canvas `to`, at its own size; in grey where the service read grey.
export function show(from, to, grey = false) {
  const picture = grey ? canvasWith(pixelsOf(from, 1)) : from;
  to.width = picture.width;
  to.height = picture.height;
  context(to).drawImage(picture, 0, 0);
}

// Draws `after` minus `before`, red where brighter and blue where darker; returns the strongest change of a value.
export function drawDifference(before, after, to) {
  const { width, height } = after;
  to.width = width;
  to.height = height;
  if (before.width !== width || before.height !== height) return 0;
  const a = context(before).getImageData(0, 0, width, height).data, b = context(after).getImageData(0, 0, width, height).data;
  const signed = new Float64Array(width * height);
  let strongest = 0;
  for (let i = 0; i < signed.length; i++) for (let c = 0; c < 3; c++) {
    const d = b[4 * i + c] - a[4 * i + c];
    signed[i] += d / 3;
    strongest = Math.max(strongest, Math.abs(d));
  }
  const pixels = context(to).createImageData(width, height);
  for (let i = 0; i < signed.length; i++) {
    const s = signed[i] / Math.max(1, strongest), faint = 255 * (1 - Math.abs(s));
    pixels.data.set(s > 0 ? [255, faint, faint, 255] : [faint, faint, 255, 255], 4 * i);
  }
  context(to).putImageData(pixels, 0, 0);
  return strongest;
}
