window.dflashApp = {
  boot, turnTo, saveTurn, keep, removeChat, traceOf, importChat, exportChat, afterNew,
  setFooters, setStatus, setNote, download, toggleScheme, focusComposer, closeSidebarWhenNarrow,
};
if (document.readyState === 'loading') document.addEventListener('DOMContentLoaded', startPage);
else startPage();
