// The model on the device: fetches runtime and model once, keeps them, and answers for photos.
// A Web Worker, so that the page stays quick. Messages in: start, photo. Out: progress and replies.

import { answerOf } from './answer.js';
import { BadPhoto, pixelsOf } from './pixels.js';

const BUILDS = {
  webgpu: { loader: 'ort.webgpu.min.mjs', glue: 'ort-wasm-simd-threaded.asyncify' },
  wasm: { loader: 'ort.wasm.min.mjs', glue: 'ort-wasm-simd-threaded' },
};
const ALIKE = 0.005; // of the probabilities that `pomona.export.phone` found for the same pattern
const MOST_THREADS = 4;
const PATIENCE = 20_000; // milliseconds until the runtime has to be up

let about; // device.json
let ort;
let session;

let turn = Promise.resolve(); // a session runs one photo at a time
self.onmessage = ({ data }) => {
  turn = turn.then(() => reply(data));
};

async function reply(data) {
  try {
    const value = await (data.kind === 'start' ? start(data) : photo(data));
    self.postMessage({ id: data.id, value });
  } catch (error) {
    const code = typeof error.code === 'string' ? error.code : 'failed';
    self.postMessage({ id: data.id, error: { code, detail: String(error.message ?? error) } });
  }
}

class Trouble extends Error {
  constructor(code, message) {
    super(message);
    this.code = code;
  }
}

// --- start -------------------------------------------------------------------------------------

/** Load what there is; return the backend's name and the number of threads. */
async function start({ runtime, keep, key, only, threads }) {
  const store = keep ? await openStore(keep) : null;
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  about = await aboutModel(store, headers);
  const backends = only ? [only] : (await hasGpu()) ? ['webgpu', 'wasm'] : ['wasm'];
  const progress = meter(about.bytes + runtime.bytes[packed(backends[0], runtime)]);
  const model = await whole(store, `device/${about.file}`, headers, progress);
  await check(model);
  let last;
  for (const backend of backends) {
    try {
      await open(backend, store, runtime, model, progress, threads);
      return { backend, threads: ort.env.wasm.numThreads, version: about.version };
    } catch (error) {
      last = error; // the next one may do; the last one's error is told
    }
  }
  throw last;
}

/** The address of a file of the page: all are relative to this one. */
const address = (name) => new URL(name, import.meta.url).href;

async function openStore(name) {
  try {
    return await caches.open(name);
  } catch {
    return null; // not over plain http from another machine, nor in some private windows
  }
}

async function aboutModel(store, headers) {
  const url = address('device/device.json');
  let response;
  try {
    response = await fetch(url, { headers });
  } catch {
    response = await store?.match(url);
    if (!response) throw new Trouble('offline', 'the model was never loaded, and there is no network');
    return response.json();
  }
  if (response.status === 401) throw new Trouble('unauthorized', 'a key is needed');
  if (!response.ok) throw new Trouble('failed', `device.json: ${response.status}`);
  await put(store, url, response.clone());
  return response.json();
}

/** Return the bytes of a file whose address changes with its content; it is fetched only once. */
async function whole(store, name, headers, progress) {
  const url = address(name);
  const kept = await store?.match(url);
  if (kept) {
    const bytes = new Uint8Array(await kept.arrayBuffer());
    progress(bytes.length);
    return bytes;
  }
  let response;
  try {
    response = await fetch(url, { headers });
  } catch {
    throw new Trouble('offline', `${name} can't be loaded: there is no network`);
  }
  if (response.status === 401) throw new Trouble('unauthorized', 'a key is needed');
  if (!response.ok) throw new Trouble('failed', `${name}: ${response.status}`);
  const type = response.headers.get('Content-Type') ?? 'application/octet-stream';
  const bytes = await read(response, progress);
  await put(store, url, new Response(bytes, { headers: { 'Content-Type': type } }));
  return bytes;
}

async function read(response, progress) {
  const parts = [];
  const reader = response.body.getReader();
  for (let step = await reader.read(); !step.done; step = await reader.read()) {
    parts.push(step.value);
    progress(step.value.length);
  }
  const bytes = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    bytes.set(part, at);
    at += part.length;
  }
  return bytes;
}

