// The scrapes of the last ten minutes, and rates between them.

import { value } from "./prometheus.js";

/** @typedef {import("./prometheus.js").Samples} Samples */
/** @typedef {{time: number, samples: Samples}} Scrape time: milliseconds since the epoch. */

export const WINDOW = 600; // seconds
const START = "process_start_time_seconds";
const COUNTER = "vllm:generation_tokens_total";
const SMOOTH = 10; // seconds, over which a rate is measured
const GAP = 15; // seconds without a scrape that a chart shows as a gap

export class History {
  /** @type {Scrape[]} */
  scrapes = [];

  /** @param {Scrape} scrape @returns {boolean} Whether the server has restarted: the history begins anew. */
  add(scrape) {
    const anew = this.newest !== undefined && restarted(this.newest.samples, scrape.samples);
    if (anew) this.scrapes = [];
    this.scrapes.push(scrape);
    while (scrape.time - this.scrapes[0].time > WINDOW * 1000) this.scrapes.shift();
    return anew;
  }

  get newest() {
    return this.scrapes.at(-1);
  }

  get oldest() {
    return this.scrapes[0];
  }

  /**
   * @param {string} name A counter.
   * @returns {number | undefined} Its growth per second, over the last seconds.
   */
  rateNow(name) {
    return this.#rate(name, this.scrapes.length - 1);
  }

  /**
   * @param {string} name A counter.
   * @returns {number | undefined} Its growth in the window.
   */
  growth(name) {
    if (!this.newest || this.scrapes.length < 2) return undefined;
    return difference(name, this.oldest, this.newest);
  }

  /**
   * @param {string} name
   * @param {boolean} counter Whether the points are growth per second; else values.
   * @returns {[number, number | undefined][]} Times and numbers; undefined where scrapes are missing.
   */
  points(name, counter) {
    return this.scrapes.flatMap((scrape, index) => {
      const point = counter ? this.#rate(name, index) : value(scrape.samples, name);
      const gap = this.#gapBefore(index);
      return /** @type {[number, number | undefined][]} */ ([
        ...(gap ? [[scrape.time, undefined]] : []),
        ...(point === undefined ? [] : [[scrape.time, point]]),
      ]);
    });
  }

  /** @param {number} index Of a scrape. */
  #gapBefore(index) {
    return index > 0 && this.scrapes[index].time - this.scrapes[index - 1].time > GAP * 1000;
  }

  /**
   * @param {string} name A counter.
   * @param {number} index Of the scrape that ends the seconds over which the rate is measured.
   */
  #rate(name, index) {
    const until = this.scrapes[index];
    let first = index;
    while (first > 0 && until.time - this.scrapes[first].time < SMOOTH * 1000 && !this.#gapBefore(first)) first--;
    const grown = difference(name, this.scrapes[first], until);
    return grown === undefined || first === index ? undefined : (grown * 1000) / (until.time - this.scrapes[first].time);
  }
}

/**
 * @param {string} name
 * @param {Scrape} since
 * @param {Scrape} until
 */
function difference(name, since, until) {
  const [before, after] = [value(since.samples, name), value(until.samples, name)];
  return before === undefined || after === undefined ? undefined : after - before;
}

/**
 * @param {Samples} before
 * @param {Samples} after
 */
function restarted(before, after) {
  return value(before, START) !== value(after, START) || (value(after, COUNTER) ?? 0) < (value(before, COUNTER) ?? 0);
}
