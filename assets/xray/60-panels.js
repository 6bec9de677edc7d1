// The panels around the block: headline numbers, legend, timeline with its scrubber, small charts, table of steps.

class Numbers {
  constructor() {
    this.tau = tile('tokens per verify pass', 'Acceptance length τ: committed tokens per verify pass, the bonus counted. Plain decoding is 1.');
    this.rate = tile('accepted of drafted', 'Drafted tokens that the target confirmed, of all it was offered.');
    this.speed = tile('tokens per second', 'Tokens after the first one, per second after the prefill.');
    this.tokens = tile('tokens', 'Tokens in the reply so far, the first one counted.');
    this.passes = tile('verify passes', 'Forward passes of the target after the prefill.');
    this.split = h('span', { class: 'dfx-split', 'aria-hidden': 'true' }, h('i', { class: 'draft' }), h('i', { class: 'verify' }), h('i', { class: 'other' }));
    this.splitWords = h('span', { class: 'dfx-split-words' });
    this.node = h('div', { class: 'dfx-numbers' },
      this.tau.node, this.rate.node, this.speed.node, this.tokens.node, this.passes.node,
      h('div', { class: 'dfx-tile wide' }, this.split, this.splitWords));
    this.tau.node.classList.add('lead');
  }

  show(run, cursor) {
    const count = Math.max(0, Math.min(cursor + 1, run.steps.length));
    const t = run.totals(count);
    const split = run.split(count);
    this.tau.value(t.steps ? decimal(t.committed / t.steps) : '–');
    this.rate.value(t.drafted ? percent(t.accepted / t.drafted) : '–');
    this.speed.value(split.all > 0 ? decimal(t.committed / split.all, t.committed / split.all < 100 ? 1 : 0) : '–');
    this.tokens.value(run.prefill && cursor > -2 ? (t.committed + 1).toLocaleString('en') : '–');
    this.passes.value(t.steps.toLocaleString('en'));
    this.showSplit(split);
  }

  showSplit({ draft, verify, other, all }) {
    const share = part => (all > 0 ? part / all : 0);
    this.split.style.setProperty('--draft', share(draft));
    this.split.style.setProperty('--verify', share(verify));
    const rest = other === null ? '' : ` · other ${percent(share(other))}`;
    setText(this.splitWords, all > 0 ? `time: draft ${percent(share(draft))} · verify ${percent(share(verify))}${rest}` : 'time: –');
  }
}

const tile = (name, tip) => {
  const figure = h('b', {}, '–');
  const node = h('div', { class: 'dfx-tile', title: tip }, figure, h('span', {}, name));
  return { node, value: words => setText(figure, words) };
};

const legend = () => {
  const item = (kind, sample) => h('li', { title: KINDS[kind].tip },
    h('span', { class: `dfx-sample ${kind}`, 'aria-hidden': 'true' }, sample || KINDS[kind].mark), KINDS[kind].name);
  return h('ul', { class: 'dfx-legend', 'aria-label': 'Legend' },
    item('accepted'), item('correction'), item('bonus'), item('rejected'), item('mask', '▒'), item('first', '1'));
};

class Timeline {
  constructor(onSeek) {
    this.chart = new Canvas('Committed tokens per step', drawTimeline, 'dfx-timeline-canvas');
    this.range = h('input', { type: 'range', class: 'dfx-range', min: '0', max: '0', step: '1', 'aria-label': 'Step' });
    this.range.addEventListener('input', () => onSeek(Number(this.range.value)));
    this.node = h('div', { class: 'dfx-timeline' },
      h('p', { class: 'dfx-caption' }, 'Tokens per step', h('span', {}, 'drag to any step')), h('div', { class: 'dfx-timeline-area' }, this.chart.canvas, this.range));
    this.chart.canvas.addEventListener('pointerdown', event => {
      this.chart.canvas.setPointerCapture(event.pointerId);
      this.seekTo(event, onSeek);
      this.range.focus({ preventScroll: true });
    });
    this.chart.canvas.addEventListener('pointermove', event => event.buttons && this.seekTo(event, onSeek));
  }

  seekTo(event, onSeek) {
    if (!this.run || !this.run.steps.length) return;
    const box = this.chart.canvas.getBoundingClientRect();
    onSeek(timelineScale(this.run, box.width).stepAt(event.clientX - box.left));
  }

  show(run, cursor) {
    this.run = run;
    this.range.max = String(Math.max(0, run.steps.length - 1));
    this.range.value = String(Math.max(0, Math.min(cursor, run.steps.length - 1)));
    const step = run.steps[cursor];
    const words = step ? `Step ${cursor + 1} of ${run.steps.length}, ${plural(step.committed.length, 'token')} committed` : 'Before the first step';
    this.range.setAttribute('aria-valuetext', words);
    this.chart.paint(run, Math.min(cursor, run.steps.length - 1));
  }
}

