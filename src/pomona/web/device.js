// The page's side of `worker.js`: questions and their answers.

let worker = null;
let waiting = new Map();
let count = 0;
let onProgress = () => {};
let started = null;

/** Load runtime and model, once. */
export function start(options, progress) {
  onProgress = progress;
  started ??= ask('start', options).catch((error) => {
    stop();
    throw error;
  });
  return started;
}

/** End the worker and let go of its memory. */
export function stop() {
  worker?.terminate();
  for (const { reject } of waiting.values()) reject(trouble('stopped', 'stopped'));
  worker = null;
  started = null;
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
