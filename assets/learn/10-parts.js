// Builders shared by the tour's parts. Words of a model or a recording reach the page through textContent only.

const h = (tag, className, ...children) => {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children.filter(child => child !== null && child !== undefined && child !== false));
  return node;
};

const setText = (node, text) => {
  if (node.textContent !== text) node.textContent = text;
};

const button = (text, className, act) => {
  const node = h('button', className, text);
  node.type = 'button';
  node.addEventListener('click', act);
  return node;
};

// A paragraph in which **so** is strong.
const paragraph = text => h('p', '', ...text.split('**').map((part, i) => (i % 2 ? h('b', '', part) : part)));

const svg = (tag, attributes, ...children) => {
  const node = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
};

// A token for a label: blanks become visible, long ones are cut.
const label = piece => {
  const shown = piece.replace(/\n/g, '↵').replace(/^ +/, blanks => '␣'.repeat(blanks.length));
  return shown.length > 9 ? `${shown.slice(0, 8)}…` : shown || '∅';
};

const calm = matchMedia('(prefers-reduced-motion: reduce)');
const milliseconds = s => (s < 0.0095 ? `${(s * 1000).toFixed(1)} ms` : `${Math.round(s * 1000)} ms`);
