// The field in which the user writes, with its buttons.

import { byId, element, icon } from "./dom.js";

const form = byId("composer");
const input = byId("input");
const send = byId("send");
const stop = byId("stop");
const problem = byId("composer-problem");
send.append(icon("send"));
stop.append(icon("stop"));

/** The field. */
export class Composer {
  /**
   * @param {{send: (text: string) => boolean, stop: () => void, editLast: () => void}} actions `send` tells whether the
   *   text was taken.
   */
  constructor(actions) {
    this.actions = actions;
    this.running = false;
    form.addEventListener("submit", (/** @type {Event} */ event) => {
      event.preventDefault();
      this.submit();
    });
    stop.addEventListener("click", actions.stop);
    input.addEventListener("input", () => this.changed());
    input.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.submit();
      } else if (event.key === "ArrowUp" && !input.value) {
        event.preventDefault();
        actions.editLast();
      }
    });
    this.changed(); // the browser may have kept a text
  }

  submit() {
    const text = input.value;
    if (!text.trim() || this.running || !this.actions.send(text)) return;
    this.write("");
  }

  /** @param {string} text */
  write(text) {
    input.value = text;
    this.changed();
    input.focus();
  }

  changed() {
    send.disabled = !input.value.trim();
    input.style.height = "auto";
    input.style.height = `${Math.min(input.scrollHeight, innerHeight * 0.4)}px`;
    this.complain("");
  }

  /** @param {boolean} running Whether an answer is being made: then there is a button that stops it. */
  show(running) {
    const focused = document.activeElement === stop;
    this.running = running;
    send.hidden = running;
    stop.hidden = !running;
    if (focused && !running) input.focus();
  }

  /** @param {string} text What hinders sending. @param {() => void} [mend] Opens what mends it. */
  complain(text, mend) {
    problem.replaceChildren(text);
    if (mend) problem.append(" ", element("button", { type: "button", class: "button", text: "Open settings", onclick: mend }));
  }

  focus() {
    input.focus();
  }
}
