// What the page says, by the codes of the tables and of the service.

const NOT_USED = {
  unreadable: ['This file can’t be read', 'It may have been moved or changed. Choose it again.'],
  empty: ['This file is empty', 'Copy it again from where it came from, and choose the copy.'],
  not_an_image: ['This isn’t a photo', 'Choose a JPEG, PNG, WebP, GIF, BMP or TIFF file.'],
  truncated: [
    'This photo is damaged or cut off',
    'A part of the file is missing. Copy it again, or choose another photo.',
  ],
  too_large: ['This photo is too large', 'Save it with fewer pixels, or choose another photo.'],
  crashed: ['This photo can’t be used', 'Reading it failed. Choose another photo.'],
};

const NO_ANSWER = {
  overloaded: ['The service is busy', 'It takes no more photos at the moment. Try again in a while.'],
  down: ['The service doesn’t answer', 'Check the connection, then try again.'],
  slow: ['The service takes too long', 'The connection may be slow. Try again, or use a smaller photo.'],
  unauthorized: ['A key is needed', 'This service answers only those who have one.'],
  offline: [
    'The model isn’t on this device yet',
    'Connect to the network once. After that it works without.',
  ],
};

/** Return title, text, and whether it makes sense to try the same photo again. */
export function wordsFor(code, detail) {
  if (code in NOT_USED) return [...NOT_USED[code], false];
  if (code in NO_ANSWER) return [...NO_ANSWER[code], true];
  return ['That didn’t work', sentence(detail || 'Try again.'), true];
}

export function sentence(text) {
  const upper = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?…]$/.test(upper) ? upper : `${upper}.`;
}

export function share(value) {
  const hundred = 100 * value;
  if (hundred > 0 && hundred < 1) return '< 1 %';
  return `${hundred > 99 && hundred < 100 ? Math.floor(hundred) : Math.round(hundred)} %`;
}

export function megabytes(bytes) {
  return `${(bytes / 1e6).toFixed(1)} MB`;
}

export function milliseconds(value) {
  return `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;
}
