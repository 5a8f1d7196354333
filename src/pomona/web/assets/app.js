// The page: takes photos in, asks the service or the device, and shows what they say.

import * as device from './device.js';
import * as service from './service.js';
import { megabytes, milliseconds, sentence, share, wordsFor } from './words.js';

const MOST = 24; // photos that are kept, and taken at a time
const AT_ONCE = 2; // questions to the service
const LONGEST_WAIT = 30; // seconds that the page waits by itself when the service is busy
const PREVIEW = 720; // pixels of the longer side

const $ = (id) => document.getElementById(id);
const items = []; // newest first
let config = null;
let selected = null;
let asking = 0;
let count = 0;
let previews = Promise.resolve(); // the last one's end

class Item {
  constructor(file, name) {
    Object.assign(this, { file, name, id: ++count, state: 'waiting', retried: false });
  }
}

// --- photos in ---------------------------------------------------------------------------------

function take(files, name) {
  const fresh = [...files].slice(0, MOST).map((file) => new Item(file, name ?? file.name));
  if (!fresh.length) return say('That held no photo file.');
  if (files.length > MOST) say(`The first ${MOST} of ${files.length} photos are taken.`);
  items.unshift(...fresh);
  for (const old of items.splice(MOST)) forget(old);
  selected = fresh[0];
  for (const item of fresh) previews = previews.then(() => preview(item));
  show();
  next();
}

/**
 * A small picture, which stays; the decoded photo, tens of megabytes large, goes at once. One photo after
 * the other, or many of them would be in memory together.
 */
async function preview(item) {
  if (!items.includes(item)) return;
  try {
    const image = await createImageBitmap(item.file);
    const scale = Math.min(1, PREVIEW / Math.max(image.width, image.height));
    const canvas = document.createElement('canvas');
    canvas.width = Math.max(1, Math.round(image.width * scale));
    canvas.height = Math.max(1, Math.round(image.height * scale));
    const paper = canvas.getContext('2d');
    paper.imageSmoothingQuality = 'high';
    paper.fillStyle = '#fff';
    paper.fillRect(0, 0, canvas.width, canvas.height);
    paper.drawImage(image, 0, 0, canvas.width, canvas.height);
    image.close();
    const blob = await new Promise((done) => canvas.toBlob(done, 'image/jpeg', 0.85));
    if (blob && items.includes(item)) item.url = URL.createObjectURL(blob);
  } catch {
    // The browser can't show it. The service may know the format all the same.
  }
  show();
}

function forget(item) {
  if (item.url) URL.revokeObjectURL(item.url);
  item.url = null;
  item.state = 'gone';
}

function clear() {
  for (const item of items.splice(0)) forget(item);
  selected = null;
  show();
  say('All photos are cleared.');
  $('choose').focus();
}

// --- questions ---------------------------------------------------------------------------------

const here = () => !config.service || $('here').checked;

/** Ask for as many photos as may be asked at once; the one on show comes first. */
function next() {
  while (config && asking < (here() ? 1 : AT_ONCE)) {
    const item = [selected, ...items].find((one) => one?.state === 'waiting');
    if (!item) return;
    ask(item);
  }
}

async function ask(item) {
  asking++;
  item.state = 'working';
  item.note = null;
  item.here = here();
  show();
  try {
    const reply = await (item.here ? onDevice(item) : onService(item));
    if (item.state === 'gone') return;
    Object.assign(item, reply, { state: 'done', error: null });
    credits(reply.version);
    say(spoken(item));
  } catch (error) {
    if (item.state !== 'gone') refuse(item, error);
  } finally {
    asking--;
    show();
    next();
  }
}

async function onDevice(item) {
  await load();
  try {
    return await device.recognise(item.file);
  } catch (error) {
    if (error.code === 'failed') {
      device.stop(); // a GPU may be lost: the next try begins anew
      loaded = false;
    }
    throw error;
  }
}

