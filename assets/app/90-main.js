// One after the other, so that a question being kept never lands after its reply. Gradio drops what a listener's
// script throws: the console says it first.
let turn = Promise.resolve();
const inTurn = act => (...given) => {
  const result = turn.then(() => act(...given));
  turn = result.catch(error => console.error(`${act.name}:`, error));
  return result;
};

const kept = {boot, turnTo, saveTurn, keep, removeChat, traceOf, importChat, exportChat};
window.dflashApp = {
  ...Object.fromEntries(Object.entries(kept).map(([name, act]) => [name, inTurn(act)])),
  afterNew, setFooters, setStatus, setNote, download, toggleScheme, focusComposer, closeSidebarWhenNarrow,
};
if (document.readyState === 'loading') document.addEventListener('DOMContentLoaded', startPage);
else startPage();
