// From a photo's file to the pixels that the model takes, as `pomona.images.decode` makes them.
//
// The resize is Pillow's: a triangle filter that widens as the photo shrinks, in two passes with
// 8-bit results and 22-bit weights. The canvas's own scaling differs far more (docs/page.md).

const MOST_BYTES = 128 << 20;
const MOST_PIXELS = 64e6;
const BITS = 22;
const STRIP = 256; // rows or columns that are read back at a time: a canvas of a whole photo may be too large

/** What can't be used, with one of the codes of Pomona's tables. */
export class BadPhoto extends Error {
  constructor(code) {
    super(code);
    this.code = code;
  }
}

/** Return RGB pixels [size, size, 3] of a file, stretched to a square, transparency onto white. */
export async function pixelsOf(blob, size) {
  if (!blob.size) throw new BadPhoto('empty');
  if (blob.size > MOST_BYTES) throw new BadPhoto('too_large');
  const image = await decoded(blob);
  try {
    if (image.width * image.height > MOST_PIXELS) throw new BadPhoto('too_large');
    return resized(image, size, draft(image, size, await isJpeg(blob)));
  } finally {
    image.close();
  }
}

async function decoded(blob) {
  const known = signature(await head(blob));
  if (known && !(await isWhole(blob, known))) throw new BadPhoto('truncated');
  try {
    // Upright as the EXIF tag says (the default); colours as they stand in the file.
    return await createImageBitmap(blob, { colorSpaceConversion: 'none' });
  } catch {
    throw new BadPhoto(known ? 'truncated' : 'not_an_image');
  }
}

const head = async (blob) => new Uint8Array(await blob.slice(0, 12).arrayBuffer());
const isJpeg = async (blob) => signature(await head(blob)) === 'jpeg';

function signature(bytes) {
  const text = String.fromCharCode(...bytes);
  if (text.startsWith('\xff\xd8')) return 'jpeg';
  if (text.startsWith('\x89PNG')) return 'png';
  if (text.startsWith('GIF8')) return 'gif';
  if (text.startsWith('BM')) return 'bmp';
  if (text.startsWith('RIFF') && text.slice(8, 12) === 'WEBP') return 'webp';
  if (['II*\0', 'MM\0*', 'II+\0', 'MM\0+'].includes(text.slice(0, 4))) return 'tiff';
  return null;
}

/** A browser shows what there is of a photo that ends too early; Pomona refuses it. */
async function isWhole(blob, kind) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  if (kind === 'jpeg') return lastPair(bytes, 0xff, 0xd9);
  if (kind === 'png') return lastPair(bytes, 0x49, 0x45, 0x4e, 0x44);
  const numbers = new DataView(bytes.buffer);
  if (kind === 'webp') return bytes.length >= 12 && bytes.length >= numbers.getUint32(4, true);
  return true;
}

/** Tell whether these bytes stand in the last 64 KB: cameras write more behind a photo's end. */
function lastPair(bytes, ...wanted) {
  const from = Math.max(0, bytes.length - 65536);
  for (let at = bytes.length - wanted.length; at >= from; at--) {
    if (wanted.every((byte, n) => bytes[at + n] === byte)) return true;
  }
  return false;
}

/** The whole number by which Pomona's JPEG decoder shrinks a large photo before the filter. */
function draft(image, size, jpeg) {
  if (!jpeg || Math.min(image.width, image.height) <= 2 * size) return 1;
  const most = Math.min(Math.floor(image.width / (2 * size)), Math.floor(image.height / (2 * size)));
  return [8, 4, 2, 1].find((scale) => scale <= most);
}

function resized(image, size, scale) {
  const width = Math.ceil(image.width / scale);
  const height = Math.ceil(image.height / scale);
  const across = { taps: weights(width, size), size };
  const down = { taps: weights(height, size), size };
  const square = new Uint8Array(size * size * 3);
  if (downFirst(width, height, size)) {
    const low = new Uint8Array(size * width * 3);
    for (const { rgba, at, wide } of strips(image, scale, false)) {
      for (let n = 0; n < wide; n++) {
        pass(rgba, n * 4, wide * 4, low, (at + n) * 3, width * 3, down);
      }
    }
    for (let row = 0; row < size; row++) {
      pass(low, row * width * 3, 3, square, row * size * 3, 3, across);
    }
    return square;
  }
  const narrow = new Uint8Array(height * size * 3);
  for (const { rgba, at, wide, tall } of strips(image, scale, true)) {
    for (let n = 0; n < tall; n++) {
      pass(rgba, n * wide * 4, 4, narrow, (at + n) * size * 3, 3, across);
    }
  }
  for (let column = 0; column < size; column++) {
    pass(narrow, column * 3, size * 3, square, column * 3, size * 3, down);
  }
  return square;
}