async function onService(item) {
  if (config.key && !key()) throw Object.assign(new Error('no key'), { code: 'unauthorized' });
  try {
    return await service.recognise(item.file, key());
  } catch (error) {
    if (error.code !== 'overloaded' || item.retried) throw error;
    item.retried = true;
    const seconds = Math.min(LONGEST_WAIT, Math.max(1, error.after || 1));
    item.note = `The service is busy. Trying again in ${seconds} s …`;
    show();
    await new Promise((done) => setTimeout(done, 1000 * seconds));
    return service.recognise(item.file, key());
  }
}

function refuse(item, error) {
  item.state = 'error';
  item.error = error;
  if (error.code === 'stopped') item.state = 'waiting'; // the switch was turned meanwhile
  else if (error.code === 'unauthorized') askForKey();
  else say(spoken(item));
}

function again(item) {
  item.state = 'waiting';
  item.retried = false;
  show();
  next();
}

// --- the key -----------------------------------------------------------------------------------

const KEY = 'pomona.key';
let given = null; // holds the key also where the browser keeps nothing

function key() {
  given ??= recalled(KEY, 'sessionStorage');
  return given;
}

function askForKey() {
  if ($('ask').open) return;
  $('ask-text').textContent = key()
    ? 'The one that was given was not accepted.'
    : 'It is kept until this tab is closed.';
  $('key').value = '';
  $('ask').showModal();
}

function useKey(event) {
  event.preventDefault();
  const typed = $('key').value.trim();
  if (!/^[\x20-\x7e]+$/.test(typed)) { // `fetch` throws where a header holds others
    $('ask-text').textContent = 'A key has only plain letters, digits and signs. Type it again.';
    $('key').select();
    return;
  }
  given = typed;
  remember(KEY, given, 'sessionStorage');
  $('ask').close();
  for (const item of items) if (item.error?.code === 'unauthorized') item.state = 'waiting';
  if (here()) load().catch(() => {});
  show();
  next();
}

// --- the device --------------------------------------------------------------------------------

const MODE = 'pomona.here';
let loaded = false;
let loading = null;

/** Load the model into the page, and say so, once for all who wait for it. */
function load() {
  if (!loaded && !loading) say('Loading the model …');
  loading ??= loadNow().finally(() => {
    loading = null;
  });
  return loading;
}

/** Shows how far it is. */
async function loadNow() {
  const bar = $('progress');
  const asked = new URLSearchParams(location.search); // ?runtime=wasm&threads=1, to find faults
  const only = asked.get('runtime');
  const threads = Number(asked.get('threads')) || null;
  const keep = `pomona-kept ${new URL('./', document.baseURI).pathname}`;
  if (!loaded) where('Loading the model …');
  try {
    const options = { runtime: config.runtime, keep, key: key(), only, threads };
    await device.start(options, ({ done, total }) => {
      bar.hidden = false;
      bar.max = total;
      bar.value = done;
      where(`Loading the model: ${megabytes(done)} of ${megabytes(total)}, once.`);
    });
  } catch (error) {
    bar.hidden = true;
    if (error.code === 'unauthorized') askForKey();
    const stopped = error.code === 'stopped';
    const text = stopped ? null : wordsFor(error.code, error.message).slice(0, 2).join('. ');
    where(text);
    if (text) say(text);
    throw error;
  }
  if (!loaded) say('The model is loaded.');
  loaded = true;
  bar.hidden = true;
  where();
}

function turn() {
  loaded = false;
  remember(MODE, $('here').checked ? 'yes' : null);
  if (here()) load().catch(() => {});
  else {
    device.stop();
    $('progress').hidden = true;
    where();
  }
  show();
  next();
}

function remember(name, value, storage = 'localStorage') {
  try {
    if (value === null) window[storage].removeItem(name);
    else window[storage].setItem(name, value);
  } catch {
    // Storage is off: switch and key are as they are until the page closes.
  }
}

function recalled(name, storage = 'localStorage') {
  try {
    return window[storage].getItem(name);
  } catch {
    return null;
  }
}

/** Say where photos go, or what keeps the device from answering. */
function where(text) {
  $('where').textContent = text ?? usual();
}

