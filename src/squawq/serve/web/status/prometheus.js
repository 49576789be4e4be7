// Prometheus' text format: samples of /metrics, and quantiles of its histograms.

/**
 * @typedef {{labels: Record<string, string>, value: number}} Sample
 * @typedef {Map<string, Sample[]>} Samples Samples by name, in their order.
 */

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;
const ESCAPES = { n: "\n", '"': '"', "\\": "\\" };

/**
 * @param {string} text
 * @returns {Samples}
 */
export function parse(text) {
  const samples = new Map();
  for (const line of text.split("\n")) {
    const found = LINE.exec(line);
    if (!found) continue; // a comment, or the end
    const labels = {};
    for (const [, name, value] of (found[2] ?? "").matchAll(LABEL)) {
      labels[name] = value.replace(/\\(.)/g, (_, sign) => ESCAPES[sign] ?? sign);
    }
    if (!samples.has(found[1])) samples.set(found[1], []);
    samples.get(found[1]).push({ labels, value: number(found[3]) });
  }
  return samples;
}

/** @param {string} text A number as Prometheus writes it. */
function number(text) {
  return text === "+Inf" ? Infinity : text === "-Inf" ? -Infinity : Number(text);
}

/**
 * @param {Samples} samples
 * @param {string} name
 * @returns {number | undefined} The value of the name's only sample; undefined if there is none.
 */
export function value(samples, name) {
  return samples.get(name)?.[0].value;
}

/**
 * Sums of the values of a name by one of its labels.
 *
 * @param {Samples} samples
 * @param {string} name
 * @param {string} label
 * @returns {Map<string, number>}
 */
export function byLabel(samples, name, label) {
  const sums = new Map();
  for (const sample of samples.get(name) ?? []) {
    const key = sample.labels[label];
    sums.set(key, (sums.get(key) ?? 0) + sample.value);
  }
  return sums;
}

/**
 * The cumulative counts of a histogram by the upper bounds of its buckets, less those of an earlier scrape.
 *
 * @param {Samples} samples
 * @param {string} name
 * @param {Samples} [earlier]
 * @returns {[number, number][]} Upper bound and count, by rising bound; the last bound is Infinity.
 */
export function buckets(samples, name, earlier) {
  const before = new Map((earlier?.get(`${name}_bucket`) ?? []).map((sample) => [sample.labels.le, sample.value]));
  return (samples.get(`${name}_bucket`) ?? []).map(({ labels, value: count }) => [
    number(labels.le),
    count - (before.get(labels.le) ?? 0),
  ]);
}

/**
 * A quantile, interpolated linearly inside its bucket as Prometheus' histogram_quantile does.
 *
 * @param {[number, number][]} counts As `buckets` returns them.
 * @param {number} share 0 to 1.
 * @returns {number | undefined} The highest finite bound for values above it; undefined without observations.
 */
export function quantile(counts, share) {
  const total = counts.at(-1)?.[1] ?? 0;
  if (!total) return undefined;
  const rank = share * total;
  let lower = 0;
  let below = 0;
  for (const [upper, count] of counts) {
    if (count >= rank && count > below) {
      return upper === Infinity ? lower : lower + ((upper - lower) * (rank - below)) / (count - below);
    }
    [lower, below] = [upper, count];
  }
  return lower;
}
