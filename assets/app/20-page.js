// What the page does beyond Gradio's own widgets: footers under replies, the status line, keys, clean copies.
// Every word of a model or a person reaches the page through textContent.

const GUARD = '\u2060';
const GUARDED = new RegExp('(<|!|(?:`{3,}|~{3,})[ \\t]*)' + GUARD, 'g');
const unguard = text => text.replace(GUARDED, '$1');

let footers = {items: [], selected: ''};

function element(tag, className, text) {
  const node = document.createElement(tag);
  node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function makeFooter(row) {
  const footer = element('div', 'dfc-foot');
  const show = element('button', 'dfc-foot-show', 'X-ray');
  show.type = 'button';
  show.addEventListener('click', () => {
    row.querySelector('[data-testid="bot"]').click();
    const xray = document.getElementById('dfc-xray');
    if (xray.getBoundingClientRect().top >= innerHeight * 0.5) xray.scrollIntoView({block: 'start'});
  });
  footer.append(element('span', 'dfc-foot-numbers'), show, element('div', 'dfc-foot-warning'));
  row.querySelector('.flex-wrap').append(footer);
  return footer;
}

// Rows are Svelte's; a footer is appended to each and refreshed in place, so that drawing twice changes nothing.
function drawFooters() {
  const rows = document.querySelectorAll('.dfc-chat .message-row.bot-row');
  rows.forEach((row, i) => {
    const item = footers.items[i];
    if (!row.querySelector('.flex-wrap')) return;
    const footer = row.querySelector('.dfc-foot') || makeFooter(row);
    const [numbers, show, warning] = footer.children;
    setText(numbers, item ? item.text : '');
    setText(warning, item ? item.warning : '');
    show.hidden = !item || !item.id;
    const selected = String(Boolean(item && item.id && item.id === footers.selected));
    if (show.getAttribute('aria-pressed') !== selected) show.setAttribute('aria-pressed', selected);
    if (item) show.title = 'Show how this reply was made';
    row.classList.toggle('dfc-selected', selected === 'true');
  });
}

function setFooters(host, value) {
  footers = value;
  scheduleFooters();
}

let footersDue = false;
function scheduleFooters() {
  if (footersDue) return;
  footersDue = true;
  requestAnimationFrame(() => {
    footersDue = false;
    drawFooters();
  });
}

function watchChat() {
  const chat = document.querySelector('.dfc-chat');
  if (!chat) return setTimeout(watchChat, 100);
  new MutationObserver(() => {
    const log = chat.querySelector('[role="log"]');
    // Streaming text read aloud at every change is noise: the status line announces the end of a reply once.
    if (log && log.getAttribute('aria-live') !== 'off') log.setAttribute('aria-live', 'off');
    scheduleFooters();
  }).observe(chat, {childList: true, subtree: true});
}

function setStatus(host, value) {
  let line = host.querySelector('.dfc-status');
  if (!line) {
    line = element('div', 'dfc-status');
    line.append(element('span', 'dfc-dot'), element('span', 'dfc-status-text'), document.createElement('progress'));
    line.setAttribute('role', 'status');
    host.append(line);
  }
  line.dataset.phase = value.phase;
  const [, text, progress] = line.children;
  setText(text, value.text);
  progress.hidden = value.phase !== 'loading';
  if (value.fraction === null || value.fraction === undefined) progress.removeAttribute('value');
  else progress.value = value.fraction;
  progress.setAttribute('aria-label', 'Loading');
}

function setNote(host, value) {
  let line = host.querySelector('.dfc-note');
  if (!line) host.append(line = element('div', 'dfc-note'));
  line.setAttribute('role', 'status');
  setText(line, value.text || '');
  line.hidden = !value.text;
}

function download(name, text, type) {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], {type}));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

async function exportChat(conversation) {
  if (!conversation || !conversation.messages.length) return;
  const words = conversation.title.toLowerCase().replace(/[^a-z0-9]+/g, '-').replace(/^-|-$/g, '').slice(0, 40);
  download(`dflash-chat-${words || 'export'}.json`, await exportedText(conversation), 'application/json');
}

// Guards keep model text from becoming markup in a bubble; whatever leaves by the clipboard is the text itself.
function cleanCopies() {
  if (navigator.clipboard && navigator.clipboard.writeText) {
    const write = navigator.clipboard.writeText.bind(navigator.clipboard);
    navigator.clipboard.writeText = text => write(unguard(String(text)));
  }
  document.addEventListener('copy', event => {
    const field = document.activeElement;
    const chosen = field && field.tagName === 'TEXTAREA'
      ? field.value.slice(field.selectionStart, field.selectionEnd)
      : String(getSelection());
    if (!chosen.includes(GUARD)) return;
    event.clipboardData.setData('text/plain', unguard(chosen));
    event.preventDefault();
  });
}

function onKey(event) {
  const editing = event.target instanceof Element && event.target.closest('.dfc-chat textarea');
  if (editing) return onEditKey(event, editing);
  if (event.key === 'Escape') {
    const stop = document.querySelector('.dfc-composer .stop-button');
    if (stop) stop.click();
  }
  if (event.key === '/' && !event.ctrlKey && !event.metaKey && !/^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName)) {
    event.preventDefault();
    focusComposer();
  }
}

function onEditKey(event, area) {
  const send = event.key === 'Enter' && !event.shiftKey && !event.isComposing;
  if (!send && event.key !== 'Escape') return;
  const buttons = area.closest('.message-row').parentElement.querySelectorAll('.message-buttons button');
  const wanted = [...buttons].filter(b => /submit|cancel/i.test(b.getAttribute('aria-label') || b.title || ''));
  const button = wanted[send ? 0 : 1];
  if (!button) return;
  event.preventDefault();
  event.stopPropagation();
  button.click();
}

function focusComposer() {
  const box = document.querySelector('.dfc-composer textarea');
  if (box) box.focus();
}

const SCHEME = 'dflash-scheme';
function applyScheme(dark) {
  document.body.classList.toggle('dark', dark);
  // Gradio fixed the ground's colour when the page opened.
  document.body.style.background = 'var(--body-background-fill)';
}
function toggleScheme() {
  const dark = !document.body.classList.contains('dark');
  applyScheme(dark);
  try {
    localStorage.setItem(SCHEME, dark ? 'dark' : 'light');
  } catch (error) {
    console.warn('The colour scheme is not remembered:', error);
  }
}
function restoreScheme() {
  let scheme = null;
  try {
    scheme = localStorage.getItem(SCHEME);
  } catch (error) {
    return;
  }
  if (scheme && !new URLSearchParams(location.search).has('__theme')) applyScheme(scheme === 'dark');
}

// On a phone the sidebar covers the page, on a small screen it takes the room that the block needs: it starts closed there,
// and closes when the window becomes that narrow.
const phone = matchMedia('(max-width: 768px)');
const narrow = matchMedia('(max-width: 1150px)');
function closeSidebarWhenNarrow(limit = narrow) {
  if (!limit.matches) return;
  const toggle = document.querySelector('.sidebar.open .toggle-button');
  if (toggle) toggle.click();
}

function afterNew() {
  rememberCurrent(NEW);
  closeSidebarWhenNarrow(phone);
  focusComposer();
}

function startPage() {
  cleanCopies();
  restoreScheme();
  watchChat();
  for (const limit of [phone, narrow]) limit.addEventListener('change', () => closeSidebarWhenNarrow(limit));
  document.addEventListener('keydown', onKey, true);
}
