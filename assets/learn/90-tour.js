// The tour: cards beside the real X-ray, which every card drives. Works without any model.

const SHELL = { label: 'Recorded run', controls: 'false', charts: 'false', compact: 'false', stepMode: 'false' };

let tour = null;
let machine = null;

function drawTour(host, value, onMeasure) {
  if (tour && tour.root.isConnected && host.contains(tour.root)) return;
  tour = new Tour(value, onMeasure);
  host.replaceChildren(tour.root);
  tour.begin();
}

function drawCosts(host, value) {
  if (!value) return;
  if (value.costs) machine = { costs: value.costs, where: `measured on this machine (${value.machine})` };
  if (tour && tour.whatIf) tour.whatIf.measured(value.costs ? machine : null);
}

class Tour {
  constructor(value, onMeasure) {
    this.value = value;
    this.onMeasure = onMeasure;
    this.at = -1;
    this.timers = [];
    this.steps = value.traces.dflash.trim().split('\n').map(JSON.parse).filter(row => row.t === 'step');
    this.pieces = this.allPieces();
    this.build();
  }

  // The reply's pieces before each step, for the labels of the attention picture.
  allPieces() {
    const rows = this.value.traces.dflash.trim().split('\n').map(JSON.parse);
    const pieces = [];
    const before = [];
    for (const row of rows) {
      if (row.t === 'prefill') pieces.push(row.piece);
      if (row.t !== 'step') continue;
      before.push(pieces.slice(0, -1));
      pieces.push(...row.pieces.committed);
    }
    return before;
  }

  build() {
    this.dots = this.value.cards.map((card, i) => {
      const dot = button(String(i + 1), 'dfl-dot', () => this.go(i));
      dot.title = card.title;
      dot.setAttribute('aria-label', `${i + 1}. ${card.title}`);
      return dot;
    });
    this.count = h('p', 'dfl-count');
    this.title = h('h2', 'dfl-title');
    this.title.tabIndex = -1;
    this.text = h('div', 'dfl-text');
    this.extra = h('div', 'dfl-extra');
    this.back = button('Back', 'dfl-button', () => this.go(this.at - 1));
    this.forward = button('Next', 'dfl-button main', () => this.go(this.at + 1));
    this.again = button('Show again', 'dfl-button quiet', () => this.act());
    this.shell = h('section', 'dfx');
    Object.assign(this.shell.dataset, SHELL);
    const dots = h('nav', 'dfl-dots', ...this.dots);
    dots.setAttribute('aria-label', 'Cards of the tour');
    this.card = h('article', 'dfl-card', dots, this.count, this.title, this.text, this.extra,
      h('div', 'dfl-row dfl-nav', this.back, this.forward, this.again));
    this.stage = h('div', 'dfl-view', this.shell, h('p', 'dfl-note', `Recorded: ${this.value.recorded}`));
    this.root = h('div', 'dfl', this.card, this.stage);
    this.root.addEventListener('keydown', event => this.key(event));
  }

  begin() {
    this.xray = window.dflashXray.mount(this.shell);
    this.go(0, false);
  }

  key(event) {
    if (event.target.closest('input, textarea, .dfx') || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === 'ArrowRight') this.go(this.at + 1);
    else if (event.key === 'ArrowLeft') this.go(this.at - 1);
    else return;
    event.preventDefault();
  }

  go(index, focus = true) {
    if (index < 0 || index >= this.value.cards.length || index === this.at) return;
    this.at = index;
    const card = this.value.cards[index];
    this.dots.forEach((dot, i) => {
      if (i === index) dot.setAttribute('aria-current', 'step');
      else dot.removeAttribute('aria-current');
      dot.classList.toggle('done', i < index);
    });
    setText(this.count, `${index + 1} of ${this.value.cards.length}`);
    setText(this.title, card.title);
    this.text.replaceChildren(...card.text.map(paragraph));
    this.back.disabled = index === 0;
    this.forward.hidden = index === this.value.cards.length - 1;
    this.root.dataset.card = card.key;
    this.whatIf = null;
    this.extra.replaceChildren(...this.extraOf(card));
    if (focus) this.title.focus({ preventScroll: true });
    if (focus && this.card.getBoundingClientRect().top < 0) this.card.scrollIntoView({ block: 'start' });
    if (card.extra !== 'game') this.act();
    this.again.hidden = card.extra === 'game' || (!card.speed && card.beats.length < 2);
  }

  extraOf(card) {
    if (card.extra === 'attention') {
      const { step } = card.beats[card.beats.length - 1];
      return [new Attention(this.value.attention, this.steps[step], this.pieces[step]).node];
    }
    if (card.extra === 'whatif') {
      this.whatIf = new WhatIf(this.value.costs, this.value.recorded, this.onMeasure, machine);
      return [this.whatIf.node];
    }
    if (card.extra === 'game') {
      this.stop();
      this.use('dflash');
      return [new Game(this.steps, this.value.game, (step, phase) => this.xray.seek(step, { phase })).node];
    }
    if (card.extra === 'links') return [this.links()];
    return [];
  }

  links() {
    const items = this.value.links.map(({ title, note, url }) => {
      const link = h('a', '', title);
      Object.assign(link, { href: url, target: '_blank', rel: 'noopener noreferrer' });
      return h('li', '', link, h('span', '', note));
    });
    return h('div', '', h('div', 'dfl-row', button('Open the chat', 'dfl-button main', () => openTab('chat')),
      button('Race it', 'dfl-button', () => openTab('race'))), h('ul', 'dfl-links', ...items));
  }

  // What the card shows in the X-ray; without motion only where it ends.
  act() {
    this.stop();
    const card = this.value.cards[this.at];
    this.use(card.trace);
    if (card.speed && !calm.matches) {
      this.xray.seek(-1);
      this.xray.play(card.speed);
      return;
    }
    const beats = calm.matches ? card.beats.slice(-1) : card.beats;
    let wait = 0;
    for (const { step, phase, milliseconds: stay } of beats) {
      this.timers.push(setTimeout(() => this.xray.seek(step, { phase }), wait));
      wait += stay;
    }
  }

  use(name) {
    if (this.using === name) return;
    this.using = name;
    this.xray.setTrace(this.value.traces[name]);
  }

  stop() {
    this.timers.forEach(clearTimeout);
    this.timers = [];
    this.xray.pause();
  }
}

function openTab(id) {
  const tab = document.querySelector(`button[role="tab"][data-tab-id="${id}"]`);
  if (tab) tab.click();
}

Object.assign(window.dflashApp, { drawTour, drawCosts });
