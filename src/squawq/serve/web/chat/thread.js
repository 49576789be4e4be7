// The messages of a conversation on the page. It draws at most once a frame, and follows the end unless the reader has
// scrolled up.

import { byId, element } from "./dom.js";
import { MessageView } from "./message.js";
import { hideBox } from "./tokens.js";

/**
 * @typedef {import("./conversation.js").Message} Message
 * @typedef {import("./message.js").Actions} Actions
 */

const NEAR = 48; // pixels from the end that count as the end
const REST = 4; // after a drawing, the page rests so many times as long as it took

const thread = byId("thread");
const list = byId("messages");
const toEnd = byId("to-end");

/** The list of messages. */
export class Thread {
  /** @param {(message: Message) => Actions} actions */
  constructor(actions) {
    this.actions = actions;
    /** @type {MessageView[]} */
    this.views = [];
    /** @type {Message | null} */
    this.running = null;
    this.probabilities = false;
    this.following = true;
    this.stale = this.scheduled = false;
    thread.addEventListener("scroll", () => this.scrolled());
    toEnd.addEventListener("click", () => this.follow());
  }

  /**
   * Shows these messages; those that are on the page already stay.
   *
   * @param {Message[]} messages
   * @param {Message | null} running The one that is being made.
   * @param {Node} empty What stands there without messages.
   */
  show(messages, running, empty) {
    this.running = running;
    const known = new Map(this.views.map((view) => [view.message, view]));
    this.views = messages.map((message) => known.get(message) ?? new MessageView(message, this.actions(message)));
    place(messages.length ? this.views.map((view) => view.element) : [empty]);
    for (const view of this.views) this.draw(view);
    this.keepEnd();
  }

  /** Shows all anew. */
  clear() {
    this.views = [];
    this.following = true;
    hideBox();
  }

  /** The message that is being made has changed. */
  changed() {
    this.stale = true;
    if (!this.scheduled) this.schedule();
  }

  schedule() {
    this.scheduled = true;
    requestAnimationFrame(() => {
      const began = performance.now();
      this.stale = false;
      const view = this.views.find(({ message }) => message === this.running);
      if (view) this.draw(view);
      this.keepEnd();
      setTimeout(() => {
        this.scheduled = false;
        if (this.stale) this.schedule();
      }, REST * (performance.now() - began));
    });
  }

  /** @param {Message} message @returns {MessageView | undefined} */
  view(message) {
    return this.views.find((view) => view.message === message);
  }

  /** @param {MessageView} view */
  draw(view) {
    const last = view === this.views.at(-1);
    view.draw({ running: view.message === this.running, last, probabilities: this.probabilities });
  }

  /** Scrolls to the end and stays there. */
  follow() {
    this.following = true;
    this.keepEnd();
  }

  keepEnd() {
    if (this.following) thread.scrollTop = thread.scrollHeight;
    else toEnd.hidden = this.fromEnd() <= NEAR;
    if (this.following) toEnd.hidden = true;
  }

  scrolled() {
    this.following = this.fromEnd() <= NEAR;
    toEnd.hidden = this.following;
    hideBox();
  }

  fromEnd() {
    return thread.scrollHeight - thread.scrollTop - thread.clientHeight;
  }
}

/** Puts these nodes into the list; those that are there stay where they are, with focus and selection. @param {Node[]} nodes */
function place(nodes) {
  for (const child of [...list.childNodes]) if (!nodes.includes(child)) child.remove();
  nodes.forEach((node, at) => {
    if (list.childNodes[at] !== node) list.insertBefore(node, list.childNodes[at] ?? null);
  });
}

/**
 * What stands in an empty conversation.
 *
 * @param {string} model
 * @param {(text: string) => void} onpick
 */
export function welcome(model, onpick) {
  const ideas = [
    "Explain quantization in two sentences.",
    "Write a Python function that reverses a list.",
    "Tell me a short story.",
  ];
  return element(
    "div",
    { class: "welcome" },
    element("img", { src: "/web/favicon.svg", alt: "", width: "56", height: "56" }),
    element("h1", { text: model ? `Chat with ${model}` : "Chat" }),
    element("p", { text: "Conversations stay in this browser. Messages go to this server alone." }),
    element("div", { class: "ideas" }, ...ideas.map((text) => element("button", { type: "button", class: "button", text, onclick: () => onpick(text) }))),
  );
}
