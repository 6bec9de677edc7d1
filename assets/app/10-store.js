// Keeps conversations and traces in this browser (IndexedDB, else memory), one record each, so that two tabs never
// overwrite each other's chats. Knows nothing of the page.

const DATABASE = 'dflash-chat';
const CURRENT = 'dflash-current-chat';
const memory = {conversations: new Map(), traces: new Map()};

function openDatabase() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open(DATABASE, 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore('conversations', {keyPath: 'id'});
      request.result.createObjectStore('traces', {keyPath: 'id'}).createIndex('conversation', 'conversation');
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
    request.onblocked = () => reject(new Error('the database is blocked'));
  });
}

// Some private windows refuse IndexedDB: the session then lives in memory, and says so once.
const database = openDatabase().catch(error => {
  console.warn('Chats are kept for this visit only:', error);
  return null;
});

async function transact(store, mode, act) {
  const db = await database;
  if (!db) return null;
  return new Promise((resolve, reject) => {
    const transaction = db.transaction(store, mode);
    const request = act(transaction.objectStore(store));
    transaction.oncomplete = () => resolve(request ? request.result : undefined);
    transaction.onerror = transaction.onabort = () => reject(transaction.error);
  });
}

const store = {
  async put(name, proxied) {
    // Gradio hands over reactive proxies, which IndexedDB cannot copy.
    const record = JSON.parse(JSON.stringify(proxied));
    memory[name].set(record.id, record);
    await transact(name, 'readwrite', s => s.put(record));
    if (await database) memory[name].delete(record.id);
  },
  async get(name, id) {
    return (id && await transact(name, 'readonly', s => s.get(id))) || memory[name].get(id) || null;
  },
  async all(name) {
    return (await transact(name, 'readonly', s => s.getAll())) || [...memory[name].values()];
  },
  async remove(name, id) {
    memory[name].delete(id);
    await transact(name, 'readwrite', s => s.delete(id));
  },
  async traceIds(conversation) {
    const found = await transact('traces', 'readonly', s => s.index('conversation').getAllKeys(conversation));
    return found || [...memory.traces.values()].filter(t => t.conversation === conversation).map(t => t.id);
  },
};

// What this tab last read or wrote of each chat, to notice when another tab wrote in between.
const known = new Map();

async function saveConversation(conversation) {
  const before = await store.get('conversations', conversation.id);
  const saved = isForeign(before, conversation) ? forked(conversation) : conversation;
  await store.put('conversations', saved);
  known.set(saved.id, fingerprint(saved));
  const kept = new Set(saved.messages.map(message => message.id));
  for (const id of await store.traceIds(saved.id)) if (!kept.has(id)) await store.remove('traces', id);
  rememberCurrent(saved.id);
  return saved;
}

function fingerprint(conversation) {
  return conversation.messages.map(message => message.id).join();
}

// Two tabs on one chat: the later one would erase the turns of the earlier one, so it goes on as a chat of its own.
function isForeign(before, conversation) {
  return Boolean(before) && known.has(before.id) && known.get(before.id) !== fingerprint(before)
    && fingerprint(before) !== fingerprint(conversation);
}

function forked(conversation) {
  const id = [...crypto.getRandomValues(new Uint8Array(8))].map(b => b.toString(16).padStart(2, '0')).join('');
  return {...conversation, id, title: `${conversation.title} (2)`};
}

async function index() {
  const conversations = (await store.all('conversations')).sort((a, b) => (a.updated < b.updated ? 1 : -1));
  return conversations.map(({id, title, updated}) => ({id, title, updated}));
}

function rememberCurrent(id) {
  try {
    localStorage.setItem(CURRENT, id);
  } catch (error) {
    console.warn('The open chat is not remembered:', error);
  }
}

function currentId() {
  try {
    return localStorage.getItem(CURRENT);
  } catch (error) {
    return null;
  }
}

const NEW = 'new';

// What the page starts from: every chat's line for the list, newest first, and the chat that was open last.
async function boot() {
  const lines = await index();
  const id = currentId();
  if (id === NEW) return {index: lines, current: null};
  return turnTo(lines.some(line => line.id === id) ? id : (lines[0] || {}).id);
}

async function turnTo(id) {
  const conversation = await store.get('conversations', id);
  if (conversation) {
    rememberCurrent(id);
    known.set(id, fingerprint(conversation));
  }
  return {index: await index(), current: conversation};
}

// Saves a chat and, under the id of the reply it shows, a trace; returns what the list and the tab go on with.
async function saveTurn(conversation, id, trace) {
  if (!conversation.messages.length) {
    await forget(conversation.id);
    return {index: await index(), current: conversation};
  }
  const saved = await saveConversation(conversation);
  if (id && trace) await store.put('traces', {id, conversation: saved.id, ndjson: trace});
  return {index: await index(), current: saved, forked: saved.id !== conversation.id};
}

// A question is kept while its reply is written, so that a closed tab does not lose it.
async function keep(host, conversation) {
  if (!conversation || !conversation.messages.length) return;
  const before = await store.get('conversations', conversation.id);
  if (!isForeign(before, conversation)) await saveConversation(conversation);
}

async function forget(id) {
  for (const trace of await store.traceIds(id)) await store.remove('traces', trace);
  await store.remove('conversations', id);
}

async function removeChat(conversation) {
  if (conversation) await forget(conversation.id);
  return boot();
}

async function traceOf(id) {
  const record = await store.get('traces', id);
  return record ? record.ndjson : '';
}

async function importChat({conversation, traces}) {
  const saved = await saveConversation(conversation);
  for (const [id, ndjson] of Object.entries(traces || {})) {
    await store.put('traces', {id, conversation: saved.id, ndjson});
  }
  return {index: await index(), current: saved};
}

async function exportedText(conversation) {
  const traces = {};
  for (const message of conversation.messages) {
    const ndjson = message.role === 'assistant' ? await traceOf(message.id) : '';
    if (ndjson) traces[message.id] = ndjson;
  }
  return JSON.stringify({format: 'dflash-chat', version: 1, conversation, traces}, null, 1);
}
