// Gradio drops what a listener's script throws: say it in the console first.
const heard = act => async (...given) => {
  try {
    return await act(...given);
  } catch (error) {
    console.error(`${act.name}:`, error);
    throw error;
  }
};

const kept = {boot, turnTo, saveTurn, keep, removeChat, traceOf, importChat, exportChat};
window.dflashApp = {
  ...Object.fromEntries(Object.entries(kept).map(([name, act]) => [name, heard(act)])),
  afterNew, setFooters, setStatus, setNote, download, toggleScheme, focusComposer, closeSidebarWhenNarrow,
};
if (document.readyState === 'loading') document.addEventListener('DOMContentLoaded', startPage);
else startPage();
