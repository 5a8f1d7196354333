// Questions to the service behind the page.

const PATIENCE = 60_000; // milliseconds for one photo

/** Return the service's answer for a file; an error has a `code`, and `after` seconds to wait. */
export async function recognise(file, key, top = 5) {
  // Whatever isn't called an image may be one all the same: the service looks at the bytes.
  const type = file.type.startsWith('image/') ? file.type : 'application/octet-stream';
  const headers = { 'Content-Type': type };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    const url = new URL(`v1/predict?top=${top}`, document.baseURI);
    const signal = AbortSignal.timeout(PATIENCE);
    response = await fetch(url, { method: 'POST', body: file, headers, signal, cache: 'no-store' });
  } catch (error) {
    throw trouble(error.name === 'TimeoutError' ? 'slow' : 'down', error.message);
  }
  const content = await response.json().catch(() => ({}));
  if (!response.ok) throw refusal(response, content);
  const answer = content.answers?.[0];
  if (!answer) throw trouble('failed', 'the service sent no answer');
  if (answer.error) throw trouble(answer.error, answer.error);
  return { answer, milliseconds: content.milliseconds, version: content.model?.version };
}

const CODES = {
  401: 'unauthorized',
  403: 'unauthorized',
  408: 'slow',
  413: 'too_large',
  415: 'not_an_image',
  429: 'overloaded',
  502: 'down',
  503: 'overloaded',
  504: 'down',
};

function refusal(response, content) {
  const { status } = response;
  const code = CODES[status] ?? content.code ?? 'failed';
  const after = Number.parseInt(response.headers.get('Retry-After') ?? '', 10);
  return Object.assign(trouble(code, content.detail ?? content.title ?? `status ${status}`), { after });
}

function trouble(code, detail) {
  return Object.assign(new Error(detail), { code });
}
