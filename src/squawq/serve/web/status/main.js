// The status page: reads /metrics every two seconds, and shows it.

import { ask } from "../key.js";
import { draw } from "./chart.js";
import { bytes, clock, duration, latency, percent, perSecond, whole } from "./format.js";
import { History } from "./history.js";
import { buckets, byLabel, parse, quantile, value } from "./prometheus.js";

/** @typedef {import("./prometheus.js").Samples} Samples */

const INTERVAL = 2000; // milliseconds
const PATIENCE = 10_000; // after which the server counts as unreachable
const GENERATED = "vllm:generation_tokens_total";
const PROMPT = "vllm:prompt_tokens_total";
const RUNNING = "vllm:num_requests_running";
const WAITING = "vllm:num_requests_waiting";
const HITS = "vllm:prefix_cache_hits_total";
const QUERIES = "vllm:prefix_cache_queries_total";
const CPU = "process_cpu_seconds_total";
const STEPS = "tgi_batch_forward_duration_sum"; // seconds in the model
const LATENCIES = {
  "Time to first token": "vllm:time_to_first_token_seconds",
  "Time between tokens": "vllm:inter_token_latency_seconds",
  "Whole request": "vllm:e2e_request_latency_seconds",
};
const FINISHED = { stop: "end of text or stop string", length: "length limit", abort: "client disconnected or shutdown", error: "error" };
const REFUSED = { overloaded: "queue full", unavailable: "shutting down", validation: "invalid request", other: "other" };
const RESPONSES = { "1xx": "1xx", "2xx": "2xx success", "3xx": "3xx redirect or not modified", "4xx": "4xx refused", "5xx": "5xx server error", other: "client gone" };

const history = new History();
/** @type {{models: any[], info: any} | null} */
let about = null; // of the server, read again after it could not be reached
let busy = false;
let keyless = false; // the user gave no API key, and is not asked again

/** Reads the server's figures and shows them. Of several calls at a time, one does. */
async function update() {
  if (busy || keyless || document.hidden) return;
  busy = true;
  try {
    const response = await get("/metrics");
    const samples = parse(await response.text());
    const time = Date.now();
    const restarted = history.add({ time, samples });
    if (restarted || !about) about = { models: (await json("/v1/models")).data, info: await json("/info") };
    show(samples, serverTime(response) ?? time);
    report(null);
  } catch (error) {
    about = null;
    report(error instanceof Refused ? error.message : "The server cannot be reached.");
  } finally {
    busy = false;
  }
}

class Refused extends Error {}

/** @param {string} path */
async function get(path) {
  const stop = new AbortController();
  const timer = setTimeout(() => document.querySelector("dialog[open]") ?? stop.abort(), PATIENCE);
  try {
    const response = await ask(path, { signal: stop.signal });
    keyless = response.status === 401;
    if (keyless) throw new Refused("The server needs an API key.");
    if (!response.ok) throw new Refused(`${path} answers with status ${response.status}.`);
    return response;
  } finally {
    clearTimeout(timer);
  }
}

/** @param {string} path */
async function json(path) {
  return (await get(path)).json();
}

/** @param {Response} response */
function serverTime(response) {
  const time = Date.parse(response.headers.get("date") ?? "");
  return Number.isNaN(time) ? undefined : time;
}

/** @param {string | null} problem In words; null if there is none. */
function report(problem) {
  const note = byId("problem");
  const last = history.newest ? ` The figures are of ${clock(history.newest.time)}.` : "";
  const next = keyless ? "Reload the page to enter one." : `The page tries again every ${INTERVAL / 1000} seconds.`;
  const text = problem ? `${problem}${last} ${next}` : "";
  if (note.textContent !== text) note.textContent = text; // else a screen reader says it each time
  note.hidden = !problem;
  if (!problem) byId("updated").textContent = `Updated ${clock(history.newest.time)}`;
}

/**
 * @param {Samples} samples
 * @param {number} time Milliseconds since the epoch, by the server's clock.
 */
function show(samples, time) {
  const facts = samples.get("squawq_info")?.[0].labels ?? {};
  showTiles(samples, facts);
  showCharts();
  showLatencies(samples);
  showCounts("finished", FINISHED, byLabel(samples, "vllm:request_success_total", "finished_reason"));
  showCounts("refused", REFUSED, byLabel(samples, "tgi_request_failure", "err"));
  showCounts("responses", RESPONSES, byLabel(samples, "http_requests_total", "status"));
  showModel(facts);
  showServer(samples, facts, time);
}

/**
 * @param {Samples} samples
 * @param {Record<string, string>} facts
 */
function showTiles(samples, facts) {
  const cache = value(samples, "vllm:kv_cache_usage_perc");
  const [hits, queries] = [history.growth(HITS), history.growth(QUERIES)];
  text("running", whole(value(samples, RUNNING)));
  text("waiting", whole(value(samples, WAITING)));
  text("generated", perSecond(history.rateNow(GENERATED)));
  text("generated-total", whole(value(samples, GENERATED)));
  text("prompt", perSecond(history.rateNow(PROMPT)));
  text("prompt-total", whole(value(samples, PROMPT)));
  text("cache", percent(cache));
  const bar = /** @type {HTMLMeterElement} */ (byId("cache-bar"));
  bar.value = cache ?? 0;
  bar.textContent = percent(cache);
  const size = facts.cache_tokens ? `${whole(Number(facts.cache_tokens))} tokens` : "the cache";
  text("cache-size", Number(facts.cache_mib) ? `${size}, ${bytes(Number(facts.cache_mib) * 2 ** 20)}` : size);
  text("prefix", percent(share(hits, queries)));
  text("prefix-total", percent(share(value(samples, HITS), value(samples, QUERIES))));
}

