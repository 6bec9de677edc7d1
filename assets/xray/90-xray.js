// The X-ray itself: one element, one run, one animation frame for everything it draws.
//
// window.dflashXray(root)          the X-ray in an element or selector, mounted if it is not yet; of it:
//   setTrace(ndjson)               the whole trace so far; only what is new is read; another header starts afresh
//   setBaseline(ndjson)            a plain run to compare with in "tokens over time"; '' removes it
//   seek(step, {phase})            step counts from 0, -1 is the first token; phase 'mask' | 'draft' | 'verdict'
//   seekTime(seconds, speed)       the moment so many measured seconds after the start; hides what came later
//   play(speed) pause() setSpeed(speed) followLive() next()
//   on('step' | 'end', listener)   {step, phase, mode} on every change, info once per run; returns the way to stop
//   info, duration                 where it stands, what is known, seconds of the run
// window.dflashXray.clock(lanes)   one clock for several: play() pause() seek(seconds) setSpeed(x) on('time', fn)

const FRAME_BUDGET_MS = 9;
// Drawing takes time from a decode on the same machine; a replay has none to disturb.
const CHART_EVERY_MS = { live: 250, replay: 120 };

class XRay {
  constructor(root, handlers) {
    this.root = root;
    this.handlers = handlers;
    this.options = { controls: root.dataset.controls !== 'false', charts: root.dataset.charts !== 'false', compact: root.dataset.compact === 'true', stepMode: root.dataset.stepMode === 'true' };
    this.run = new Run();
    this.player = new Player(this.run);
    this.listeners = { step: [], end: [] };
    this.preview = null;
    this.chartsAt = 0;
    this.build(root.dataset.label || 'X-ray');
    new ResizeObserver(() => this.redraw()).observe(root);
    // Lines off screen have guessed heights until they are drawn, so the end moves after the last token too.
    new ResizeObserver(() => this.player.mode === 'live' && this.stream.sticking && this.stream.toBottom()).observe(this.stream.text);
    this.schedule();
  }

  build(label) {
    this.title = h('h3', { class: 'dfx-title' }, label);
    this.state = h('span', { class: 'dfx-state' });
    this.facts = h('span', { class: 'dfx-facts' });
    this.announcer = h('p', { class: 'dfx-hidden', 'aria-live': 'polite' });
    this.numbers = new Numbers();
    this.stream = new Stream(index => this.pick(index), index => this.hover(index));
    this.strip = new Strip();
    this.timeline = new Timeline(index => this.pick(index));
    this.charts = new Charts();
    this.table = new Table(index => this.pick(index));
    this.controls = new Controls(this, this.options);
    this.root.setAttribute('aria-label', label);
    this.root.classList.toggle('compact', this.options.compact);
    this.root.replaceChildren(
      h('header', { class: 'dfx-head' }, this.title, this.state, this.facts), this.numbers.node,
      ...(this.options.compact ? [] : [legend()]), this.stream.panel, welcome(), this.strip.node,
      ...(this.options.controls ? [this.timeline.node, this.controls.node] : []),
      ...(this.options.charts ? [this.charts.node, this.table.node] : []), this.announcer);
    this.root.addEventListener('keydown', event => this.options.controls && this.controls.key(event));
  }

  // ---- what others may call

  setTrace(ndjson) {
    if (this.run.setSource(ndjson)) this.restart();
    // A run that is already over is read from its beginning, one that grows is followed.
    if (!this.run.offset) this.stream.sticking = !/"t":"(finish|cancel)"/.test(ndjson.slice(-400));
    this.schedule();
    return this;
  }

  setBaseline(ndjson) {
    const other = new Run();
    other.setSource(ndjson);
    other.read(Infinity);
    this.run.other = ndjson ? other : null;
    return this.redraw();
  }

  seek(index, { phase = 'verdict' } = {}) {
    this.drain();
    this.player.still(index, phase);
    this.stream.reveal(this.player.cursor);
    return this.redraw();
  }

  seekTime(time, speed = 1) {
    this.drain();
    this.player.speed = speed;
    this.player.stillAt(time);
    return this.redraw();
  }

  play(speed) {
    this.drain();
    if (speed) this.player.speed = speed;
    this.player.play();
    return this.redraw();
  }

  pause() {
    this.player.pause();
    return this.redraw();
  }

  setSpeed(speed) {
    this.player.speed = speed;
    return this.redraw();
  }

