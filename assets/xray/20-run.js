// One run as read from its NDJSON: parses only what is new and keeps sums per step, so any moment is one look-up.

class Run {
  constructor() {
    this.clear();
  }

  clear() {
    this.generation = (this.generation || 0) + 1;
    this.source = '';
    this.offset = 0;
    this.head = '';
    this.header = null;
    this.prefill = null;
    this.finish = null;
    this.cancel = null;
    this.steps = [];
    this.sums = [{ steps: 0, committed: 0, drafted: 0, accepted: 0, draftSeconds: 0, verifySeconds: 0 }];
    this.k = 0;
  }

  // Takes the whole string; true when it is a different run than before, and everything starts afresh.
  setSource(text) {
    const other = text.length < this.offset || !text.startsWith(this.head);
    if (other) this.clear();
    this.source = text;
    return other;
  }

  get pending() {
    return this.source.indexOf('\n', this.offset) >= 0;
  }

  // Reads at most so many whole lines; returns their rows.
  read(most) {
    const rows = [];
    while (rows.length < most) {
      const end = this.source.indexOf('\n', this.offset);
      if (end < 0) return rows;
      const row = this.readLine(this.source.slice(this.offset, end));
      if (!this.offset) this.head = this.source.slice(0, end + 1);
      this.offset = end + 1;
      if (row) rows.push(row);
    }
    return rows;
  }

  readLine(line) {
    let row;
    try {
      row = JSON.parse(line);
    } catch {
      console.warn('X-ray: a line of the trace is not JSON and was skipped.');
      return null;
    }
    if (row.format) this.header = row;
    else if (row.t === 'prefill') this.prefill = row;
    else if (row.t === 'finish') this.finish = row;
    else if (row.t === 'cancel') this.cancel = row;
    else if (row.t === 'step') this.addStep(row);
    return row;
  }

  addStep(step) {
    const last = this.sums[this.sums.length - 1];
    this.steps.push(step);
    this.k = Math.max(this.k, step.drafted.length);
    this.sums.push({
      steps: last.steps + 1,
      committed: last.committed + step.committed.length,
      drafted: last.drafted + step.drafted.length,
      accepted: last.accepted + step.accepted,
      draftSeconds: last.draftSeconds + step.draft_seconds,
      verifySeconds: last.verifySeconds + step.verify_seconds,
    });
  }

  get ended() {
    return Boolean(this.finish || this.cancel);
  }

  get baseline() {
    return this.header ? this.header.drafting === false : this.steps.length > 0 && this.k === 0;
  }

  // Seconds of one pass of plain decoding on that machine, measured before this run; null for a baseline.
  get plainSeconds() {
    return (this.k && this.header && this.header.baseline_seconds) || null;
  }

  // Sums over the first `count` steps.
  totals(count) {
    return this.sums[Math.max(0, Math.min(count, this.steps.length))];
  }

  // Measured seconds from the start of the run to the end of step `index`; -1 is the end of the prefill.
  endOf(index) {
    const t = this.totals(index + 1);
    return (this.prefill ? this.prefill.seconds : 0) + t.draftSeconds + t.verifySeconds;
  }

  get duration() {
    return this.endOf(this.steps.length - 1);
  }

  // The last step whose tokens were there at `time` seconds; -1 only the first token, -2 nothing yet.
  at(time) {
    if (!this.prefill || time < this.prefill.seconds) return -2;
    let low = -1;
    let high = this.steps.length - 1;
    while (low < high) {
      const middle = low + Math.ceil((high - low) / 2);
      if (this.endOf(middle) <= time + 1e-9) low = middle;
      else high = middle - 1;
    }
    return low;
  }

  // Per position 1..k how often it was drafted and accepted, and how often exactly a tokens were accepted.
  counts(count) {
    const offered = new Array(this.k).fill(0);
    const kept = new Array(this.k).fill(0);
    const lengths = new Array(this.k + 1).fill(0);
    for (let i = 0; i < count; i++) {
      const { drafted, accepted } = this.steps[i];
      lengths[accepted]++;
      for (let p = 0; p < drafted.length; p++) {
        offered[p]++;
        if (p < accepted) kept[p]++;
      }
    }
    return { offered, kept, lengths };
  }

  // Seconds after the prefill that went to drafting, verifying and (known at the end) anything else.
  split(count) {
    const t = this.totals(count);
    const whole = this.finish && count === this.steps.length;
    const known = t.draftSeconds + t.verifySeconds;
    const all = whole ? Math.max(known, this.finish.seconds - (this.prefill ? this.prefill.seconds : 0)) : known;
    return { draft: t.draftSeconds, verify: t.verifySeconds, other: whole ? all - known : null, all };
  }
}