/**
 * @param {number | undefined} part
 * @param {number | undefined} all
 */
function share(part, all) {
  return all ? (part ?? 0) / all : undefined;
}

function showCharts() {
  const now = history.newest.time;
  draw(byId("generated-chart"), [{ name: "Tokens/s", points: history.points(GENERATED, true) }], now);
  draw(byId("prompt-chart"), [{ name: "Tokens/s", points: history.points(PROMPT, true) }], now);
  const load = [
    { name: "Running", points: history.points(RUNNING, false) },
    { name: "Waiting", points: history.points(WAITING, false) },
  ];
  draw(byId("load-chart"), load, now);
}

/** @param {Samples} samples */
function showLatencies(samples) {
  const cells = Object.entries(LATENCIES).map(([title, name]) => {
    const both = [buckets(samples, name, history.oldest.samples), buckets(samples, name)];
    return [title, ...both.flatMap((counts) => [latency(quantile(counts, 0.5)), latency(quantile(counts, 0.95))])];
  });
  rows("latency", cells);
}

/**
 * @param {string} id
 * @param {Record<string, string>} names What is counted, by the label in the metrics.
 * @param {Map<string, number>} counts
 */
function showCounts(id, names, counts) {
  const known = Object.entries(names).filter(([label]) => counts.has(label));
  rows(id, known.map(([label, name]) => [name, whole(counts.get(label))]));
}

/** @param {Record<string, string>} facts */
function showModel(facts) {
  const { models, info } = /** @type {NonNullable<typeof about>} */ (about);
  list("model", {
    [models.length > 1 ? "Names" : "Name"]: models.map(({ id }) => id).join(", "),
    "Context length": `${whole(models[0].max_model_len)} tokens`,
    "Longest prompt": `${whole(info.max_input_tokens)} tokens`,
    Engine: facts.engine,
    Device: [facts.device, facts.gpu].filter(Boolean).join(", "),
    "Instruction set": facts.instructions,
    Threads: facts.threads,
  });
}

/**
 * @param {Samples} samples
 * @param {Record<string, string>} facts
 * @param {number} time
 */
function showServer(samples, facts, time) {
  const start = value(samples, "process_start_time_seconds");
  const memory = value(samples, "process_resident_memory_bytes");
  const cpu = history.rateNow(CPU);
  const busyShare = history.rateNow(STEPS);
  list("server", {
    Version: facts.version,
    Uptime: start && duration(time / 1000 - start),
    Memory: memory && `${bytes(memory)} resident in the server's process`,
    CPU: cpu === undefined ? undefined : `${percent(cpu)} of one core, over the last seconds`,
    Preemptions: `${whole(value(samples, "vllm:num_preemptions_total"))} preempted sequences`,
    "Model busy": busyShare === undefined ? undefined : `${percent(busyShare)} of the time, over the last seconds`,
  });
}

/**
 * @param {string} id
 * @param {string[][]} cells Of each row; the first is its heading.
 */
function rows(id, cells) {
  const body = byId(id);
  while (body.children.length > cells.length) body.lastElementChild.remove();
  for (const [index, [title, ...values]] of cells.entries()) {
    const row = body.children[index] ?? body.appendChild(newRow(values.length));
    for (const [column, content] of [title, ...values].entries()) put(row.children[column], content);
  }
}

/** @param {number} columns Besides the heading. */
function newRow(columns) {
  const row = document.createElement("tr");
  const heading = row.appendChild(document.createElement("th"));
  heading.setAttribute("scope", "row");
  for (let column = 0; column < columns; column++) row.append(document.createElement("td"));
  return row;
}

/**
 * @param {string} id Of a dl.
 * @param {Record<string, string | number | undefined>} facts Those that are not known are left out.
 */
function list(id, facts) {
  const known = Object.entries(facts).filter(([, fact]) => fact);
  const target = byId(id);
  const titles = known.map(([title]) => title).join("\n");
  if (target.dataset.titles !== titles) {
    target.dataset.titles = titles;
    target.replaceChildren(
      ...known.flatMap(([title]) => {
        const term = document.createElement("dt");
        term.textContent = title;
        return [term, document.createElement("dd")];
      }),
    );
  }
  for (const [index, [, fact]] of known.entries()) put(target.querySelectorAll("dd")[index], String(fact));
}

/**
 * @param {Element} element
 * @param {string} content
 */
function put(element, content) {
  if (element.textContent !== content) element.textContent = content; // selected text stays so
}

/**
 * @param {string} id
 * @param {string} content
 */
function text(id, content) {
  put(byId(id), content);
}

/** @param {string} id */
function byId(id) {
  return /** @type {HTMLElement} */ (document.getElementById(id));
}

document.addEventListener("visibilitychange", update);
setInterval(update, INTERVAL);
update();