async function put(store, url, response) {
  try {
    await store?.put(url, response);
  } catch {
    // No room: it works now, and is fetched again the next time.
  }
}

/** Count bytes. */
function meter(total) {
  let done = 0;
  return (bytes) => {
    done += bytes;
    self.postMessage({ progress: { done: Math.min(done, total), total } });
  };
}

async function check(bytes) {
  let fits = bytes.length === about.bytes;
  if (fits && globalThis.crypto?.subtle) {
    const digest = new Uint8Array(await crypto.subtle.digest('SHA-256', bytes));
    fits = Array.from(digest, (byte) => byte.toString(16).padStart(2, '0')).join('') === about.sha256;
  }
  if (!fits) throw new Trouble('failed', 'the model arrived damaged: load the page again');
}

async function hasGpu() {
  try {
    const adapter = await navigator.gpu?.requestAdapter();
    // A GPU that is computed is slower than WebAssembly.
    return Boolean(adapter) && !(adapter.info?.isFallbackAdapter ?? adapter.isFallbackAdapter);
  } catch {
    return false;
  }
}

async function open(backend, store, runtime, model, progress, wanted) {
  const { loader, glue } = BUILDS[backend];
  const { folder } = runtime;
  const wasm = await unpacked(await whole(store, packed(backend, runtime), {}, progress));
  // Imports go past this code; kept, the service worker has them when there is no network.
  for (const name of [loader, `${glue}.mjs`]) await whole(store, folder + name, {}, () => {});
  ort = await import(address(folder + loader));
  ort.env.logLevel = 'error';
  ort.env.wasm.wasmPaths = { mjs: address(`${folder}${glue}.mjs`) };
  ort.env.wasm.wasmBinary = wasm;
  ort.env.wasm.numThreads = threads(wanted);
  ort.env.wasm.initTimeout = PATIENCE; // threads that can't be had would be waited for for ever
  const options = { executionProviders: [backend], logSeverityLevel: 3 };
  session = await ort.InferenceSession.create(model, options);
  ort.env.wasm.wasmBinary = undefined;
  await probe();
}

const packed = (backend, { folder }) => `${folder}${BUILDS[backend].glue}.wasm.gz`;

function threads(wanted) {
  if (!globalThis.crossOriginIsolated) return 1;
  const cores = navigator.hardwareConcurrency ?? 1;
  return wanted ?? Math.max(1, Math.min(MOST_THREADS, cores >> 1));
}

/** Some hosts unpack .gz files themselves. */
async function unpacked(bytes) {
  if (bytes[0] !== 0x1f || bytes[1] !== 0x8b) return bytes;
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** Refuse a runtime that answers otherwise than Python's: a driver of a GPU may compute wrongly. */
async function probe() {
  const { size } = about;
  const pixels = new Uint8Array(size * size * 3);
  for (let y = 0, at = 0; y < size; y++) {
    for (let x = 0; x < size; x++) {
      for (let c = 0; c < 3; c++) pixels[at++] = 3 * x + 5 * y + 80 * c;
    }
  }
  const { probabilities } = await run(pixels);
  const wrong = about.probe.probabilities.some((p, n) => !(Math.abs(p - probabilities[n]) < ALIKE));
  if (wrong) throw new Trouble('failed', 'this browser computes other answers than Python');
}

// --- photos ------------------------------------------------------------------------------------

async function photo({ file, top }) {
  const began = performance.now();
  const pixels = await pixelsOf(file, about.size).catch((error) => {
    if (error instanceof BadPhoto) throw new Trouble(error.code, error.message);
    throw error;
  });
  const { probabilities, score } = await run(pixels);
  const answer = answerOf(probabilities, score, about, top);
  return { answer, milliseconds: performance.now() - began, version: about.version };
}

async function run(pixels) {
  const image = new ort.Tensor('uint8', pixels, [1, about.size, about.size, 3]);
  const { probabilities, score } = await session.run({ image });
  return { probabilities: probabilities.data, score: score.data[0] };
}