/** The order of the passes in Pillow 13, by trial; the other one differs by a level here and there. */
function downFirst(width, height, size) {
  return height > size && height - size > 2 * (width - size);
}

/** Yield the photo in strips of rows, or of columns, each on white and shrunk by `scale`. */
function* strips(image, scale, rows) {
  const length = rows ? image.height : image.width;
  const canvas = new OffscreenCanvas(
    rows ? image.width : Math.min(STRIP * scale, length),
    rows ? Math.min(STRIP * scale, length) : image.height,
  );
  const paper = canvas.getContext('2d', { willReadFrequently: true });
  paper.fillStyle = '#fff';
  for (let from = 0; from < length; from += STRIP * scale) {
    paper.fillRect(0, 0, canvas.width, canvas.height);
    paper.drawImage(image, rows ? 0 : -from, rows ? -from : 0);
    const left = Math.min(STRIP * scale, length - from);
    const width = rows ? image.width : left;
    const height = rows ? left : image.height;
    const { data } = paper.getImageData(0, 0, width, height);
    yield {
      rgba: scale > 1 ? averaged(data, width, height, scale) : data,
      at: from / scale,
      wide: Math.ceil(width / scale),
      tall: Math.ceil(height / scale),
    };
  }
}

/** Return means of squares of scale × scale pixels: what libjpeg's scaled transform comes to. */
function averaged(rgba, width, height, scale) {
  const wide = Math.ceil(width / scale);
  const tall = Math.ceil(height / scale);
  const means = new Uint8Array(wide * tall * 4);
  for (let y = 0; y < tall; y++) {
    const bottom = Math.min(height, (y + 1) * scale);
    for (let x = 0; x < wide; x++) {
      const right = Math.min(width, (x + 1) * scale);
      let red = 0;
      let green = 0;
      let blue = 0;
      for (let v = y * scale; v < bottom; v++) {
        for (let u = x * scale, at = (v * width + u) * 4; u < right; u++, at += 4) {
          red += rgba[at];
          green += rgba[at + 1];
          blue += rgba[at + 2];
        }
      }
      const count = (bottom - y * scale) * (right - x * scale);
      const to = (y * wide + x) * 4;
      means[to] = (red / count + 0.5) | 0;
      means[to + 1] = (green / count + 0.5) | 0;
      means[to + 2] = (blue / count + 0.5) | 0;
    }
  }
  return means;
}

/** Return for each of `size` places the first pixel that counts, how many do, and their weights. */
function weights(length, size) {
  const scale = length / size;
  const reach = Math.max(1, scale);
  const taps = [];
  for (let n = 0; n < size; n++) {
    const centre = (n + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - reach + 0.5));
    const last = Math.min(length, Math.trunc(centre + reach + 0.5));
    const near = [];
    for (let at = first; at < last; at++) {
      near.push(Math.max(0, 1 - Math.abs((at - centre + 0.5) / reach)));
    }
    const sum = near.reduce((a, b) => a + b, 0);
    const fixed = near.map((value) => Math.trunc(0.5 + (value / sum) * (1 << BITS)));
    taps.push({ first, fixed: Int32Array.from(fixed) });
  }
  return taps;
}

/** Filter one row or column of three channels. */
function pass(from, start, step, to, place, stride, { taps, size }) {
  for (let n = 0; n < size; n++, place += stride) {
    const { first, fixed } = taps[n];
    let red = 1 << (BITS - 1);
    let green = red;
    let blue = red;
    for (let k = 0, at = start + first * step; k < fixed.length; k++, at += step) {
      const weight = fixed[k];
      red += from[at] * weight;
      green += from[at + 1] * weight;
      blue += from[at + 2] * weight;
    }
    to[place] = red >> BITS;
    to[place + 1] = green >> BITS;
    to[place + 2] = blue >> BITS;
  }
}
