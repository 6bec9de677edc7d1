// The live charts: plain canvas, drawn from sums, in the colours of the style sheet.

const INKS = ['text', 'muted', 'faint', 'accepted', 'own', 'rejected', 'grid'];

class Canvas {
  constructor(label, draw, className = '') {
    this.label = label;
    this.draw = draw;
    this.canvas = h('canvas', { role: 'img', class: `dfx-canvas ${className}` });
    this.inks = null;
  }

  // Colours come from the style sheet, so light and dark follow the page.
  readInks() {
    const probe = h('span', { hidden: true });
    this.canvas.parentNode.append(probe);
    this.inks = {};
    for (const name of INKS) {
      probe.style.color = `var(--dfx-ink-${name})`;
      this.inks[name] = getComputedStyle(probe).color;
    }
    this.font = getComputedStyle(this.canvas).fontFamily;
    probe.remove();
  }

  paint(run, cursor) {
    const width = this.canvas.clientWidth;
    const height = this.canvas.clientHeight;
    if (!width || !height) return;
    if (!this.inks) this.readInks();
    const ratio = window.devicePixelRatio || 1;
    if (this.canvas.width !== Math.round(width * ratio) || this.canvas.height !== Math.round(height * ratio)) {
      this.canvas.width = Math.round(width * ratio);
      this.canvas.height = Math.round(height * ratio);
    }
    const pen = this.canvas.getContext('2d');
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    pen.font = `11px ${this.font}`;
    pen.lineWidth = 1;
    this.draw(pen, width, height, run, cursor, this.inks);
  }

  describe(text) {
    this.canvas.setAttribute('aria-label', `${this.label}. ${text}`);
  }
}

const text = (pen, ink, words, x, y, align = 'left', baseline = 'alphabetic') => {
  pen.fillStyle = ink;
  pen.textAlign = align;
  pen.textBaseline = baseline;
  pen.fillText(words, x, y);
};

const line = (pen, ink, x1, y1, x2, y2, dash = []) => {
  pen.strokeStyle = ink;
  pen.setLineDash(dash);
  pen.beginPath();
  pen.moveTo(x1, y1);
  pen.lineTo(x2, y2);
  pen.stroke();
  pen.setLineDash([]);
};

const bar = (pen, ink, x, y, width, height) => {
  pen.fillStyle = ink;
  pen.beginPath();
  // A canvas of no room, hidden or about to be laid out, gives bars of negative size.
  const round = Math.max(0, Math.min(2, width / 2, height / 2));
  pen.roundRect(x, y, width, height, [round, round, 0, 0]);
  pen.fill();
};

const TIMELINE = { left: 26, right: 34, top: 10, bottom: 16, widest: 24 };

// Where the bars of the timeline stand; the scrubber uses the same numbers.
const timelineScale = (run, width) => {
  const inner = Math.max(10, width - TIMELINE.left - TIMELINE.right);
  const count = Math.max(1, run.steps.length);
  const perBar = Math.max(1, Math.ceil((count * 2) / inner));
  const bars = Math.ceil(count / perBar);
  const pitch = Math.min(TIMELINE.widest, inner / bars);
  return {
    inner, perBar, bars, pitch,
    stepAt: x => Math.max(0, Math.min(run.steps.length - 1, Math.floor(((x - TIMELINE.left) / pitch) * perBar))),
    centre: step => TIMELINE.left + (Math.floor(step / perBar) + 0.5) * pitch,
  };
};

// Committed tokens per step: blue for the draft's, amber for the target's own, a line at 1 for plain decoding.
const drawTimeline = (pen, width, height, run, cursor, ink) => {
  const top = Math.max(2, run.k + 1);
  const base = height - TIMELINE.bottom;
  const y = value => base - (value / top) * (base - TIMELINE.top);
  const scale = timelineScale(run, width);
  const right = width - TIMELINE.right;
  for (const tick of [...new Set([0, Math.round(top / 2), top])]) {
    line(pen, ink.grid, TIMELINE.left, y(tick) + 0.5, right, y(tick) + 0.5);
    text(pen, ink.muted, tick, TIMELINE.left - 6, y(tick), 'right', 'middle');
  }
  for (let b = 0; b < scale.bars && run.steps.length; b++) drawStepBar(pen, run, scale, b, y, base, cursor, ink);
  line(pen, ink.text, TIMELINE.left, y(1) + 0.5, right, y(1) + 0.5, [4, 3]);
  text(pen, ink.text, 'plain', right + 4, y(1), 'left', 'middle');
  drawMean(pen, run, scale, y, right, cursor, ink);
  if (cursor >= 0 && run.steps.length) {
    const x = scale.centre(cursor);
    line(pen, ink.text, x, TIMELINE.top - 4, x, base + 2);
    pen.fillStyle = ink.text;
    pen.beginPath();
    pen.arc(x, base + 5, 4, 0, 7);
    pen.fill();
  }
};

