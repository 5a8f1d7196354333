// The page's side of `worker.js`: questions and their answers.

let worker = null;
let waiting = new Map();
let count = 0;
let onProgress = () => {};
let started = null;
let wind = () => {};

const PATIENCE = 60_000; // milliseconds

/** Load runtime and model, once. Where that fails or hangs, the plainest way is tried too. */
export function start(options, progress) {
  onProgress = progress ?? onProgress;
  started ??= begin(options).catch((error) => {
    stop();
    throw error;
  });
  return started;
}

async function begin(options) {
  try {
    return await heard(ask('start', options));
  } catch (error) {
    if (error.code !== 'failed') throw error;
    end();
    return heard(ask('start', { ...options, only: 'wasm', threads: 1 }));
  }
}

/** Fail if the worker says nothing for too long: a GPU's driver or a thread may hang it. */
async function heard(promise) {
  let timer;
  const silence = new Promise((_, reject) => {
    wind = () => {
      clearTimeout(timer);
      timer = setTimeout(reject, PATIENCE, trouble('failed', 'the runtime doesn’t start'));
    };
    wind();
  });
  try {
    return await Promise.race([promise, silence]);
  } finally {
    clearTimeout(timer);
    wind = () => {};
  }
}

/** End the worker and let go of its memory. */
export function stop() {
  end();
  started = null;
}

function end() {
  worker?.terminate();
  for (const { reject } of waiting.values()) reject(trouble('stopped', 'stopped'));
  worker = null;
  waiting = new Map();
}

export function recognise(file, top = 5) {
  return ask('photo', { file, top });
}

function ask(kind, content) {
  worker ??= make();
  const id = ++count;
  return new Promise((resolve, reject) => {
    waiting.set(id, { resolve, reject });
    worker.postMessage({ id, kind, ...content });
  });
}

function make() {
  const made = new Worker(new URL('worker.js', import.meta.url), { type: 'module' });
  made.onmessage = ({ data }) => {
    wind();
    if (data.progress) return onProgress(data.progress);
    const { resolve, reject } = waiting.get(data.id);
    waiting.delete(data.id);
    if (data.error) reject(trouble(data.error.code, data.error.detail));
    else resolve(data.value);
  };
  made.onerror = (event) => {
    event.preventDefault();
    for (const { reject } of waiting.values()) reject(trouble('failed', event.message));
    waiting.clear();
  };
  return made;
}

function trouble(code, detail) {
  return Object.assign(new Error(detail), { code });
}