function usual() {
  if (!config) return '';
  // Nothing is kept where the connection isn't safe.
  if (here() && !isSecureContext) return 'Photos stay on this device.';
  if (here()) return 'Photos stay on this device, and it works without a network.';
  const goes = 'Photos go to this service, which doesn’t keep them.';
  return config.device ? goes : `${goes} On this device: off, ${config.device_reason}.`;
}

// --- what is shown -----------------------------------------------------------------------------

function make(tag, content, ...children) {
  const node = Object.assign(document.createElement(tag), content);
  node.append(...children);
  return node;
}

function say(text) {
  $('status').textContent = '';
  $('status').textContent = text;
}

function titleOf(item) {
  if (item.state === 'waiting') return 'Waiting …';
  if (item.state === 'working') return 'Looking …';
  if (item.state === 'error') return wordsFor(item.error.code, item.error.message)[0];
  return item.answer.unknown ? 'Not a fruit that I know' : item.answer.label;
}

function textOf(item) {
  if (item.note && item.state === 'working') return item.note;
  if (item.state === 'error') return wordsFor(item.error.code, item.error.message)[1];
  if (item.state !== 'done' || !item.answer.unknown) return '';
  return item.answer.reason ? sentence(item.answer.reason) : '';
}

function spoken(item) {
  return `${item.name}: ${titleOf(item)}${sure(item)}. ${textOf(item)}`.trim();
}

function sure({ state, answer }) {
  return state === 'done' && !answer.unknown ? `, ${share(answer.probability)}` : '';
}

function show() {
  document.body.classList.toggle('used', items.length > 0);
  $('answer').hidden = !selected;
  $('last').hidden = items.length === 0;
  if (selected) showAnswer(selected);
  showStrip();
}

function showAnswer(item) {
  const done = item.state === 'done';
  const panel = $('answer');
  panel.className = done && item.answer.unknown ? 'unknown' : item.state;
  panel.classList.toggle('bare', !item.url && item.state === 'error');
  panel.setAttribute('aria-busy', String(item.state === 'working' || item.state === 'waiting'));
  $('photo').hidden = !item.url;
  $('blank').hidden = Boolean(item.url) || item.state === 'error';
  if (item.url && $('photo').src !== item.url) $('photo').src = item.url;
  $('photo').alt = `The photo ${item.name}`;
  $('name').textContent = item.name;
  $('title').textContent = titleOf(item);
  $('text').textContent = textOf(item);
  $('nearest').hidden = !(done && item.answer.unknown);
  $('bars').replaceChildren(...(done ? bars(item.answer) : []));
  $('facts').textContent = done ? facts(item) : '';
  showActions(item);
}

/** Only if they changed, so that a button keeps the keyboard's focus; where it goes, the title has it. */
function showActions(item) {
  const panel = $('actions');
  const buttons = actions(item);
  const what = [item.id, ...buttons.map((button) => button.textContent)].join();
  if (panel.dataset.what === what) return;
  const focused = panel.contains(document.activeElement);
  panel.dataset.what = what;
  panel.replaceChildren(...buttons);
  if (focused) $('title').focus();
}

function bars({ nearest }) {
  return nearest.map(({ label, probability }) => {
    const bar = make('span', { className: 'bar', ariaHidden: 'true' });
    bar.style.setProperty('--share', probability);
    return make(
      'li',
      null,
      make('span', { className: 'label', textContent: label }),
      make('span', { className: 'share', textContent: share(probability) }),
      bar,
    );
  });
}

function facts(item) {
  return `${milliseconds(item.milliseconds)} ${item.here ? 'on this device' : 'on the server'}`;
}

function credits(version) {
  $('about').textContent = `Pomona ${config.pomona}${version ? ` · model ${version}` : ''}`;
}

/** Say which fruit there is to be recognised, as far as everybody may know. */
function knows({ labels, count }) {
  if (!count) return '';
  const more = count > labels.length ? `${count} labels, among them ` : '';
  return `It knows ${more}${new Intl.ListFormat('en-GB').format(labels)}.`;
}

