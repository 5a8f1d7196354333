// The service worker: the page without a network. `pomona.web.page` sets FILES (digests by path),
// GUARDED (paths that need a key) and DRESS (headers for threads) before it.
//
// Small files come from the network while there is one, and are kept; whatever changes its address
// with its content comes from what `worker.js` keeps. Nothing else is touched: questions to the
// service never pass through here.

const SCOPE = new URL('./', self.location).pathname;
const KEPT = `pomona-kept ${SCOPE}`;
const SHELL = `pomona-page ${SCOPE} ${FILES.version}`;
const PATIENCE = 4000; // milliseconds until a slow network counts as none
const lasting = (name) => name.startsWith('runtime/') || name.startsWith('device/');
const shell = Object.keys(FILES.digests).filter((name) => !lasting(name));

self.addEventListener('install', (event) => event.waitUntil(install()));
self.addEventListener('activate', (event) => event.waitUntil(activate()));
self.addEventListener('fetch', (event) => {
  const url = new URL(event.request.url);
  if (event.request.method !== 'GET' || url.origin !== self.location.origin) return;
  if (!url.pathname.startsWith(SCOPE)) return;
  const name = url.pathname.slice(SCOPE.length) || 'index.html';
  if (shell.includes(name)) event.respondWith(fresh(event.request, name).then(dressed));
  else if (name.startsWith('runtime/')) event.respondWith(kept(event.request).then(dressed));
});

async function install() {
  const cache = await caches.open(SHELL);
  await Promise.all(shell.map((name) => fetched(cache, name)));
  await self.skipWaiting();
}

async function fetched(cache, name) {
  // Some hosts lead from index.html to ./, and a page that was led elsewhere can't be given out.
  const response = await fetch(name === 'index.html' ? './' : name, { cache: 'no-cache' });
  if (!response.ok) throw new Error(`${name}: ${response.status}`);
  await cache.put(name, response);
}

/** Remove what older versions of this page left; other pages of the same host keep theirs. */
async function activate() {
  for (const name of await caches.keys()) {
    if (name.startsWith(`pomona-page ${SCOPE} `) && name !== SHELL) await caches.delete(name);
  }
  const cache = await caches.open(KEPT);
  for (const request of await cache.keys()) {
    const name = new URL(request.url).pathname.slice(SCOPE.length);
    if (!(name in FILES.digests) && !GUARDED.includes(name)) await cache.delete(request);
  }
  await self.clients.claim();
}

async function fresh(request, name) {
  const cache = await caches.open(SHELL);
  const here = await cache.match(name);
  const asked = fetch(request).then(async (response) => {
    if (response.ok && !response.redirected) await cache.put(name, response.clone());
    return response;
  });
  if (!here) return asked;
  asked.catch(() => {}); // it may fail after the answer was given
  const late = new Promise((done) => setTimeout(done, PATIENCE, here));
  return Promise.race([asked, late]).then(
    (response) => (response.status < 500 ? response : here),
    () => here,
  );
}

async function kept(request) {
  const cache = await caches.open(KEPT);
  return (await cache.match(request.url)) ?? fetch(request);
}

/** Without these headers, which a static host doesn't send, the runtime may not use threads. */
function dressed(response) {
  if (response.type === 'opaqueredirect' || !response.ok) return response;
  const headers = new Headers(response.headers);
  for (const [name, value] of Object.entries(DRESS)) headers.set(name, value);
  const { status, statusText } = response;
  return new Response(response.body, { status, statusText, headers });
}