  followLive() {
    this.player.live();
    this.stream.toBottom();
    return this.redraw();
  }

  // Step by step: a run that still decodes is asked for its next block, a finished one moves on by itself.
  next() {
    if (this.player.atEnd && !this.run.ended) {
      this.player.live();
      this.tell('next_step', {});
    } else this.move(1);
    return this;
  }

  on(name, listener) {
    this.listeners[name].push(listener);
    return () => { this.listeners[name] = this.listeners[name].filter(other => other !== listener); };
  }

  get duration() {
    this.drain();
    return this.run.duration;
  }

  get info() {
    const { mode, cursor, phase, speed } = this.player;
    return { mode, step: cursor, phase, speed, steps: this.run.steps.length, ended: this.run.ended, header: this.run.header, totals: this.run.totals(cursor + 1), text: this.stream.text.textContent };
  }

  // ---- the reader's hand

  pick(index) {
    this.preview = null;
    this.seek(index);
    clearTimeout(this.pickTimer);
    this.pickTimer = setTimeout(() => this.tell('step_selected', { step: this.player.cursor }), 150);
  }

  move(by) {
    if (by > 0 && this.player.atEnd) {
      if (this.controls.stepping && !this.run.ended) this.next();
      return;
    }
    this.pick(this.player.cursor + by);
  }

  togglePlay() {
    if (this.player.mode === 'play') this.pause();
    else this.play();
  }

  hover(index) {
    if (this.preview === index || this.player.mode === 'play') return;
    this.preview = index;
    this.schedule();
  }

  showRejected(on) {
    this.stream.setGhosts(on, this.run);
    if (this.player.mode === 'live') this.stream.toBottom();
  }

  tell(name, data) {
    if (this.handlers[name]) this.handlers[name](data);
  }

  // ---- one frame

  restart() {
    this.stream.clear();
    this.player.live();
    this.preview = null;
    this.shownEnd = false;
  }

  redraw() {
    this.chartsAt = 0;
    this.schedule();
    return this;
  }

  schedule() {
    if (this.scheduled) return;
    this.scheduled = true;
    requestAnimationFrame(now => this.frame(now));
  }

  frame(now) {
    this.scheduled = false;
    const grew = this.take(performance.now() + FRAME_BUDGET_MS);
    const playing = this.player.tick(now);
    this.render(now, grew && this.run.pending);
    if (playing) this.stream.reveal(this.player.cursor);
    this.strip.centre();
    if (playing || this.run.pending) this.schedule();
    else this.finishUp();
  }

  // Reads and draws new lines until the deadline (performance.now milliseconds); true when there were any.
  take(deadline) {
    const before = this.run.offset;
    while (this.run.pending && performance.now() < deadline) {
      for (const row of this.run.read(16)) this.add(row);
    }
    return this.run.offset > before;
  }

  add(row) {
    if (row.t === 'prefill') this.stream.addFirst(row);
    else if (row.t === 'step') this.stream.addStep(row);
    else if (row.t === 'finish' || row.t === 'cancel') this.stream.addTail(row.tail);
  }

  drain() {
    if (this.run.pending) this.take(Infinity);
  }

  render(now, more) {
    const { player, run } = this;
    const [index, phase] = this.preview === null ? player.block : [this.preview, 'verdict'];
    const live = player.mode === 'live';
    this.root.classList.toggle('waiting', !run.prefill);
    this.root.classList.toggle('hide-future', player.mode === 'play' || player.mode === 'clock');
    this.root.classList.toggle('baseline', run.baseline);
    this.stream.setCursor(live ? Infinity : player.cursor - (player.phase === 'verdict' ? 0 : 1));
    this.stream.select(live && this.preview === null ? null : index);
    this.strip.show(run, index, phase);
    this.controls.show(player);
    this.showState();
    if (more || now - this.chartsAt < this.chartEvery) return this.later();
    this.chartsAt = now;
    this.numbers.show(run, player.cursor);
    this.timeline.show(run, player.cursor);
    if (this.options.charts) this.charts.show(run, player.cursor);
    this.table.show(run, player.cursor);
    return this.notify(index, phase);
  }

  // Milliseconds between two drawings of the charts; the whole run is drawn at once.
  get chartEvery() {
    if (!this.run.ended) return CHART_EVERY_MS.live;
    return this.shownEnd ? CHART_EVERY_MS.replay : 0;
  }

