// Dialogs that only show or choose: the keyboard shortcuts, and what to export.

import { element } from "./dom.js";
import { notify } from "./notices.js";
import { download, exportJson, exportMarkdown, fileName } from "./transfer.js";

/** @typedef {import("./conversation.js").Conversation} Conversation */

const KEYS = [
  ["Enter", "Send the message"],
  ["Shift+Enter", "Start a new line"],
  ["Esc", "Stop the answer"],
  ["↑", "Edit your last message (in an empty field)"],
  ["Ctrl+Shift+O", "New chat"],
  ["Ctrl+K", "Search conversations"],
  ["Ctrl+/", "Show these shortcuts"],
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

/** Shows the keyboard shortcuts. */
export function showKeys() {
  const rows = KEYS.map(([keys, what]) => element("div", {}, element("dt", {}, element("kbd", { text: keys })), element("dd", { text: what })));
  show("keys-dialog", "Keyboard shortcuts", element("dl", { class: "keys" }, ...rows));
}

/**
 * Shows what can be exported.
 *
 * @param {Conversation} current
 * @param {Conversation[]} all
 */
export function showExport(current, all) {
  const name = fileName(current.title);
  /** @type {[string, () => void][]} */
  const choices = [];
  if (current.messages.length) {
    choices.push(["This conversation as JSON", () => download(`${name}.json`, exportJson([current]), "application/json")]);
    choices.push(["This conversation as Markdown", () => download(`${name}.md`, exportMarkdown(current), "text/markdown")]);
  }
  if (all.length) {
    choices.push(["All conversations as JSON", () => download("conversations.json", exportJson(all), "application/json")]);
  }
  if (!choices.length) {
    notify("There is no conversation to export yet.");
    return;
  }
  const buttons = choices.map(([text, action]) => {
    const onclick = () => {
      dialog.close();
      action();
    };
    return element("button", { type: "button", class: "button", text, onclick });
  });
  const dialog = show("export-dialog", "Export", element("div", { class: "choices" }, ...buttons));
}
