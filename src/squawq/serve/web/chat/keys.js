// Keys that work anywhere on the page. dialogs.js has the list that users see.

/**
 * @param {{stop: () => boolean, newChat: () => void, search: () => void, help: () => void}} actions `stop` tells whether
 *   there was something to stop.
 */
export function listenToKeys({ stop, newChat, search, help }) {
  document.addEventListener("keydown", (event) => {
    if (document.querySelector("dialog[open]")) return;
    const command = event.ctrlKey || event.metaKey;
    const key = event.key.toLowerCase();
    if (key === "escape") {
      if (!stop()) return;
    } else if (command && event.shiftKey && key === "o") newChat();
    else if (command && key === "k") search();
    else if (command && key === "/") help();
    else return;
    event.preventDefault();
  });
}
