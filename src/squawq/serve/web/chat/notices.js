// What the page says: short notices, which may be undone, and words for screen readers.

import { byId, element } from "./dom.js";

const SHOWN_MS = 8000;
const toasts = byId("toasts");
const announcer = byId("announcer");

/**
 * Shows a notice for some seconds; longer while the pointer or the focus is on it.
 *
 * @param {string} text
 * @param {() => void} [undo]
 */
export function notify(text, undo) {
  const toast = element("div", { class: "toast" }, element("span", { role: "status", text }));
  const close = () => toast.remove();
  if (undo) {
    toast.append(
      element("button", {
        type: "button",
        class: "button",
        text: "Undo",
        onclick: () => {
          close();
          undo();
        },
      }),
    );
  }
  let timer = setTimeout(close, SHOWN_MS);
  const hold = () => clearTimeout(timer);
  const release = () => {
    hold();
    timer = setTimeout(close, SHOWN_MS);
  };
  for (const name of ["pointerenter", "focusin"]) toast.addEventListener(name, hold);
  for (const name of ["pointerleave", "focusout"]) toast.addEventListener(name, release);
  while (toasts.children.length > 2) toasts.firstElementChild?.remove();
  toasts.append(toast);
}

/** Has screen readers say a text. @param {string} text */
export function announce(text) {
  announcer.textContent = text;
}
