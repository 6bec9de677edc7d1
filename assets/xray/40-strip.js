// One step as a block: anchor, drafted slots, the target's choice under each, the verdict between them.

class Strip {
  constructor() {
    this.sentence = h('p', { class: 'dfx-sentence' });
    this.track = h('ol', { class: 'dfx-slots', 'aria-label': 'Slots of the block' });
    this.scroller = h('div', { class: 'dfx-block', tabindex: '0', role: 'group', 'aria-label': 'Block' },
      h('div', { class: 'dfx-rows', 'aria-hidden': 'true' },
        h('span', { class: 'dfx-row-no' }, 'Slot'), h('span', { class: 'dfx-row-draft' }, 'Draft guessed'),
        h('span', { class: 'dfx-row-verdict' }), h('span', { class: 'dfx-row-target' }, 'Target chose')),
      this.track);
    this.times = new Times();
    this.node = h('div', { class: 'dfx-strip' }, this.sentence, this.scroller, this.times.node);
    this.slots = [];
    this.shown = '';
    this.middle = 0;
  }

  // phase: 'mask' slots still empty, 'draft' guesses made and not checked, 'verdict' all known.
  show(run, index, phase = 'verdict') {
    const key = `${run.generation}:${index}:${phase}:${run.ended}`;
    if (key === this.shown) return;
    this.shown = key;
    const step = run.steps[index];
    setText(this.sentence, phaseSentence(run, index, phase));
    this.node.classList.toggle('empty', !step && !run.prefill);
    this.node.classList.toggle('plain', !step || !step.drafted.length);
    this.node.classList.toggle('first', !step);
    const cells = step ? stepCells(step, phase) : prefillCells(run);
    cells.forEach((cell, i) => this.slot(i).fill(cell));
    this.slots.forEach((slot, i) => { slot.node.hidden = i >= cells.length; });
    this.times.show(step, phase);
    this.middle = step ? Math.min(step.accepted + 1, cells.length - 1) : 0;
    this.moved = true;
  }

  // In a narrow view the slot that decided the step is the one to see. Asks for sizes, so it comes after all drawing of a
  // frame: in the middle of it the browser would lay out the page twice.
  centre() {
    if (!this.moved) return;
    this.moved = false;
    const { scroller, track } = this;
    const slot = track.children[this.middle];
    if (scroller.scrollWidth <= scroller.clientWidth || !slot) return;
    scroller.scrollLeft = slot.offsetLeft + slot.offsetWidth / 2 - scroller.clientWidth / 2;
  }

  slot(i) {
    if (!this.slots[i]) {
      this.slots[i] = new Slot();
      this.track.append(this.slots[i].node);
    }
    return this.slots[i];
  }
}

const phaseSentence = (run, index, phase) => {
  if (phase === 'verdict' || index < 0) return sentence(run, index);
  const k = run.steps[index].drafted.length;
  if (!k) return `Step ${index + 1}: the target computes one token.`;
  if (phase === 'mask') return `Step ${index + 1}: the draft fills ${plural(k, 'masked slot')} at once.`;
  return `Step ${index + 1}: the target checks ${k === 1 ? 'the guess' : `all ${k} guesses`} in one pass.`;
};

const prefillCells = run => (run.prefill
  ? [{ no: 'first', target: run.prefill.piece, targetKind: 'first', verdict: '', aria: 'First token' }]
  : []);

const stepCells = (step, phase) => {
  const k = step.drafted.length;
  const cells = [{ no: 'anchor', wide: visible(step.pieces.anchor).length, draft: step.pieces.anchor, draftKind: 'anchor', verdict: '',
    aria: `Anchor ${visible(step.pieces.anchor)}, written before` }];
  for (let slot = 1; slot <= k; slot++) cells.push(draftCell(step, slot, phase));
  if (phase === 'verdict') cells.push(extraCell(step, k));
  else cells.push({ wide: visible(step.pieces.posterior[k]).length, no: k ? '+1' : 'next', verdict: '', target: '', targetKind: 'mask', aria: 'Target’s own token, not computed yet' });
  return cells;
};

const draftCell = (step, slot, phase) => {
  const i = slot - 1;
  const piece = step.pieces.drafted[i];
  const wide = Math.max(visible(piece).length, visible(step.pieces.posterior[i]).length);
  if (phase === 'mask') return { wide, no: slot, draftKind: 'mask', draft: '', verdict: '', targetKind: 'mask', target: '', aria: `Slot ${slot}: mask` };
  const base = { wide, no: slot, draft: piece, draftConfidence: step.draft_confidence[i] };
  if (phase === 'draft') {
    return { ...base, draftKind: 'guess', verdict: '?', target: '', targetKind: 'mask', aria: `Slot ${slot}: guessed ${visible(piece)}` };
  }
  const accepted = slot <= step.accepted;
  const first = slot === step.accepted + 1;
  return {
    ...base,
    draftKind: accepted ? 'accepted' : 'rejected',
    verdict: accepted ? '✓' : '✗',
    late: !accepted && !first,
    target: step.pieces.posterior[i],
    targetKind: accepted ? 'agreed' : first ? 'correction' : 'unused',
    targetConfidence: step.target_confidence[i],
    aria: slotWords(step, slot, accepted, first),
  };
};