function actions(item) {
  if (item.state !== 'error') return [];
  const found = [];
  const button = (text, className, onclick) =>
    found.push(make('button', { type: 'button', className, textContent: text, onclick }));
  if (item.error.code === 'unauthorized') button('Enter the key', 'main', askForKey);
  else if (wordsFor(item.error.code)[2]) button('Try again', 'main', () => again(item));
  const stuck = ['down', 'slow', 'overloaded'].includes(item.error.code);
  if (stuck && config.device && !here()) {
    button('Answer on this device', 'quiet', () => {
      $('here').checked = true;
      turn();
      again(item);
    });
  }
  return found;
}

/** Those that stay aren't moved, in the order that they have: they would lose the keyboard's focus. */
function showStrip() {
  const strip = $('strip');
  const nodes = new Map([...strip.children].map((node) => [Number(node.dataset.id), node]));
  for (const [id, node] of nodes) if (!items.some((item) => item.id === id)) node.remove();
  items.forEach((item, place) => {
    const node = filled(nodes.get(item.id) ?? thumbnail(item), item);
    const there = strip.children[place] ?? null;
    if (there !== node) strip.insertBefore(node, there);
  });
}

function thumbnail(item) {
  const onclick = () => {
    selected = item;
    show();
    $('answer').scrollIntoView({ block: 'nearest' }); // at once: there is no motion to reduce
    say(spoken(item));
  };
  const tile = make('span', { className: 'tile' }, make('img', { alt: '' }));
  const caption = make('span', { className: 'caption' });
  const node = make('li', null, make('button', { type: 'button', onclick }, tile, caption));
  node.dataset.id = item.id;
  return node;
}

function filled(node, item) {
  const button = node.firstChild;
  const [image, caption] = [button.querySelector('img'), button.lastChild];
  if (item.url && image.src !== item.url) image.src = item.url;
  image.hidden = !item.url;
  const unknown = item.state === 'done' && item.answer.unknown;
  caption.textContent = unknown ? 'Unknown' : titleOf(item);
  node.className = unknown ? 'unknown' : item.state;
  button.setAttribute('aria-label', `${item.name}: ${caption.textContent}${sure(item)}`);
  button.setAttribute('aria-current', String(item === selected));
  return node;
}

// --- begin -------------------------------------------------------------------------------------

function listen() {
  $('choose').onclick = () => $('files').click();
  $('take').onclick = () => $('camera').click();
  for (const input of [$('files'), $('camera')]) {
    input.onchange = () => {
      take(input.files);
      input.value = ''; // the same file may be chosen again
    };
  }
  $('clear').onclick = clear;
  $('here').onchange = turn;
  $('ask-form').onsubmit = useKey;
  $('ask-no').onclick = () => $('ask').close();
  document.addEventListener('paste', (event) => {
    const { files } = event.clipboardData;
    if (files.length) take(files, 'Pasted photo'); // its own name is image.png, always
    else if (!$('ask').open) say('There is no photo in the clipboard.');
  });
  document.addEventListener('dragover', (event) => {
    event.preventDefault();
    document.body.classList.add('over');
  });
  document.addEventListener('dragleave', (event) => {
    if (!event.relatedTarget) document.body.classList.remove('over');
  });
  document.addEventListener('drop', (event) => {
    event.preventDefault();
    document.body.classList.remove('over');
    take(event.dataTransfer.files);
  });
}

async function begin() {
  listen();
  navigator.serviceWorker?.register('sw.js', { updateViaCache: 'none' }).catch(() => {});
  config = await (await fetch('config.json', { cache: 'no-cache' })).json();
  credits(null);
  $('knows').textContent = knows(config);
  $('switch').hidden = !config.service;
  $('here').disabled = !config.device;
  $('here').checked = config.device && recalled(MODE) === 'yes';
  where();
  if (here()) load().catch(() => {});
  next();
}

begin().catch(() => where('The page can’t be loaded whole. Load it again.'));