  // The charts were drawn a moment ago: draw them once more when that moment has passed.
  later() {
    if (this.laterTimer) return;
    this.laterTimer = setTimeout(() => { this.laterTimer = 0; this.schedule(); }, this.chartEvery);
  }

  notify(step, phase) {
    const key = `${this.run.generation}:${step}:${phase}:${this.player.mode}`;
    if (key === this.notified) return;
    this.notified = key;
    for (const listener of this.listeners.step) listener({ step, phase, mode: this.player.mode });
  }

  showState() {
    const { run, player } = this;
    const at = `Step ${player.cursor + 1} of ${run.steps.length}`;
    const words = !run.header ? '' : !player.atEnd ? (player.cursor < 0 ? 'Start' : at)
      : run.finish ? 'Finished' : run.cancel ? 'Stopped' : run.prefill ? 'Live' : 'Reading the prompt';
    setText(this.state, words);
    this.state.hidden = !words;
    setClass(this.state, `dfx-state ${words.split(' ')[0].toLowerCase()}`);
    const { pair, device, dtype } = run.header || {};
    setText(this.facts, [pair, device, dtype, run.k ? `block of ${run.k + 1}` : ''].filter(Boolean).join(' · '));
  }

  // Once per run, when its last line has been drawn.
  finishUp() {
    if (!this.run.ended || this.shownEnd) return;
    this.shownEnd = true;
    const words = summary(this.run);
    setText(this.announcer, `Reply finished. ${words}`);
    this.timeline.chart.describe(words);
    this.charts.describe(this.run);
    for (const listener of this.listeners.end) listener(this.info);
  }

  recolour() {
    for (const chart of [this.timeline.chart, ...this.charts.all]) chart.inks = null;
    this.redraw();
  }
}

const welcome = () => h('div', { class: 'dfx-welcome' },
  h('p', {}, 'Each reply is written block by block. Send a message and watch:'),
  h('ol', {},
    h('li', {}, h('b', { class: 'dfx-sample mask', 'aria-hidden': 'true' }, '▒▒▒'), 'The draft model fills a whole block of masked slots at once.'),
    h('li', {}, h('b', { class: 'dfx-sample accepted', 'aria-hidden': 'true' }, '✓'), 'The target checks the block in one pass and keeps what it would have written itself.'),
    h('li', {}, h('b', { class: 'dfx-sample correction', 'aria-hidden': 'true' }, '▲'), 'It corrects the first wrong guess, and the next block starts there.')));

const mounted = new Map();

const find = root => {
  const node = typeof root === 'string' ? document.querySelector(root) : root;
  return node && (node.matches('.dfx') ? node : node.querySelector('.dfx'));
};

const mount = (root, handlers = {}) => {
  const shell = find(root);
  if (!shell) throw new Error('No X-ray here: expected an element with class "dfx".');
  for (const other of mounted.keys()) if (!other.isConnected && other !== shell) mounted.delete(other);
  if (!mounted.has(shell)) mounted.set(shell, new XRay(shell, handlers));
  else Object.assign(mounted.get(shell).handlers, handlers);
  return mounted.get(shell);
};

const recolourAll = () => mounted.forEach(xray => xray.recolour());
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', recolourAll);
const watchTheme = () => {
  const watcher = new MutationObserver(recolourAll);
  for (const node of [document.documentElement, document.body]) watcher.observe(node, { attributes: true, attributeFilter: ['class', 'data-theme'] });
};
if (document.body) watchTheme();
else document.addEventListener('DOMContentLoaded', watchTheme);

// A page made of one recorded trace.
const page = doc => {
  const data = doc.getElementById('dfx-trace').textContent;
  const xray = mount(doc.querySelector('.dfx'));
  xray.setTrace(data).drain();
  const { header } = xray.run;
  const asked = (header.messages || []).filter(message => message.role === 'user').pop();
  const prompt = doc.querySelector('.dfx-page-prompt');
  if (asked) {
    prompt.hidden = false;
    prompt.append(h('p', {}, asked.content));
  }
  const when = header.created ? new Date(header.created).toLocaleString([], { dateStyle: 'medium', timeStyle: 'short' }) : '';
  setText(doc.querySelector('.dfx-page-facts'), [summary(xray.run), when].filter(Boolean).join(' · '));
  return xray;
};

window.dflashXray = Object.assign(root => mount(root), { mount, page, clock: lanes => new Clock(lanes) });
