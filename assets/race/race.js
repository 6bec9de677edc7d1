// The race on the page: progress, verdict, finish times, and the lanes replayed on one clock.
// Every word of a model or a person reaches the page through textContent.

const h = (tag, className, ...children) => {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children.filter(child => child !== null && child !== undefined));
  return node;
};

const setText = (node, text) => {
  if (node.textContent !== text) node.textContent = text;
};

const calm = matchMedia('(prefers-reduced-motion: reduce)');
const SPEEDS = [[1, '1×', 'measured speed'], [0.5, '1/2', 'half speed'], [0.1, '1/10', 'a tenth of the speed']];
const SIGNS = {same: '✓', rounding: '≈', differs: '≠', unknown: '?'};
const seconds = s => `${s.toFixed(2)} s`;

function rootOf(host, className) {
  let root = host.querySelector('.dfr');
  if (!root) host.append(root = h('div', className));
  return root;
}

// ---- while it is measured

function drawRaceProgress(host, value) {
  const root = rootOf(host, 'dfr');
  if (!value || !value.text) return root.replaceChildren();
  if (!root.firstChild) {
    const fill = document.createElement('i');
    const box = h('div', 'dfr-progress', h('div', 'dfr-progress-line', h('span'), h('span')), h('div', 'dfr-progress-bar', fill));
    box.setAttribute('role', 'status');
    root.append(box);
  }
  const [text, laps] = root.querySelectorAll('span');
  setText(text, value.text);
  setText(laps, value.laps ? `lap ${Math.min(value.done + 1, value.laps)} of ${value.laps}` : '');
  root.querySelector('i').style.width = `${value.laps ? Math.max(2, 100 * value.done / value.laps) : 2}%`;
  root.querySelector('.dfr-progress-bar').hidden = !value.laps;
  return undefined;
}

// ---- when it is over

const races = new WeakMap();

function drawRace(host, value) {
  const root = rootOf(host, 'dfr');
  const before = races.get(root);
  if (before) before.leave();
  races.delete(root);
  if (!value.lanes.length) return root.replaceChildren(welcome());
  const race = new Race(value);
  root.replaceChildren(...race.nodes);
  races.set(root, race);
  race.start();
  return undefined;
}

const welcome = () => h('div', 'dfr-welcome', h('b', '', 'Is it faster here, and is it the same text?'),
  'Every lane answers the same prompt on this machine, one after the other, warmed up and several times. '
  + 'You get the speed-up with its spread, a check that both replies are the same to the last token, and a replay side by side.');

class Race {
  constructor(value) {
    this.value = value;
    this.slowest = Math.max(...value.lanes.flatMap(lane => lane.seconds_all));
    this.lanes = value.lanes.map((lane, i) => new Lane(lane, i > 0, value.repeats));
    this.nodes = [this.verdict(), this.times(), this.controls(), h('div', 'dfr-lanes', ...this.lanes.map(lane => lane.node))];
  }

  verdict() {
    const v = this.value.verdict;
    const sign = h('span', `dfr-sign ${v.identityTone}`, SIGNS[v.identityTone]);
    sign.setAttribute('aria-hidden', 'true');
    const points = h('ul', 'dfr-points', h('li', '', h('b', '', v.basis)), v.tau ? h('li', '', v.tau) : null,
      h('li', '', sign, v.identity));
    const facts = h('p', 'dfr-times-note', this.value.facts);
    const box = h('div', `dfr-verdict ${v.tone}`, h('div', 'dfr-factor', v.factor), h('div', '', h('p', 'dfr-headline', v.headline), points, facts));
    box.setAttribute('role', 'status');
    return box;
  }

  times() {
    const rows = this.value.lanes.flatMap((lane, i) => {
      const track = h('div', `dfr-times-track${i ? ' challenger' : ''}`);
      const bar = h('div', 'dfr-times-bar');
      bar.style.width = `${100 * lane.seconds / this.slowest}%`;
      track.append(bar, ...lane.seconds_all.map(lap => {
        const tick = h('span', 'dfr-times-lap');
        tick.style.left = `${100 * lap / this.slowest}%`;
        return tick;
      }));
      track.setAttribute('aria-hidden', 'true');
      const factor = lane.speedup ? ` · ${lane.speedup} (${lane.speedupSpread})` : '';
      return [h('span', 'dfr-times-name', lane.label), track,
        h('span', 'dfr-times-number', h('b', '', seconds(lane.seconds)), ` · ${lane.rate} tok/s (${lane.rateSpread})${factor}`)];
    });
    const note = `Bars: the lap of middle length. Marks: each of the ${this.value.repeats} laps. In brackets: slowest to fastest.`;
    return h('div', 'dfr-times', ...rows, h('div', 'dfr-times-note', note));
  }

  controls() {
    this.playButton = button('Pause', 'main', () => this.toggle());
    const again = button('Restart', '', () => { this.clock.seek(0); this.play(); });
    this.speeds = SPEEDS.map(([speed, text, name]) => {
      const node = button(text, '', () => this.setSpeed(speed));
      node.setAttribute('aria-label', `Replay at ${name}`);
      return [speed, node];
    });
    this.range = Object.assign(document.createElement('input'), {type: 'range', min: 0, max: 1000, value: 0});
    this.range.setAttribute('aria-label', 'Time of the replay');
    this.range.addEventListener('input', () => { this.pause(); this.clock.seek(this.clock.duration * this.range.value / 1000); });
    this.readout = document.createElement('output');
    return h('div', 'dfr-clock', this.playButton, again, h('span', 'dfr-speeds', ...this.speeds.map(([, node]) => node)),
      this.range, this.readout, h('span', 'dfr-clock-note', 'Measured one after the other, replayed in sync.'));
  }

