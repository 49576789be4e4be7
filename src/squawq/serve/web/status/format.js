// Numbers as text, with their units.

const NONE = "–";
const plain = new Intl.NumberFormat("en");
const rough = new Intl.NumberFormat("en", { maximumSignificantDigits: 2 });
const short = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });

/** @param {number | undefined} count */
export function whole(count) {
  return count === undefined ? NONE : plain.format(Math.round(count));
}

/** @param {number | undefined} rate Per second. */
export function perSecond(rate) {
  return rate === undefined ? NONE : rate >= 100 ? whole(rate) : short.format(rate);
}

/** @param {number | undefined} share 0 to 1. */
export function percent(share) {
  return share === undefined ? NONE : `${(share * 100).toFixed(share < 0.1 ? 1 : 0)} %`;
}

/** @param {number | undefined} seconds A latency, estimated from a histogram. */
export function latency(seconds) {
  if (seconds === undefined) return NONE;
  return seconds < 1 ? `${rough.format(seconds * 1000)} ms` : `${rough.format(seconds)} s`;
}

/** @param {number | undefined} count */
export function bytes(count) {
  if (count === undefined) return NONE;
  return count < 2 ** 30 ? `${whole(count / 2 ** 20)} MiB` : `${short.format(count / 2 ** 30)} GiB`;
}

/** @param {number | undefined} seconds A length of time, in its two largest units. */
export function duration(seconds) {
  if (seconds === undefined) return NONE;
  let rest = Math.max(0, Math.floor(seconds));
  const parts = [];
  for (const [unit, size] of /** @type {[string, number][]} */ ([["d", 86400], ["h", 3600], ["min", 60], ["s", 1]])) {
    if (rest >= size || (unit === "s" && !parts.length)) parts.push(`${Math.floor(rest / size)} ${unit}`);
    rest %= size;
  }
  return parts.slice(0, 2).join(" ");
}

/** @param {number} time Milliseconds since the epoch. */
export function clock(time) {
  return new Date(time).toLocaleTimeString("en-GB");
}
