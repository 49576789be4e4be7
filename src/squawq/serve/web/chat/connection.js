// Whether the server answers: its models, and a banner with a retry while it does not.

import { listModels } from "./api.js";
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
      this.lost(error instanceof Error ? error.message : String(error));
    }
  }

  /** Says that the server is not reached, and asks again later. @param {string} why */
  lost(why) {
    clearTimeout(this.timer);
    const again = element("button", { type: "button", class: "button", text: "Try now", onclick: () => this.check() });
    banner.replaceChildren(element("span", { text: `${why} Trying again every few seconds.` }), again);
    banner.hidden = false;
    this.timer = setTimeout(() => this.check(), this.wait * 1000);
    this.wait = Math.min(this.wait * 2, LONGEST_WAIT_S);
  }
}
