// Who attends to whom, drawn from masks that the draft model's own rule made.

const KINDS = {
  draft: {
    name: 'Draft model',
    words: 'Each row is a slot of the block, each column something it may look at. Every slot sees all of the context and the whole block, to the left and to the right.',
  },
  target: {
    name: 'Target, checking',
    words: 'The same block in the target’s verify pass: each token sees what stands before it and itself, never what comes after. So one pass gives the choice after every slot.',
  },
  training: {
    name: 'In training',
    words: 'Many blocks of one text are filled in a single pass. Each sees the context before its own anchor and itself; no block sees another.',
  },
};

class Attention {
  constructor(pictures, step, before) {
    this.pictures = pictures;
    this.step = step;
    this.before = before;
    this.tabs = Object.entries(KINDS).map(([kind, { name }]) => [kind, button(name, 'dfl-tab', () => this.show(kind))]);
    this.figure = h('div', 'dfl-mask');
    this.words = h('p', 'dfl-note');
    this.note = h('p', 'dfl-note strong');
    this.node = h('figure', 'dfl-attention', h('div', 'dfl-tabs', ...this.tabs.map(([, tab]) => tab)), this.figure, this.note, this.words);
    this.show('draft');
  }

  show(kind) {
    for (const [own, tab] of this.tabs) tab.setAttribute('aria-pressed', String(own === kind));
    setText(this.words, KINDS[kind].words);
    setText(this.note, '\u00a0');
    const { keys, queries } = this.labels(kind);
    const { rows } = this.pictures[kind];
    const split = keys.length - queries.length;
    const head = h('div', 'dfl-mask-row head', h('span', 'dfl-mask-name'), ...keys.map((key, i) => h('span', `dfl-mask-key${i === split ? ' split' : ''}`, key)));
    const body = rows.map((row, r) => {
      const line = h('div', 'dfl-mask-row', h('span', 'dfl-mask-name', queries[r]),
        ...[...row].map((cell, i) => h('span', `dfl-cell${cell === '1' ? ' seen' : ''}${i >= split ? ' block' : ''}${i === split ? ' split' : ''}`)));
      line.addEventListener('pointerenter', () => setText(this.note, this.sentence(row, split, queries[r])));
      return line;
    });
    this.figure.style.setProperty('--columns', keys.length);
    this.figure.replaceChildren(head, ...body);
    this.figure.setAttribute('role', 'img');
    this.figure.setAttribute('aria-label', `${KINDS[kind].name}. ${KINDS[kind].words}`);
  }

  sentence(row, split, name) {
    const seen = part => [...part].filter(cell => cell === '1').length;
    return `‘${name}’ sees ${seen(row.slice(0, split))} of ${split} context tokens and ${seen(row.slice(split))} of ${row.length - split} slots.`;
  }

  labels(kind) {
    const picture = this.pictures[kind];
    if (kind === 'training') {
      const slots = picture.anchors.flatMap((anchor, b) => Array.from({ length: picture.block }, (_, i) => (i ? '▒' : `a${b + 1}`)));
      return { keys: [...Array.from({ length: picture.context }, (_, i) => String(i + 1)), ...slots], queries: slots };
    }
    const guesses = this.step.pieces.drafted.slice(0, picture.slots - 1).map(label);
    const rest = kind === 'draft' ? guesses.map(() => '▒') : guesses;
    const slots = [label(this.step.pieces.anchor), ...rest];
    return { keys: [...this.before.slice(-picture.context).map(label), ...slots], queries: slots };
  }
}
