// Dialogs that only show or choose: the list of keys, and what to export.

import { element } from "./dom.js";

const KEYS = [
  ["Enter", "Send the message"],
  ["Shift+Enter", "Start a new line"],
  ["Esc", "Stop the answer"],
  ["↑", "Edit your last message (in an empty field)"],
  ["Ctrl+Shift+O", "New chat"],
  ["Ctrl+K", "Search conversations"],
  ["Ctrl+/", "Show these keys"],
  ["← →", "Move through an answer's tokens"],
];

/**
 * @param {string} id
 * @param {string} title
 * @param {...Node} children
 */
function show(id, title, ...children) {
  const dialog = element(
    "dialog",
    { id, "aria-labelledby": `${id}-title`, onclose: () => dialog.remove() },
    element("h2", { id: `${id}-title`, text: title }),
    ...children,
    element(
      "div",
      { class: "dialog-buttons" },
      element("button", { type: "button", class: "button", text: "Close", onclick: () => dialog.close() }),
    ),
  );
  dialog.addEventListener("click", (/** @type {Event} */ event) => event.target === dialog && dialog.close());
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}

/** Shows the list of keys. */
export function showKeys() {
  const rows = KEYS.map(([keys, what]) => element("div", {}, element("dt", {}, element("kbd", { text: keys })), element("dd", { text: what })));
  show("keys-dialog", "Keys", element("dl", { class: "keys" }, ...rows));
}

/** @param {[string, () => void][]} choices Labels, and what each does. */
export function showExport(choices) {
  const buttons = choices.map(([label, action]) =>
    element("button", {
      type: "button",
      class: "button",
      text: label,
      onclick: () => {
        dialog.close();
        action();
      },
    }),
  );
  const dialog = show("export-dialog", "Export", element("div", { class: "choices" }, ...buttons));
}
