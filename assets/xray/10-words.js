// Small builders and wordings shared by every part. Model text enters the page only as text nodes.

const h = (tag, props = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (key === 'class') node.className = value;
    else if (key.startsWith('on')) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? '' : value);
  }
  node.append(...children);
  return node;
};

const ICONS = {
  first: 'M5 4h2v12H5zM16 4v12l-8-6z',
  back: 'M14 4v12l-8-6z',
  play: 'M6 3.5v13l10.5-6.5z',
  pause: 'M5 4h3.5v12H5zM11.5 4H15v12h-3.5z',
  forward: 'M6 4v12l8-6z',
  last: 'M4 4v12l8-6zM13 4h2v12h-2z',
};

const icon = name => {
  const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg');
  const path = document.createElementNS('http://www.w3.org/2000/svg', 'path');
  path.setAttribute('d', ICONS[name]);
  svg.setAttribute('viewBox', '0 0 20 20');
  svg.setAttribute('aria-hidden', 'true');
  svg.append(path);
  return svg;
};

const setText = (node, text) => {
  if (node.textContent !== text) node.textContent = text;
};

const setClass = (node, name) => {
  if (node.className !== name) node.className = name;
};

// A token for a label: blanks and control characters become visible, long ones are cut.
const visible = (piece, limit = 40) => {
  const cut = piece.length > limit ? piece.slice(0, limit) + '…' : piece;
  const shown = cut
    .replace(/\r\n|\n/g, '↵')
    .replace(/\t/g, '⇥')
    .replace(/^ +| +$/g, blanks => '␣'.repeat(blanks.length))
    .replace(/[\u0000-\u001f]/g, char => String.fromCharCode(0x2400 + char.charCodeAt(0)))
    .replace(/[\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g, char => `⟨u+${char.charCodeAt(0).toString(16)}⟩`);
  return shown || '⟨empty⟩';
};

// A token inside a sentence: ‘ the’. The isolates keep right-to-left text from turning the sentence round; no line breaks
// at the token's own spaces.
const quoted = piece => {
  const shown = visible(piece, 24);
  return `‘\u2068${/^␣+$/.test(shown) ? shown : shown.replace(/␣/g, '\u00a0')}\u2069’`;
};

const ordinal = n => {
  const tail = n % 100 > 10 && n % 100 < 14 ? 'th' : { 1: 'st', 2: 'nd', 3: 'rd' }[n % 10] || 'th';
  return `${n}${tail}`;
};

const plural = (n, word, many = word + 's') => `${n.toLocaleString('en')} ${n === 1 ? word : many}`;

const seconds = s => {
  if (s === null || s === undefined) return '–';
  if (s < 0.0095) return `${(s * 1000).toFixed(1)} ms`;
  if (s < 0.9995) return `${Math.round(s * 1000)} ms`;
  return s < 100 ? `${s.toFixed(2)} s` : `${Math.round(s)} s`;
};

const percent = p => (p === null || p === undefined ? '–' : `${Math.round(p * 100)} %`);

const decimal = (x, digits = 2) => (x === null || x === undefined ? '–' : x.toFixed(digits));

const stepKind = step => {
  if (!step.drafted.length) return 'plain';
  return step.accepted === step.drafted.length ? 'bonus' : 'correction';
};

const kindAt = (step, index) => (index < step.accepted ? 'accepted' : stepKind(step));

const KINDS = {
  first: { mark: '', name: 'first token', tip: 'The target chose it while reading the prompt, before any draft.' },
  accepted: { mark: '✓', name: 'accepted', tip: 'Guessed by the draft model, confirmed by the target.' },
  correction: { mark: '▲', name: 'correction', tip: 'The target’s own token, in place of the first wrong guess.' },
  bonus: { mark: '★', name: 'bonus', tip: 'Every guess was right, and the same pass gives one more token.' },
  rejected: { mark: '✗', name: 'rejected', tip: 'A wrong guess, and every guess after it: thrown away.' },
  mask: { mark: '▒', name: 'mask', tip: 'A slot of the block that is still to be drafted.' },
  plain: { mark: '', name: 'plain', tip: 'One token from one pass of the target: no draft.' },
};

// "Step 12: the draft guessed 7 tokens, the target kept 4 and corrected the 5th to ‘ the’."
const sentence = (run, index) => {
  if (index < 0) return prefillSentence(run);
  const step = run.steps[index];
  const k = step.drafted.length;
  const own = quoted(step.pieces.posterior[step.accepted]);
  const start = `Step ${index + 1}: `;
  if (!k) return `${start}no draft. One pass of the target gave one token, ${own}.`;
  const guessed = `${start}the draft guessed ${plural(k, 'token')}, the target kept `;
  const ended = index === run.steps.length - 1 ? endSentence(run) : '';
  if (step.committed.length <= step.accepted) return `${guessed}${step.committed.length}.${ended}`;
  if (step.accepted === k) return `${guessed}${k === 1 ? 'it' : `all ${k}`} and added ${own} as a bonus.${ended}`;
  if (!step.accepted) return `${guessed}none and wrote ${own} itself.${ended}`;
  return `${guessed}${step.accepted} and corrected the ${ordinal(step.accepted + 1)} to ${own}.${ended}`;
};

const prefillSentence = run => {
  if (!run.prefill) return '';
  const { prompt_tokens: tokens, seconds: time, piece } = run.prefill;
  const first = piece ? ` and chose the first token, ${quoted(piece)}` : ' and chose the first token';
  return `Prefill: the target read ${plural(tokens, 'prompt token')} in ${seconds(time)}${first}.`;
};

const endSentence = run => {
  const reason = run.finish && run.finish.reason;
  return { stop: ' The reply ends here.', length: ' The length limit ends the reply.', context: ' The context is full.' }[reason] || '';
};

const summary = run => {
  const t = run.totals(run.steps.length);
  if (!t.steps) return prefillSentence(run);
  const passes = plural(t.steps, 'verify pass', 'verify passes');
  const rate = t.drafted ? `; ${percent(t.accepted / t.drafted)} of the drafted tokens were accepted` : '';
  return `${passes} wrote ${plural(t.committed, 'token')}, ${decimal(t.committed / t.steps)} per pass${rate}.`;
};
