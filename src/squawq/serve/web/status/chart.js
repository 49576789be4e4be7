// Line charts of the last minutes in SVG. The caption and the table below a chart say the same as text.

import { perSecond } from "./format.js";
import { WINDOW } from "./history.js";

/** @typedef {{name: string, points: [number, number | undefined][]}} Line */

const [WIDTH, HEIGHT] = [600, 120]; // of the view box, which is stretched to the space there is
const SPANS = [1, 2, 5, WINDOW / 60]; // minutes that a chart may show

/**
 * Draws the lines into a figure of status.html.
 *
 * @param {HTMLElement} figure With an svg, a figcaption .summary, .top and .middle of the axis, and a table.
 * @param {Line[]} lines
 * @param {number} now Milliseconds since the epoch: the right edge.
 */
export function draw(figure, lines, now) {
  const first = Math.min(...lines.flatMap(({ points }) => points.map(([time]) => time)), now);
  const minutes = SPANS.find((span) => now - first <= span * 60_000) ?? SPANS.at(-1);
  const top = ceiling(Math.max(...lines.flatMap(({ points }) => points.map(([, value]) => value ?? 0)), 0));
  const svg = /** @type {SVGElement} */ (figure.querySelector("svg"));
  svg.replaceChildren(...lines.map((line, index) => path(line, index, top, { now, minutes })));
  const summary = lines.map(summarize).join(" ");
  svg.setAttribute("aria-label", `${figure.dataset.title}. ${summary}`);
  set(figure, ".summary", summary);
  set(figure, ".top", perSecond(top));
  set(figure, ".middle", perSecond(top / 2));
  set(figure, ".left", `${minutes} min ago`);
  if (figure.querySelector("details").open) fill(figure.querySelector("tbody"), lines, { now, minutes });
}

/**
 * @param {Line} line
 * @param {number} index
 * @param {number} top
 * @param {{now: number, minutes: number}} span The right edge, and how far the left one is from it.
 */
function path({ points }, index, top, { now, minutes }) {
  let pen = "M";
  let data = "";
  for (const [time, value] of points) {
    if (value === undefined) {
      pen = "M";
      continue;
    }
    const x = WIDTH * (1 - (now - time) / (minutes * 60_000));
    data += `${pen}${x.toFixed(1)} ${(HEIGHT * (1 - value / top)).toFixed(1)}`;
    pen = "L";
  }
  const found = document.createElementNS("http://www.w3.org/2000/svg", "path");
  found.setAttribute("d", data);
  found.setAttribute("class", `line line-${index}`);
  return found;
}

/** @param {Line} line */
function summarize({ name, points }) {
  const values = points.flatMap(([, value]) => value ?? []);
  if (!values.length) return `${name}: no figures yet.`;
  const mean = values.reduce((sum, value) => sum + value) / values.length;
  const [last, most] = [values.at(-1), Math.max(...values)].map(perSecond);
  return `${name}: ${last} now, ${perSecond(mean)} on average, ${most} at most.`;
}

/**
 * One row per minute, with the mean of each line.
 *
 * @param {HTMLElement} body
 * @param {Line[]} lines
 * @param {{now: number, minutes: number}} span
 */
function fill(body, lines, { now, minutes }) {
  const rows = Array.from({ length: minutes }, (_, minute) => {
    const inside = (time) => Math.floor((now - time) / 60_000) === minute;
    const means = lines.map(({ points }) => {
      const values = points.flatMap(([time, value]) => (inside(time) ? (value ?? []) : []));
      return values.length ? values.reduce((sum, value) => sum + value) / values.length : undefined;
    });
    return [minute ? `${minute} to ${minute + 1} min ago` : "last minute", ...means.map(perSecond)];
  });
  body.replaceChildren(...rows.map(row));
}

/** @param {string[]} cells The first is the row's heading. */
function row(cells) {
  const found = document.createElement("tr");
  for (const [index, text] of cells.entries()) {
    const cell = document.createElement(index ? "td" : "th");
    if (!index) cell.setAttribute("scope", "row");
    cell.textContent = text;
    found.append(cell);
  }
  return found;
}

/** The next of 1, 2, 5, 10, 20, ... that is not below a value: the axis' top. */
function ceiling(value) {
  if (value <= 1) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value);
}

/**
 * @param {HTMLElement} figure
 * @param {string} selector
 * @param {string} text
 */
function set(figure, selector, text) {
  figure.querySelector(selector).textContent = text;
}
