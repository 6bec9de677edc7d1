// Which moment of the run is shown: following live, standing still at a step, or replaying on the measured clock.

const SPEEDS = [[1, '1×', 'measured speed'], [0.5, '1/2', 'half speed'], [0.1, '1/10', 'a tenth of the speed'], [0.01, '1/100', 'a hundredth of the speed']];
// Below this many seconds on screen a step is too short to show mask, guess and verdict one after the other.
const PHASED_SECONDS = 0.24;

class Player {
  constructor(run) {
    this.run = run;
    this.speed = 1;
    this.live();
  }

  get last() {
    return this.run.steps.length - 1;
  }

  get cursor() {
    return this.mode === 'live' ? (this.run.prefill ? this.last : -2) : Math.min(this.index, this.last);
  }

  get atEnd() {
    return this.mode === 'live' || (this.mode === 'still' && this.index >= this.last && this.phase === 'verdict');
  }

  live() {
    this.mode = 'live';
    this.phase = 'verdict';
  }

  still(index, phase = 'verdict') {
    this.mode = 'still';
    this.index = Math.max(-1, Math.min(index, this.last));
    this.phase = phase;
  }

  // Stands at `time` seconds of the run: what was committed by then is there, the rest is not.
  stillAt(time) {
    this.mode = 'clock';
    this.setTime(time);
  }

  play() {
    const from = this.mode === 'still' && this.index < this.last ? this.run.endOf(this.index) : 0;
    this.mode = 'play';
    this.setTime(from);
    this.before = null;
  }

  pause() {
    if (this.mode === 'play') this.still(Math.max(-1, this.index));
  }

  // One frame of a replay; true while it goes on.
  tick(now) {
    if (this.mode !== 'play') return false;
    const passed = this.before === null ? 0 : Math.min(0.25, (now - this.before) / 1000);
    this.before = now;
    this.setTime(this.time + passed * this.speed);
    if (this.time >= this.run.duration) this.live();
    return this.mode === 'play';
  }

  setTime(time) {
    this.time = time;
    this.index = this.run.at(time);
    this.phase = 'verdict';
  }

  // The step and phase for the block view: in a slow replay it runs ahead into the step being computed.
  get block() {
    const next = this.index + 1;
    const moving = (this.mode === 'play' || this.mode === 'clock') && this.index >= -1 && next <= this.last;
    if (!moving || !this.run.steps[next].drafted.length) return [this.cursor, this.phase];
    const length = this.run.endOf(next) - this.run.endOf(this.index);
    if (length / this.speed < PHASED_SECONDS) return [this.cursor, 'verdict'];
    const done = (this.time - this.run.endOf(this.index)) / length;
    if (done < 0.35) return [this.cursor, 'verdict'];
    return [next, done < 0.6 ? 'mask' : 'draft'];
  }
}

// One clock for several X-rays: measured apart, replayed side by side.
class Clock {
  constructor(lanes) {
    this.lanes = lanes;
    this.speed = 1;
    this.time = 0;
    this.running = false;
    this.listeners = [];
  }

  get duration() {
    return Math.max(0, ...this.lanes.map(lane => lane.duration));
  }

  seek(time) {
    this.time = Math.max(0, Math.min(time, this.duration));
    for (const lane of this.lanes) lane.seekTime(this.time, this.speed);
    for (const listener of this.listeners) listener(this.time, this.duration);
  }

  play() {
    if (this.running) return;
    if (this.time >= this.duration) this.seek(0);
    this.running = true;
    this.before = null;
    requestAnimationFrame(now => this.frame(now));
  }

  pause() {
    this.running = false;
  }

  setSpeed(speed) {
    this.speed = speed;
  }

  on(name, listener) {
    if (name === 'time') this.listeners.push(listener);
    return () => { this.listeners = this.listeners.filter(other => other !== listener); };
  }

  frame(now) {
    if (!this.running) return;
    const passed = this.before === null ? 0 : Math.min(0.25, (now - this.before) / 1000);
    this.before = now;
    this.seek(this.time + passed * this.speed);
    if (this.time >= this.duration) this.running = false;
    else requestAnimationFrame(next => this.frame(next));
  }
}