class Charts {
  constructor() {
    this.positions = new Canvas('Share of drafted tokens accepted, by position in the block', drawPositions);
    this.lengths = new Canvas('How often a step accepted 0, 1, 2 … drafted tokens', drawLengths);
    this.time = new Canvas('Reply tokens over time', drawOverTime);
    this.all = [this.positions, this.lengths, this.time];
    this.timeCaption = h('span', {}, 'measured seconds');
    const figure = (chart, name, note) => h('figure', { class: 'dfx-chart' }, h('figcaption', { class: 'dfx-caption' }, name, note), chart.canvas);
    this.node = h('div', { class: 'dfx-charts' },
      figure(this.positions, 'Accepted by position', h('span', {}, '% per slot')),
      figure(this.lengths, 'Accepted per step', h('span', {}, 'steps with 0, 1, 2 … kept')),
      figure(this.time, 'Tokens over time', this.timeCaption));
  }

  show(run, cursor) {
    this.node.classList.toggle('plain', run.steps.length > 0 && !run.k);
    const pace = run.plainSeconds;
    setText(this.timeCaption, run.other ? 'dashed: plain decoding' : pace ? `dashed: plain, ${seconds(pace)} a token` : 'measured seconds');
    for (const chart of this.all) chart.paint(run, cursor);
  }

  describe(run) {
    const { offered, kept, lengths } = run.counts(run.steps.length);
    this.positions.describe(offered.map((n, i) => `Position ${i + 1}: ${percent(n ? kept[i] / n : 0)}`).join(', '));
    this.lengths.describe(lengths.map((n, i) => `${i} accepted: ${plural(n, 'step')}`).join(', '));
    const plain = run.plainSeconds ? `; plain decoding takes about ${seconds(run.plainSeconds)} a token` : '';
    this.time.describe(`${plural(1 + run.totals(run.steps.length).committed, 'token')} in ${seconds(run.duration)}${plain}`);
  }
}

const PAGE_ROWS = 50;
const COLUMNS = ['Step', 'Drafted', 'Accepted', 'Committed', 'Target’s own token', 'Kind', 'Draft', 'Verify', 'Text'];

// The same data as text, a page at a time; built only while it is open.
class Table {
  constructor(onPick) {
    this.onPick = onPick;
    this.body = h('tbody');
    this.where = h('span', { class: 'dfx-table-where' });
    this.page = 0;
    const turn = by => () => { this.page += by; this.build(); };
    this.previous = h('button', { type: 'button', class: 'dfx-button', onclick: turn(-1) }, 'Earlier');
    this.next = h('button', { type: 'button', class: 'dfx-button', onclick: turn(1) }, 'Later');
    this.node = h('details', { class: 'dfx-table' }, h('summary', {}, 'All steps as a table'),
      h('div', { class: 'dfx-table-scroll', tabindex: '0', role: 'group', 'aria-label': 'Table of steps' },
        h('table', {}, h('thead', {}, h('tr', {}, ...COLUMNS.map(name => h('th', { scope: 'col' }, name)))), this.body)),
      h('p', { class: 'dfx-table-pages' }, this.previous, this.where, this.next));
    this.node.addEventListener('toggle', () => this.node.open && this.build());
  }

  show(run, cursor) {
    const grown = this.run !== run || this.count !== run.steps.length || this.generation !== run.generation;
    this.run = run;
    if (!this.node.open) return;
    const page = Math.floor(Math.max(0, cursor) / PAGE_ROWS);
    if (cursor !== this.cursor) this.page = page;
    if (grown || cursor !== this.cursor) this.build(cursor);
  }

  build(cursor = this.cursor) {
    const run = this.run;
    if (!run) return;
    const pages = Math.max(1, Math.ceil(run.steps.length / PAGE_ROWS));
    this.page = Math.max(0, Math.min(this.page, pages - 1));
    const from = this.page * PAGE_ROWS;
    const steps = run.steps.slice(from, from + PAGE_ROWS);
    this.body.replaceChildren(...steps.map(step => this.row(step, step.index === cursor)));
    setText(this.where, steps.length ? `steps ${from + 1}–${from + steps.length} of ${run.steps.length}` : 'no steps yet');
    this.previous.disabled = this.page === 0;
    this.next.disabled = this.page === pages - 1;
    Object.assign(this, { cursor, count: run.steps.length, generation: run.generation });
  }

  row(step, current) {
    const button = h('button', { type: 'button', class: 'dfx-link', onclick: () => this.onPick(step.index) }, String(step.index + 1));
    const words = [step.drafted.length, step.accepted, step.committed.length, visible(step.pieces.posterior[step.accepted]),
      KINDS[stepKind(step)].name, seconds(step.draft_seconds), seconds(step.verify_seconds), visible(step.pieces.committed.join(''), 80)];
    return h('tr', { 'aria-current': current ? 'step' : null }, h('th', { scope: 'row' }, button), ...words.map(word => h('td', {}, h('bdi', {}, String(word)))));
  }
}