  start() {
    this.clock = window.dflashXray.clock(this.lanes.map(lane => lane.mount()));
    this.clock.on('time', (time, duration) => this.at(time, duration));
    this.setSpeed(1);
    if (calm.matches) {
      this.clock.seek(this.clock.duration);
      this.showPlaying();
    } else {
      this.clock.seek(0);
      this.play();
    }
  }

  leave() {
    this.clock.pause();
  }

  at(time, duration) {
    for (const lane of this.lanes) lane.at(time, this.lanes);
    this.range.value = duration ? 1000 * time / duration : 0;
    setText(this.readout, `${time.toFixed(2)} / ${seconds(duration)}`);
    if (time >= duration) this.clock.running = false;
    this.showPlaying();
  }

  toggle() {
    if (this.clock.running) this.pause();
    else this.play();
  }

  play() {
    this.clock.play();
    this.showPlaying();
  }

  pause() {
    this.clock.pause();
    this.showPlaying();
  }

  showPlaying() {
    const over = !this.clock.running && this.clock.time >= this.clock.duration;
    setText(this.playButton, this.clock.running ? 'Pause' : over ? 'Play again' : 'Play');
  }

  setSpeed(speed) {
    this.clock.setSpeed(speed);
    for (const [own, node] of this.speeds) node.setAttribute('aria-pressed', String(own === speed));
  }
}

function button(text, className, act) {
  const node = h('button', className, text);
  node.type = 'button';
  node.addEventListener('click', act);
  return node;
}

class Lane {
  constructor(lane, challenger, repeats) {
    this.lane = lane;
    this.state = h('span', 'dfr-lane-state');
    this.place = h('span', 'dfr-place');
    this.place.hidden = true;
    this.fill = document.createElement('i');
    this.shell = h('section', 'dfx');
    Object.assign(this.shell.dataset, {label: lane.label, controls: 'false', charts: 'false', compact: 'true', stepMode: 'false'});
    const outline = lane.kind === 'prompt-lookup' || lane.kind === 'hf-dflash';
    const facts = [['', lane.rate, ` tok/s (${lane.rateSpread})`], lane.speedup && ['', lane.speedup, ` plain (${lane.speedupSpread})`],
      lane.tau && ['τ ', lane.tau, ''], lane.accepted && ['', lane.accepted, ' of drafts accepted'], ['first token ', lane.firstToken, '']];
    this.node = h('article', `dfr-lane${challenger ? ' challenger' : ''}${outline ? ' outline' : ''}`,
      h('header', 'dfr-lane-head', h('h3', '', lane.label), this.place, this.state),
      h('div', 'dfr-lane-bar', this.fill),
      h('div', 'dfr-lane-facts', ...facts.filter(Boolean).map(([before, number, after]) => h('span', '', before, h('b', '', number), after))),
      this.shell, this.note(outline, repeats));
    this.node.dataset.lane = lane.key;
    this.node.setAttribute('aria-label', lane.label);
  }

  note(outline, repeats) {
    const words = [outline && 'transformers does not tell what it rejected: only what it kept is shown.',
      !this.lane.steady && `The ${repeats} repeats did not all write the same reply.`,
      this.lane.sameTone && this.lane.sameTone !== 'same' && this.lane.sentence].filter(Boolean);
    const node = h('p', 'dfr-lane-note', words.join(' '));
    node.hidden = !words.length;
    return node;
  }

  mount() {
    this.xray = window.dflashXray.mount(this.shell);
    this.xray.setTrace(this.lane.ndjson);
    this.length = this.xray.duration;
    return this.xray;
  }

  at(time, lanes) {
    const {info} = this.xray;
    const done = time >= this.length - 1e-6;
    const tokens = info.step < -1 ? 0 : 1 + info.totals.committed;
    this.fill.style.width = `${100 * Math.min(1, tokens / this.lane.tokens)}%`;
    setText(this.state, done ? `done at ${seconds(this.length)}` : `${tokens} of ${this.lane.tokens} tokens`);
    const place = 1 + lanes.filter(other => other.length < this.length - 1e-9).length;
    this.place.hidden = !done;
    this.place.classList.toggle('later', place > 1);
    setText(this.place, place === 1 ? 'first' : ['', '', '2nd', '3rd'][place] || `${place}th`);
  }
}

// ---- many prompts

function drawSuite(host, value) {
  const root = rootOf(host, 'dfr');
  if (!value) return root.replaceChildren();
  const row = (tag, cells) => h('tr', '', ...cells.map((cell, i) => h(i < 2 ? 'th' : tag, '', cell)));
  const table = h('table', 'dfr-table', h('thead', '', row('th', value.head)), h('tbody', '', ...value.rows.map(cells => row('td', cells))));
  table.querySelectorAll('tbody tr').forEach((line, i) => line.classList.toggle('group', !i || value.rows[i][0] !== value.rows[i - 1][0]));
  const scroller = h('div', 'dfr-table-scroll', table);
  scroller.tabIndex = 0;
  scroller.setAttribute('role', 'group');
  scroller.setAttribute('aria-label', 'Suite, by kind of prompt and lane');
  return root.replaceChildren(scroller);
}

Object.assign(window.dflashApp, {drawRace, drawRaceProgress, drawSuite});