const slotWords = (step, slot, accepted, first) => {
  const guess = visible(step.pieces.drafted[slot - 1]);
  const own = visible(step.pieces.posterior[slot - 1]);
  const sure = percent(step.draft_confidence[slot - 1]);
  if (accepted) return `Slot ${slot}: ${guess}, draft ${sure} sure, accepted`;
  if (first) return `Slot ${slot}: ${guess}, draft ${sure} sure, rejected; the target corrects to ${own}`;
  return `Slot ${slot}: ${guess}, draft ${sure} sure, thrown away after the first rejection`;
};

// The target's choice after the last slot: the bonus when every guess was right, otherwise it counts for nothing.
const extraCell = (step, k) => {
  const used = step.accepted === k && step.committed.length > step.accepted;
  const kind = !used ? 'unused' : k ? 'bonus' : 'plain';
  const piece = step.pieces.posterior[k];
  return {
    wide: visible(piece).length, no: k ? '+1' : 'next', verdict: used && k ? '★' : '', late: !used, target: piece, targetKind: kind,
    targetConfidence: step.target_confidence[k],
    aria: used ? `${k ? 'Bonus' : 'Target'}: ${visible(piece)}` : `Not used: ${visible(piece)}`,
  };
};

class Slot {
  constructor() {
    this.no = h('span', { class: 'dfx-slot-no' });
    this.draft = new Chip('draft');
    this.verdict = h('span', { class: 'dfx-verdict' });
    this.target = new Chip('target');
    this.node = h('li', { class: 'dfx-slot' }, this.no, this.draft.node, this.verdict, this.target.node);
  }

  fill(cell) {
    setText(this.no, String(cell.no));
    this.draft.fill(cell.draft, cell.draftKind, cell.draftConfidence);
    this.target.fill(cell.target, cell.targetKind, cell.targetConfidence);
    setText(this.verdict, cell.verdict);
    setClass(this.node, `dfx-slot is-${cell.draftKind || cell.targetKind}${cell.late ? ' late' : ''}`);
    this.node.setAttribute('aria-label', cell.aria);
    // The final width from the start, so that a replay does not shift while slots fill.
    this.node.style.setProperty('--wide', Math.min(cell.wide || 1, 13));
  }
}

const CHIP_TIPS = {
  anchor: 'Anchor: the last token already written.',
  guess: 'A guess that the target has not checked yet.',
  agreed: 'The target would have written the same.',
  unused: 'Computed after a wrong guess, so it counts for nothing.',
  ...Object.fromEntries(Object.entries(KINDS).map(([kind, { tip }]) => [kind, tip])),
};

class Chip {
  constructor(row) {
    this.row = row;
    this.lead = h('span', { class: 'dfx-lead' });
    this.word = h('span');
    this.token = h('bdi', { class: 'dfx-chip-text' }, this.lead, this.word);
    this.bar = h('i', { class: 'dfx-bar' });
    this.figure = h('span', { class: 'dfx-figure' });
    this.node = h('span', { class: 'dfx-chip' }, this.token, h('span', { class: 'dfx-sure' }, this.bar, this.figure));
  }

  fill(piece, kind, confidence) {
    setClass(this.node, `dfx-chip ${this.row} ${kind || 'none'}`);
    const shown = kind === 'mask' ? '▒▒' : piece === undefined ? '' : visible(piece);
    const blank = shown.length > 1 && shown.startsWith('␣') ? '␣' : '';
    setText(this.lead, blank);
    setText(this.word, shown.slice(blank.length));
    const known = confidence !== undefined && confidence !== null;
    this.bar.style.setProperty('--sure', known ? confidence : 0);
    setText(this.figure, known ? percent(confidence) : '');
    const sure = known ? ` ${this.row === 'draft' ? 'Draft' : 'Target'} ${percent(confidence)} sure.` : '';
    this.node.title = piece === undefined || !kind ? '' : `${visible(piece, 200)}\n${CHIP_TIPS[kind]}${sure}`;
  }
}

class Times {
  constructor() {
    this.draft = h('span', { class: 'dfx-time draft' });
    this.verify = h('span', { class: 'dfx-time verify' });
    this.bar = h('span', { class: 'dfx-time-bar', 'aria-hidden': 'true' }, h('i', { class: 'draft' }), h('i', { class: 'verify' }));
    this.each = h('span', { class: 'dfx-time each' });
    this.node = h('p', { class: 'dfx-times' }, this.draft, this.bar, this.verify, this.each);
  }

  show(step, phase) {
    const verdict = phase === 'verdict';
    this.node.hidden = !step;
    if (!step) return;
    const total = step.draft_seconds + step.verify_seconds;
    setText(this.draft, step.drafted.length ? `draft ${seconds(step.draft_seconds)}` : 'no draft');
    setText(this.verify, `verify ${seconds(step.verify_seconds)}`);
    this.bar.style.setProperty('--share', total > 0 ? step.draft_seconds / total : 0);
    const n = step.committed.length;
    setText(this.each, verdict && n ? `${plural(n, 'token')} in ${seconds(total)} = ${seconds(total / n)} each` : '');
  }
}
