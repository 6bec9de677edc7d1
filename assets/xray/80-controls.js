// Transport buttons, replay speed, step-by-step and the keyboard.

class Controls {
  constructor(xray, options) {
    this.xray = xray;
    const button = (name, label, act) => h('button', { type: 'button', class: 'dfx-button icon', title: label, 'aria-label': label, onclick: act }, icon(name));
    this.playButton = button('play', 'Play (space)', () => xray.togglePlay());
    this.playing = null;
    this.liveButton = h('button', { type: 'button', class: 'dfx-button live', title: 'Follow the latest step (End)', onclick: () => xray.followLive() }, icon('last'), 'Latest');
    this.speeds = SPEEDS.map(([speed, name, label]) => h('button', {
      type: 'button', class: 'dfx-button speed', 'aria-pressed': String(speed === 1), title: `Replay at ${label}`, 'aria-label': `Replay at ${label}`, onclick: () => xray.setSpeed(speed),
    }, name));
    this.ghosts = toggle('Show rejected', 'Show, in the reply, what the draft guessed and the target threw away', on => xray.showRejected(on));
    this.ghosts.classList.add('ghosts');
    this.stepMode = toggle('Step by step', 'Let the decoding wait for “Next step” after every block', on => this.setStepMode(on));
    this.next = h('button', { type: 'button', class: 'dfx-button primary', onclick: () => xray.next() }, 'Next step');
    this.next.hidden = true;
    this.stepMode.hidden = !options.stepMode;
    this.node = h('div', { class: 'dfx-controls', role: 'group', 'aria-label': 'Replay' },
      h('span', { class: 'dfx-group' },
        button('first', 'First step (Home)', () => xray.pick(0)), button('back', 'Previous step (←)', () => xray.move(-1)), this.playButton,
        button('forward', 'Next step (→)', () => xray.move(1)), this.liveButton),
      h('span', { class: 'dfx-group', role: 'group', 'aria-label': 'Replay speed' }, ...this.speeds),
      h('span', { class: 'dfx-group' }, this.ghosts, this.stepMode, this.next),
      h('span', { class: 'dfx-keys', 'aria-hidden': 'true' }, '← → step · space play · End latest'));
  }

  setStepMode(on) {
    this.next.hidden = !on;
    this.stepMode.setAttribute('aria-pressed', String(on));
    this.xray.tell('step_mode', { on });
  }

  get stepping() {
    return !this.next.hidden;
  }

  show(player) {
    const playing = player.mode === 'play';
    if (playing !== this.playing) {
      this.playing = playing;
      this.playButton.replaceChildren(icon(playing ? 'pause' : 'play'));
      const label = playing ? 'Pause (space)' : 'Play (space)';
      this.playButton.title = label;
      this.playButton.setAttribute('aria-label', label);
    }
    this.liveButton.classList.toggle('on', player.mode === 'live');
    this.speeds.forEach((button, i) => button.setAttribute('aria-pressed', String(SPEEDS[i][0] === player.speed)));
  }

  // The whole X-ray listens; a button keeps its own space and Enter, a block that scrolls its own arrows.
  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest('input:not([type=range]),textarea,select')) return;
    const act = {
      ArrowLeft: () => this.xray.move(-1),
      ArrowRight: () => this.xray.move(1),
      Home: () => this.xray.pick(0),
      End: () => this.xray.followLive(),
      ' ': () => this.xray.togglePlay(),
    }[event.key];
    if (!act || (event.key === ' ' && event.target.closest('button,summary'))) return;
    const scroller = event.target.closest('.dfx-block,.dfx-table-scroll');
    if (scroller && event.key.startsWith('Arrow') && scroller.scrollWidth > scroller.clientWidth) return;
    event.preventDefault();
    act();
  }
}

const toggle = (name, tip, tell) => h('button', {
  type: 'button', class: 'dfx-button toggle', 'aria-pressed': 'false', title: tip,
  onclick: event => {
    const on = event.currentTarget.getAttribute('aria-pressed') !== 'true';
    event.currentTarget.setAttribute('aria-pressed', String(on));
    tell(on);
  },
}, name);
