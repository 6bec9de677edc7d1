// The what-if model: speed-up = τ × plain pass ÷ (draft pass + verify pass), with measured times to start from.

const W = 460;
const H = 230;
const PAD = { left: 40, right: 14, top: 16, bottom: 34 };

class WhatIf {
  constructor(recorded, where, onMeasure, machine) {
    this.source = { costs: recorded, where: `from the recording (${where})` };
    this.recorded = this.source;
    this.onMeasure = onMeasure;
    this.tau = this.slider('Acceptance length τ', 'tokens per verify pass', 1, 2, 0.05);
    this.draft = this.slider('One draft pass', 'in plain passes', 0, 2, 0.01);
    this.verify = this.slider('One verify pass', 'in plain passes', 1, 6, 0.01);
    this.factor = h('strong', 'dfl-factor');
    this.verdict = h('span', 'dfl-verdict');
    this.where = h('p', 'dfl-note');
    this.plot = svg('svg', { viewBox: `0 0 ${W} ${H}`, class: 'dfl-plot', role: 'img' });
    this.measureButton = button('Measure this machine', 'dfl-button', () => this.measure());
    const reset = button('Reset', 'dfl-button', () => this.take(this.source));
    this.node = h('figure', 'dfl-whatif', h('div', 'dfl-result', this.factor, this.verdict), this.plot,
      this.tau.node, this.draft.node, this.verify.node, h('div', 'dfl-row', this.measureButton, reset), this.where);
    this.take(machine || this.source);
  }

  slider(name, unit, min, max, step) {
    const input = Object.assign(document.createElement('input'), { type: 'range', min, max, step });
    const value = h('output', '');
    input.setAttribute('aria-label', `${name}, ${unit}`);
    input.addEventListener('input', () => this.draw());
    return { input, value, node: h('label', 'dfl-slider', h('span', '', name, ' ', h('i', '', unit)), value, input) };
  }

  // Start from measured numbers; the sliders reach somewhat further than these.
  take(source) {
    this.source = source;
    const c = source.costs;
    const put = (slider, value, max) => { slider.input.max = max; slider.input.value = value; };
    put(this.tau, c.tau, c.block_size);
    put(this.draft, c.draft_seconds / c.plain_seconds, Math.max(2, Math.ceil(2 * c.draft_seconds / c.plain_seconds)));
    put(this.verify, c.verify_seconds / c.plain_seconds, Math.max(4, Math.ceil(2 * c.verify_seconds / c.plain_seconds)));
    setText(this.where, `Times ${source.where}: plain pass ${milliseconds(c.plain_seconds)}, draft pass ${milliseconds(c.draft_seconds)}, verify pass ${milliseconds(c.verify_seconds)} for a block of ${c.block_size}.`);
    this.draw();
  }

  measure() {
    this.measureButton.disabled = true;
    setText(this.measureButton, 'Measuring…');
    this.onMeasure();
  }

  measured(source) {
    this.measureButton.disabled = false;
    setText(this.measureButton, 'Measure this machine');
    if (source) this.take(source);
  }

  draw() {
    const [tau, draft, verify] = [this.tau, this.draft, this.verify].map(slider => Number(slider.input.value));
    const price = draft + verify;
    const factor = tau / price;
    const plain = this.source.costs.plain_seconds;
    setText(this.tau.value, tau.toFixed(2));
    setText(this.draft.value, `${draft.toFixed(2)} × = ${milliseconds(draft * plain)}`);
    setText(this.verify.value, `${verify.toFixed(2)} × = ${milliseconds(verify * plain)}`);
    setText(this.factor, `${factor.toFixed(2)}×`);
    const even = `break-even at τ = ${price.toFixed(2)}`;
    setText(this.verdict, factor >= 1 ? `the speed of plain decoding; ${even}` : `slower than plain decoding; ${even}`);
    this.node.classList.toggle('slower', factor < 1);
    this.chart(tau, price, Number(this.tau.input.max));
  }

  chart(tau, price, most) {
    const top = Math.max(2, Math.ceil(most / price));
    const x = value => PAD.left + (W - PAD.left - PAD.right) * (value - 1) / (most - 1);
    const y = value => H - PAD.bottom - (H - PAD.top - PAD.bottom) * value / top;
    const parts = [svg('rect', { x: PAD.left, y: y(1), width: W - PAD.left - PAD.right, height: y(0) - y(1), class: 'loss' })];
    const ticks = top > 6 ? 2 : 1;
    for (let value = 0; value <= top; value += ticks) {
      parts.push(svg('line', { x1: PAD.left, x2: W - PAD.right, y1: y(value), y2: y(value), class: value === 1 ? 'one' : 'grid' }),
        svg('text', { x: PAD.left - 7, y: y(value) + 4, 'text-anchor': 'end' }, `${value}×`));
    }
    for (let value = 1; value <= most; value += most > 9 ? 3 : 1) parts.push(svg('text', { x: x(value), y: H - 16, 'text-anchor': 'middle' }, String(value)));
    parts.push(svg('text', { x: W - PAD.right, y: H - 3, 'text-anchor': 'end' }, 'acceptance length τ'),
      svg('text', { x: W - PAD.right - 8, y: y(0) - 6, 'text-anchor': 'end' }, 'slower than plain decoding'),
      svg('line', { x1: x(1), y1: y(1 / price), x2: x(most), y2: y(most / price), class: 'line' }),
      svg('line', { x1: x(tau), x2: x(tau), y1: y(0), y2: y(tau / price), class: 'drop' }),
      svg('circle', { cx: x(tau), cy: y(tau / price), r: 7, class: 'dot' }));
    this.plot.replaceChildren(...parts);
    this.plot.setAttribute('aria-label', `Speed-up over acceptance length: ${(tau / price).toFixed(2)} times at τ ${tau.toFixed(2)}`);
  }
}
