// The tokens of an answer, tinted by probability; the likeliest alternatives in a box, by pointer or arrow keys.

import { element } from "./dom.js";

/** @typedef {import("./conversation.js").ScoredToken} ScoredToken */

const LEVELS = [0.9, 0.6, 0.3, 0.1]; // a token below the last one has the strongest tint

/**
 * @param {any} logprobs Of a chunk of the answer, in OpenAI's form.
 * @returns {ScoredToken[]}
 */
export function scoredTokens(logprobs) {
  return (logprobs?.content ?? []).map((/** @type {any} */ one) => [
    one.token,
    short(one.logprob),
    (one.top_logprobs ?? []).map((/** @type {any} */ top) => [top.token, short(top.logprob)]),
  ]);
}

/** Tokens in an element. */
export class TokenView {
  /** @param {HTMLElement} container */
  constructor(container) {
    this.container = container;
    this.shown = 0;
    this.list = element("div", { class: "tokens", role: "listbox", "aria-label": "Tokens; arrow keys move" });
    /** @type {ScoredToken[]} */
    this.tokens = [];
    this.list.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => this.move(event));
    for (const name of ["focusin", "pointerover"]) {
      this.list.addEventListener(name, (/** @type {Event} */ event) => this.explain(event.target));
    }
    for (const name of ["focusout", "pointerleave"]) this.list.addEventListener(name, () => hideBox());
    container.replaceChildren(this.list);
  }

  /** Shows the tokens; those that are shown already stay. @param {ScoredToken[]} tokens */
  show(tokens) {
    this.tokens = tokens;
    for (const [text, logprob] of tokens.slice(this.shown)) {
      const token = element("span", { class: `token ${level(logprob)}`, role: "option", tabindex: "-1", text });
      token.setAttribute("aria-label", `${visible(text)}, ${percent(logprob)}`);
      this.list.append(token);
    }
    this.shown = tokens.length;
    this.list.firstElementChild?.setAttribute("tabindex", "0");
  }

  /** @param {KeyboardEvent} event */
  move(event) {
    const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
    const step = steps[/** @type {keyof steps} */ (event.key)];
    const all = this.list.children;
    const at = Array.prototype.indexOf.call(all, document.activeElement);
    const next = event.key === "Home" ? 0 : event.key === "End" ? all.length - 1 : step ? at + step : -1;
    if (event.key === "Escape") hideBox();
    if (next < 0 || next >= all.length) return;
    event.preventDefault();
    all[at]?.setAttribute("tabindex", "-1");
    all[next].setAttribute("tabindex", "0");
    all[next].focus();
  }

  /** @param {EventTarget | null} target */
  explain(target) {
    const at = Array.prototype.indexOf.call(this.list.children, target);
    if (at >= 0) showBox(/** @type {HTMLElement} */ (target), this.tokens[at]);
  }
}

/** @param {HTMLElement} token @param {ScoredToken} scored */
function showBox(token, [text, logprob, top]) {
  const box = document.getElementById("token-box") ?? element("div", { id: "token-box", class: "token-box", role: "tooltip" });
  const row = (/** @type {string} */ name, /** @type {number} */ value, /** @type {boolean} */ chosen) => {
    const bar = element("span", { class: "bar" }, element("span"));
    bar.firstElementChild.style.width = `${Math.exp(value) * 100}%`; // by script: the policy forbids the attribute alone
    return element(
      "tr",
      { class: chosen ? "chosen" : null },
      element("th", { scope: "row" }, element("code", { text: visible(name) })),
      element("td", {}, bar),
      element("td", { text: percent(value) }),
    );
  };
  const rows = top.map(([name, value]) => row(name, value, name === text));
  if (!top.some(([name]) => name === text)) rows.push(row(text, logprob, true));
  box.replaceChildren(element("table", {}, element("tbody", {}, ...rows)));
  document.body.append(box);
  token.setAttribute("aria-describedby", "token-box");
  const place = token.getBoundingClientRect();
  const left = Math.max(8, Math.min(place.left, innerWidth - box.offsetWidth - 8));
  const below = place.bottom + 6 + box.offsetHeight < innerHeight;
  box.style.left = `${left}px`;
  box.style.top = `${below ? place.bottom + 6 : Math.max(8, place.top - box.offsetHeight - 6)}px`;
}

/** Removes the box of alternatives. */
export function hideBox() {
  document.getElementById("token-box")?.remove();
}

/** @param {number} logprob */
function level(logprob) {
  const at = LEVELS.findIndex((least) => Math.exp(logprob) >= least);
  return `level-${at < 0 ? LEVELS.length : at}`;
}

/** @param {number} logprob */
function percent(logprob) {
  const share = Math.exp(logprob) * 100;
  return share >= 0.1 ? `${share.toFixed(1)} %` : "< 0.1 %";
}

/** A token with its spaces and line breaks visible. @param {string} text */
function visible(text) {
  return text.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "(empty)";
}

/** @param {number} value */
function short(value) {
  return Math.round(value * 1e4) / 1e4;
}
