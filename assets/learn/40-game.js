// Predict the accepted length: recorded steps, verdict hidden until the reader has chosen.

class Game {
  constructor(run, order, show) {
    this.run = run;
    this.order = order;
    this.show = show;
    this.node = h('div', 'dfl-game');
    this.restart();
  }

  restart() {
    this.round = 0;
    this.guesses = [];
    this.ask();
  }

  get step() {
    return this.run[this.order[this.round]];
  }

  ask() {
    const { step } = this;
    const k = step.drafted.length;
    this.show(this.order[this.round], 'draft');
    this.choices = Array.from({ length: k + 1 }, (_, n) => button(String(n), 'dfl-choice', () => this.answer(n)));
    this.choices.forEach((choice, n) => choice.setAttribute('aria-label', `${n} of ${k} accepted`));
    this.said = h('p', 'dfl-said');
    this.said.setAttribute('role', 'status');
    this.next = button('', 'dfl-button main', () => this.advance());
    this.next.hidden = true;
    this.node.replaceChildren(h('p', 'dfl-note strong', `Round ${this.round + 1} of ${this.order.length}: how many of the ${k} guesses are accepted?`),
      h('div', 'dfl-choices', ...this.choices), this.said, this.next);
  }

  answer(guess) {
    const { step } = this;
    const off = Math.abs(guess - step.accepted);
    this.guesses.push({ guess, truth: step.accepted, rule: ruleOf(step) });
    this.choices.forEach((choice, n) => {
      choice.disabled = true;
      choice.classList.toggle('right', n === step.accepted);
      choice.classList.toggle('mine', n === guess);
    });
    this.show(this.order[this.round], 'verdict');
    const truth = step.accepted === step.drafted.length ? `All ${step.accepted} were accepted, and a bonus token came with them.` : `${step.accepted} ${step.accepted === 1 ? 'was' : 'were'} accepted.`;
    setText(this.said, `${off === 0 ? '✓ Exactly.' : off === 1 ? 'Close, off by one.' : `Off by ${off}.`} ${truth}`);
    setText(this.next, this.round + 1 < this.order.length ? 'Next block' : 'Result');
    this.next.hidden = false;
    this.next.focus({ preventScroll: true });
  }

  advance() {
    this.round += 1;
    if (this.round < this.order.length) this.ask();
    else this.result();
  }

  result() {
    const mean = pick => this.guesses.reduce((sum, one) => sum + Math.abs(pick(one) - one.truth), 0) / this.guesses.length;
    const exact = this.guesses.filter(one => one.guess === one.truth).length;
    const [mine, rule] = [mean(one => one.guess), mean(one => one.rule)];
    const duel = mine < rule ? 'You beat it.' : mine > rule ? 'It beat you.' : 'A draw.';
    this.node.replaceChildren(h('p', 'dfl-said', `You were exact in ${exact} of ${this.guesses.length} blocks and off by ${mine.toFixed(1)} on average.`),
      h('p', '', `A simple rule, stop before the first guess that the draft model holds below 50 %, is off by ${rule.toFixed(1)}. ${duel}`),
      button('Play again', 'dfl-button', () => this.restart()));
  }
}

const ruleOf = step => {
  const doubt = step.draft_confidence.findIndex(sure => sure < 0.5);
  return doubt < 0 ? step.drafted.length : doubt;
};
