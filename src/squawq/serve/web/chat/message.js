// One message of the thread: its text, its reasoning, figures and buttons.

import { copyButton, element, icon, iconButton } from "./dom.js";
import { MarkdownView } from "./markdown.js";
import { splitReasoning } from "./reasoning.js";
import { TokenView } from "./tokens.js";

/**
 * @typedef {import("./conversation.js").Message} Message
 * @typedef {{
 *   regenerate: () => void, proceed: () => void, remove: () => void, change: (text: string, send: boolean) => boolean
 * }} Actions `change`: the user edited the message, and sends it again (`send`); it tells whether that was taken.
 */

/** A message on the page. */
export class MessageView {
  /** @param {Message} message @param {Actions} actions */
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.answers = message.role === "assistant";
    /** @type {Map<string, unknown[]>} */
    this.drawn = new Map();
    this.text = element("div", { class: "text" });
    this.foot = element("div", { class: "message-foot" });
    this.element = element(
      "article",
      { class: `message ${message.role}`, "aria-label": this.answers ? "Answer" : "Your message" },
      this.answers ? this.makeThought() : null,
      this.text,
      this.foot,
    );
  }

  makeThought() {
    this.thoughtLabel = element("span");
    this.thoughtText = element("div", { class: "thought-text" });
    this.thought = element("details", { class: "thought", hidden: true }, element("summary", {}, this.thoughtLabel), this.thoughtText);
    this.thoughtMarkdown = new MarkdownView(this.thoughtText);
    this.thought.addEventListener("toggle", () => this.showThought(splitReasoning(this.message).thought));
    return this.thought;
  }

  /**
   * Draws the message as it is now.
   *
   * @param {{running: boolean, last: boolean, probabilities: boolean}} state Whether the answer is being made, the message
   *   is the last one, and tokens are shown with their probabilities.
   */
  draw({ running, last, probabilities }) {
    if (this.editor) return;
    const { message } = this;
    this.element.classList.toggle("last", last);
    this.element.setAttribute("aria-busy", String(running));
    if (this.isNew("text", running, probabilities, message.content, message.reasoning)) this.drawText(running, probabilities);
    if (this.isNew("foot", running, last, message.error, message.usage)) this.drawFoot(running, last);
  }

  /** @param {string} part @param {...unknown} state What the part shows. @returns {boolean} Whether it was not drawn so. */
  isNew(part, ...state) {
    const before = this.drawn.get(part);
    this.drawn.set(part, state);
    return !before || state.some((value, at) => value !== before[at]);
  }

  /** @param {boolean} running @param {boolean} probabilities */
  drawText(running, probabilities) {
    const { message } = this;
    if (!this.answers) {
      this.text.textContent = message.content;
      return;
    }
    const parts = splitReasoning(message);
    this.drawThought(parts, running);
    this.drawAnswer(parts.answer, running, probabilities && Boolean(message.tokens?.length));
    this.element.classList.toggle("waiting", running && !message.content && !message.reasoning);
  }

  /** @param {string} answer @param {boolean} running @param {boolean} scored Whether to show tokens. */
  drawAnswer(answer, running, scored) {
    if (scored) {
      this.markdown = null;
      if (!this.tokens || (this.tokens.shown > (this.message.tokens?.length ?? 0))) this.tokens = new TokenView(this.text);
      this.tokens.show(this.message.tokens ?? []);
    } else {
      if (!this.markdown) this.text.replaceChildren();
      this.markdown ??= new MarkdownView(this.text);
      this.tokens = null;
      this.markdown.show(answer, running);
    }
  }

  /** @param {{thought: string, thinking: boolean}} parts @param {boolean} running */
  drawThought({ thought, thinking }, running) {
    this.thought.hidden = !thought;
    if (!thought) return;
    const seconds = this.message.thoughtSeconds;
    const ended = seconds === undefined ? "Thought" : `Thought for ${duration(seconds)}`;
    this.thoughtLabel.textContent = thinking && running ? "Thinking…" : ended;
    this.showThought(thought);
  }

  /** Makes the reasoning's text where it is unfolded. @param {string} thought */
  showThought(thought) {
    if (this.thought.open) this.thoughtMarkdown?.show(thought);
  }

  /** @param {boolean} running @param {boolean} last */
  drawFoot(running, last) {
    const { message, actions } = this;
    this.foot.replaceChildren();
    if (running) return;
    if (message.error) {
      const again = element("button", { type: "button", class: "button", onclick: actions.regenerate }, icon("refresh"), "Try again");
      this.foot.append(element("div", { class: "note problem failure" }, element("span", { text: message.error }), again));
    }
    const note = this.answers ? figures(message) : "";
    const buttons = element("div", { class: "message-buttons" }, copyButton("Copy message", () => this.plainText()));
    if (this.answers) buttons.append(iconButton("refresh", "Answer again", actions.regenerate));
    if (this.answers && last && message.content) buttons.append(iconButton("forward", "Continue this answer", actions.proceed));
    buttons.append(iconButton("edit", "Edit message", () => this.edit()), iconButton("trash", "Delete message", actions.remove));
    this.foot.append(element("div", { class: "message-line" }, element("span", { class: "figures", text: note }), buttons));
  }

  plainText() {
    return this.answers ? splitReasoning(this.message).answer : this.message.content;
  }

  /** Lets the user edit the message in its place. */
  edit() {
    if (this.editor) return this.editor.querySelector("textarea").focus();
    const area = element("textarea", { class: "input", "aria-label": "Edit message", rows: "3" });
    area.value = this.message.content;
    const end = () => {
      this.editor.remove();
      this.editor = null;
      this.text.hidden = this.foot.hidden = false;
      this.element.querySelector("[aria-label='Edit message']")?.focus();
    };
    const save = () => {
      const text = area.value;
      if (text.trim() && this.actions.change(text, !this.answers)) end();
    };
    area.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      if (event.key === "Escape") end();
      else if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !this.answers) save();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    this.editor = element(
      "div",
      { class: "editor" },
      area,
      element(
        "div",
        { class: "dialog-buttons" },
        element("button", { type: "button", class: "button", text: "Cancel", onclick: end }),
        element("button", { type: "button", class: "button primary", text: this.answers ? "Save" : "Send", onclick: save }),
      ),
    );
    this.text.hidden = this.foot.hidden = true;
    this.text.after(this.editor);
    area.style.height = `${Math.min(area.scrollHeight + 4, innerHeight / 2)}px`;
    area.focus();
  }
}

/** @param {Message} message @returns {string} The answer's length and speed, and why it ended. */
function figures({ usage, finish, error }) {
  const parts = [];
  if (usage) {
    parts.push(`${count(usage.completion)}\u00a0${usage.completion === 1 ? "token" : "tokens"}`);
    const seconds = usage.seconds - usage.firstToken;
    if (usage.completion > 1 && seconds > 0) parts.push(`${((usage.completion - 1) / seconds).toFixed(1)}\u00a0tokens/s`);
    parts.push(`first token after ${usage.firstToken.toFixed(2)}\u00a0s`);
  }
  if (finish === "length") parts.push("ended at the limit of tokens");
  if (finish === "stopped" && !error) parts.push("stopped");
  return parts.join(" · ");
}

/** @param {number} seconds */
function duration(seconds) {
  if (seconds < 0.1) return "less than 0.1 s";
  return `${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s`;
}

/** @param {number} value */
export function count(value) {
  return value.toLocaleString("en");
}