const drawStepBar = (pen, run, scale, b, y, base, cursor, ink) => {
  const from = b * scale.perBar;
  const to = Math.min(run.steps.length, from + scale.perBar);
  const [start, end] = [run.totals(from), run.totals(to)];
  const committed = (end.committed - start.committed) / (to - from);
  const own = Math.min(committed, 1);
  const x = TIMELINE.left + b * scale.pitch;
  const gap = scale.pitch > 8 ? 2 : scale.pitch > 3 ? 1 : 0;
  pen.globalAlpha = from > cursor ? 0.3 : 1;
  const drafted = committed - own;
  if (drafted > 0) {
    pen.fillStyle = ink.accepted;
    pen.fillRect(x, y(drafted), scale.pitch - gap, base - y(drafted));
  }
  bar(pen, run.k ? ink.own : ink.muted, x, y(committed), scale.pitch - gap, y(drafted) - y(committed));
  pen.globalAlpha = 1;
};

const drawMean = (pen, run, scale, y, right, cursor, ink) => {
  const shown = Math.min(cursor + 1, run.steps.length);
  if (shown < 1) return;
  pen.strokeStyle = ink.text;
  pen.lineWidth = 1.75;
  pen.beginPath();
  let last = 0;
  for (let b = 0; b * scale.perBar < shown; b++) {
    const count = Math.min(shown, (b + 1) * scale.perBar);
    last = run.totals(count).committed / count;
    const x = TIMELINE.left + (b + 0.5) * scale.pitch;
    if (b) pen.lineTo(x, y(last));
    else pen.moveTo(x, y(last));
  }
  pen.stroke();
  pen.lineWidth = 1;
  const gap = Math.abs(y(last) - y(1)) < 12 ? y(1) - 12 : y(last);
  text(pen, ink.text, `τ ${decimal(last)}`, right + 4, gap, 'left', 'middle');
};

// Bars with a number on each: shares (0..1) or counts.
const drawBars = (values, names, show, top) => (pen, width, height, inks, ink) => {
  const base = height - 18;
  const pitch = (width - 4) / Math.max(1, values.length);
  const size = Math.min(34, pitch - 3);
  line(pen, inks.grid, 0, base + 0.5, width, base + 0.5);
  values.forEach((value, i) => {
    const x = 2 + i * pitch + (pitch - size) / 2;
    const tall = top > 0 ? (value / top) * (base - 18) : 0;
    if (tall > 0) bar(pen, ink(i), x, base - tall, size, tall);
    const middle = x + size / 2;
    if (pitch >= 13 || i % 2 === 0) text(pen, inks.muted, names[i], middle, height - 4, 'center');
    if (pitch >= 24 || value === Math.max(...values)) text(pen, inks.text, show(value), middle, base - tall - 4, 'center');
  });
};

const drawPositions = (pen, width, height, run, cursor, ink) => {
  const { offered, kept } = run.counts(Math.min(cursor + 1, run.steps.length));
  const shares = offered.map((n, i) => (n ? kept[i] / n : 0));
  drawBars(shares, shares.map((_, i) => i + 1), share => Math.round(share * 100), 1)(pen, width, height, ink, () => ink.accepted);
};

const drawLengths = (pen, width, height, run, cursor, ink) => {
  const { lengths } = run.counts(Math.min(cursor + 1, run.steps.length));
  const top = Math.max(1, ...lengths);
  drawBars(lengths, lengths.map((_, i) => i), String, top)(pen, width, height, ink, () => ink.accepted);
};

// Reply tokens over measured seconds; the dashed line is plain decoding: its own run, or the pace measured before this one.
const drawOverTime = (pen, width, height, run, cursor, ink) => {
  const other = run.other && run.other.steps.length ? run.other : null;
  const longest = Math.max(run.duration, other ? other.duration : 0) || 1;
  const most = Math.max(1, 1 + run.totals(run.steps.length).committed, other ? 1 + other.totals(other.steps.length).committed : 0);
  const [left, base] = [8, height - 18];
  const x = time => left + (time / longest) * (width - left - 6);
  const y = tokens => base - (tokens / most) * (base - 16);
  line(pen, ink.grid, left, base + 0.5, width, base + 0.5);
  text(pen, ink.muted, seconds(longest), width - 4, height - 4, 'right');
  text(pen, ink.muted, '0', left, height - 4);
  text(pen, ink.text, plural(most, 'token'), left, 10);
  if (other) curve(pen, other, other.steps.length - 1, x, y, ink.muted, [4, 3]);
  else if (run.plainSeconds && run.prefill) {
    const start = run.prefill.seconds;
    pen.lineWidth = 2;
    line(pen, ink.muted, x(start), y(1), x(longest), y(1 + (longest - start) / run.plainSeconds), [4, 3]);
    pen.lineWidth = 1;
  }
  pen.globalAlpha = 0.3;
  curve(pen, run, run.steps.length - 1, x, y, run.k ? ink.accepted : ink.text);
  pen.globalAlpha = 1;
  curve(pen, run, Math.min(cursor, run.steps.length - 1), x, y, run.k ? ink.accepted : ink.text);
};

const curve = (pen, run, until, x, y, ink, dash = []) => {
  if (until < -1 || !run.prefill) return;
  const every = Math.max(1, Math.floor(until / 400));
  pen.strokeStyle = ink;
  pen.lineWidth = 2;
  pen.setLineDash(dash);
  pen.beginPath();
  pen.moveTo(x(run.prefill.seconds), y(1));
  for (let i = 0; i <= until; i += every) pen.lineTo(x(run.endOf(i)), y(1 + run.totals(i + 1).committed));
  if (until >= 0) pen.lineTo(x(run.endOf(until)), y(1 + run.totals(until + 1).committed));
  pen.stroke();
  pen.setLineDash([]);
  pen.lineWidth = 1;
};
