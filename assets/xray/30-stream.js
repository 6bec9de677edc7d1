// The reply as coloured tokens. The text of the panel is the reply and nothing else: marks live in the style sheet.

const LINE_TOKENS = 320;

class Stream {
  constructor(onPick, onPreview) {
    this.panel = h('div', {
      class: 'dfx-stream', tabindex: '0', role: 'group', 'aria-label': 'Reply, coloured by who wrote each token',
    });
    this.text = h('div', { class: 'dfx-text' });
    this.panel.append(this.text);
    this.sticking = true;
    this.lastTop = 0;
    this.panel.addEventListener('scroll', () => this.scrolled(), { passive: true });
    this.panel.addEventListener('click', event => this.hit(event, onPick));
    this.panel.addEventListener('pointerover', event => event.pointerType !== 'touch' && this.hit(event, onPreview, null));
    this.panel.addEventListener('pointerleave', () => onPreview(null));
    this.clear();
  }

  clear() {
    this.text.replaceChildren();
    this.steps = new Map();
    this.count = 0;
    this.cursor = Infinity;
    this.selected = null;
    this.line = null;
    this.code = false;
    this.lastTop = 0;
    this.broken = false;
    this.lineTokens = 0;
    this.kind = 'first';
    this.lastStep = -1;
  }

  hit(event, tell, otherwise) {
    const node = event.target.closest('.dfx-step');
    if (node) tell(Number(node.dataset.step));
    else if (otherwise !== undefined) tell(otherwise);
  }

  addFirst(prefill) {
    this.addRun(-1, [[prefill.piece, 'first', '']]);
  }

  addStep(step) {
    const { committed, drafted, posterior } = step.pieces;
    const label = i => (i < step.accepted ? drafted[i] : posterior[step.accepted]);
    this.addRun(step.index, committed.map((piece, i) => [piece, kindAt(step, i), label(i)]));
    if (this.ghosts) this.addGhost(step);
  }

  addTail(tail) {
    if (tail) this.addRun(this.lastStep, [[tail, this.kind, '']]);
  }

  // One step's tokens: a group per line, so that a click anywhere in it finds the step.
  addRun(index, tokens) {
    let group = null;
    for (const [piece, kind, label] of tokens) {
      const parts = splitAtLastNewline(piece);
      parts.forEach((part, i) => {
        if (!this.line || this.broken || (this.lineTokens > LINE_TOKENS && /^\s/.test(part))) {
          this.startLine();
          group = null;
        }
        group = group || this.startGroup(index);
        group.append(tokenNode(part, kind, i === 0 ? label : ''));
        this.lineTokens++;
        this.broken = part.endsWith('\n');
      });
      this.kind = kind;
    }
    if (!tokens.length) this.startGroup(index);
    this.lastStep = index;
    this.count = index + 1;
  }

  // A fence switches between prose and code, which keeps its columns.
  startLine() {
    if (this.line && this.broken && /^\s*```/.test(this.line.textContent)) this.code = !this.code;
    this.line = h('div', { class: this.code ? 'dfx-line code' : 'dfx-line', dir: 'auto' });
    this.text.append(this.line);
    this.lineTokens = 0;
    this.broken = false;
  }

  startGroup(index) {
    if (!this.line) this.startLine();
    const group = h('span', { class: 'dfx-step', 'data-step': index });
    if (index > this.cursor) group.classList.add('future');
    this.line.append(group);
    if (!this.steps.has(index)) this.steps.set(index, []);
    this.steps.get(index).push(group);
    return group;
  }

  // What the draft wanted and did not get; drawn by the style sheet, so it is never part of the text.
  setGhosts(on, run) {
    this.ghosts = on;
    this.panel.classList.toggle('ghosts', on);
    if (on && !this.text.querySelector('.dfx-ghost')) run.steps.slice(0, this.count).forEach(step => this.addGhost(step));
  }

  addGhost(step) {
    const rejected = step.pieces.drafted.slice(step.accepted);
    const groups = this.steps.get(step.index);
    if (!rejected.length || !groups) return;
    const shown = rejected.map(piece => visible(piece, 24).replace(/␣/g, ' ')).join('');
    const ghost = h('span', { class: 'dfx-ghost', 'data-text': shown, 'aria-hidden': 'true' });
    const group = groups[groups.length - 1];
    const last = group.lastElementChild;
    group.insertBefore(ghost, last && last.classList.contains('newline') ? last : null);
  }

  // Everything after step `index` is the future: -1 leaves the first token, -2 nothing, Infinity all.
  setCursor(index) {
    if (index === this.cursor) return;
    const from = Math.max(-1, Math.min(index, this.cursor) + 1);
    const to = Math.min(this.count - 1, Math.max(index, this.cursor));
    for (let i = from; i <= to; i++) {
      for (const group of this.steps.get(i) || []) group.classList.toggle('future', i > index);
    }
    this.cursor = index;
  }

  select(index) {
    if (index === this.selected) return;
    for (const group of this.steps.get(this.selected) || []) group.classList.remove('chosen');
    for (const group of this.steps.get(index) || []) group.classList.add('chosen');
    this.selected = index;
  }

  // Scrolls the panel, never the page.
  reveal(index) {
    const group = (this.steps.get(index) || [])[0];
    if (!group) return;
    const inner = group.getBoundingClientRect();
    const outer = this.panel.getBoundingClientRect();
    if (inner.top < outer.top + 8 || inner.bottom > outer.bottom - 8) {
      this.panel.scrollTop += inner.top - outer.top - outer.height / 2;
    }
  }

  // Only moving up lets go of the bottom: text that grows below the view must not.
  scrolled() {
    const { scrollTop, scrollHeight, clientHeight } = this.panel;
    if (scrollHeight - scrollTop - clientHeight < 40) this.sticking = true;
    else if (scrollTop < this.lastTop - 1) this.sticking = false;
    this.lastTop = scrollTop;
  }

  toBottom() {
    this.sticking = true;
    this.panel.scrollTop = this.panel.scrollHeight;
  }
}

const splitAtLastNewline = piece => {
  const cut = piece.lastIndexOf('\n') + 1;
  return cut > 0 && cut < piece.length ? [piece.slice(0, cut), piece.slice(cut)] : [piece];
};

// A token without text is a special token or the first half of a character: the style sheet shows its label.
const tokenNode = (piece, kind, label) => {
  const node = h('span', { class: `dfx-token ${kind}` });
  node.textContent = piece;
  if (!piece) node.dataset.label = label.startsWith('⟨') ? '·' : visible(label, 24);
  else if (piece.endsWith('\n')) node.classList.add('newline');
  return node;
};
