// The sampling settings: their ranges, and what is sent of them. An empty one is the model's default.

/**
 * @typedef {{
 *   name: string, label: string, least?: number, above?: number, most?: number, whole?: boolean, text?: boolean,
 *   otherwise: string, hint: string
 * }} Field `above`: the value is greater than this; `otherwise`: what happens without a value.
 */

/** @type {Field[]} */
export const FIELDS = [
  { name: "temperature", label: "Temperature", least: 0, most: 2, otherwise: "1", hint: "0 takes the most likely token each time" },
  { name: "top_p", label: "Top p", above: 0, most: 1, otherwise: "1", hint: "Sample from the most likely tokens with this total probability" },
  { name: "top_k", label: "Top k", least: 0, most: 2 ** 31 - 1, whole: true, otherwise: "0", hint: "Sample from the k most likely tokens; 0: all" },
  { name: "min_p", label: "Min p", least: 0, most: 1, otherwise: "0", hint: "Least probability, relative to the most likely token's" },
  { name: "repetition_penalty", label: "Repetition penalty", above: 0, most: 100, otherwise: "1", hint: "Above 1: less repetition of prompt and answer" },
  { name: "presence_penalty", label: "Presence penalty", least: -2, most: 2, otherwise: "0", hint: "Above 0: less repetition of tokens in the answer" },
  { name: "frequency_penalty", label: "Frequency penalty", least: -2, most: 2, otherwise: "0", hint: "The same, in proportion to how often a token occurred" },
  { name: "max_tokens", label: "Max tokens", least: 1, most: 2 ** 31 - 1, whole: true, otherwise: "all that fit", hint: "The longest answer, in tokens" },
  { name: "seed", label: "Seed", least: 0, most: Number.MAX_SAFE_INTEGER, whole: true, otherwise: "random", hint: "The same seed gives the same answer" },
  { name: "stop", label: "Stop strings", text: true, otherwise: "none", hint: "One a line; \\n is a line break" },
];

/**
 * @param {Field} field
 * @param {string} text What the user wrote.
 * @returns {string} What is wrong with it; empty if nothing.
 */
export function problem(field, text) {
  if (field.text || !text.trim()) return "";
  const value = Number(text);
  const from = field.above === undefined ? `from ${field.least}` : `greater than ${field.above}`;
  const range = field.most === undefined || field.most >= 2 ** 31 - 1 ? from : `${from}, at most ${field.most}`;
  if (!Number.isFinite(value)) return `${field.label} is not a number: write one ${range}.`;
  if (field.whole && !Number.isInteger(value)) return `${field.label} must be a whole number ${range}.`;
  const low = field.above === undefined ? value < (field.least ?? -Infinity) : value <= field.above;
  return low || value > (field.most ?? Infinity) ? `${field.label} must be ${range}.` : "";
}

/**
 * @param {Record<string, string>} written What the user wrote, by field.
 * @returns {string} The first problem; empty if there is none.
 */
export function firstProblem(written) {
  return FIELDS.map((field) => problem(field, written[field.name] ?? "")).find(Boolean) ?? "";
}

/**
 * The fields of a request's body. Call it when there is no problem.
 *
 * @param {Record<string, string>} written
 * @returns {Record<string, number | string[]>}
 */
export function sampling(written) {
  /** @type {Record<string, number | string[]>} */
  const sent = {};
  for (const field of FIELDS) {
    const text = written[field.name] ?? "";
    const stops = field.text ? text.split("\n").filter(Boolean).map(unescape) : [];
    if (stops.length) sent[field.name] = stops;
    else if (!field.text && text.trim()) sent[field.name] = Number(text);
  }
  return sent;
}

/** @param {string} text */
function unescape(text) {
  return text.replace(/\\([nt\\])/g, (_, sign) => ({ n: "\n", t: "\t" })[/** @type {"n" | "t"} */ (sign)] ?? "\\");
}
