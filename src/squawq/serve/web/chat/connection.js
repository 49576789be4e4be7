// Whether the server answers: its models, and a banner with a retry while it does not, or lacks a key.

import { listModels, ServerError } from "./api.js";
import { byId, element } from "./dom.js";

const FIRST_WAIT_S = 2;
const LONGEST_WAIT_S = 30;
const banner = byId("banner");

/** Asks for the models, again and again while the server does not answer. */
export class Connection {
  /** @param {(models: import("./api.js").Model[]) => void} onmodels Called each time the server has told its models. */
  constructor(onmodels) {
    this.onmodels = onmodels;
    this.wait = FIRST_WAIT_S;
    /** @type {ReturnType<typeof setTimeout> | undefined} */
    this.timer = undefined;
  }

  /** Asks now. */
  async check() {
    clearTimeout(this.timer);
    try {
      this.onmodels(await listModels());
      this.wait = FIRST_WAIT_S;
      banner.hidden = true;
    } catch (error) {
      if (error instanceof ServerError && error.keyless) this.refused();
      else this.lost(error instanceof Error ? error.message : String(error));
    }
  }

  /** Takes note that the server has answered a chat. */
  reached() {
    if (!banner.hidden) this.check();
  }

  /** Says that the server is not reached, and asks again later. @param {string} why */
  lost(why) {
    clearTimeout(this.timer);
    this.say(`${why} Trying again every few seconds.`, "Try now");
    this.timer = setTimeout(() => this.check(), this.wait * 1000);
    this.wait = Math.min(this.wait * 2, LONGEST_WAIT_S);
  }

  /** Says that the server needs a key, and asks again when the user wants to enter one. */
  refused() {
    clearTimeout(this.timer);
    this.say("The server needs an API key.", "Enter key");
  }

  /** @param {string} text @param {string} label Of the button that asks now. */
  say(text, label) {
    const button = element("button", { type: "button", class: "button", text: label, onclick: () => this.check() });
    banner.replaceChildren(element("span", { text }), button);
    banner.hidden = false;
  }
}
