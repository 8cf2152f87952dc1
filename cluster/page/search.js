"use strict";
// Everything that comes from the server is put on the page with textContent, never as markup.

const $ = (id) => document.getElementById(id);
const base = location.pathname.replace(/\/*$/, "/");  // the app may be mounted below the root
const COMMON = new Set(("a an and are as at be by can do does for from how i if in into is it its me my not of on or so " +
  "that the this to use was what when where which who why will with without you").split(" "));
const DEFAULT_K = 10;
const KEY = "pinakes-key", THEME = "pinakes-theme";
const NEXT_STEP = {
  401: "Give an API key with the scope “search”.",
  403: "Use a key that has the scope “search”.",
  404: "Choose an index and a version among those offered above.",
  408: "Search again.",
  413: "Shorten the query or the filter.",
  422: "Change what the message names, then search again.",
  429: "Too much was asked in a short time.",
  503: "The server is busy, starting or short of time.",
  504: "Search again, or raise the time limit under More.",
};
const AGAIN = "Search again. If it happens again, whoever runs this server finds the cause in its log";
let running = null;  // the AbortController of the search in flight
let waiting = null;  // the timer that asks again what is served
let grid = [];       // the passages on the page, one array a column
let served = { default: null, stages: {}, aliases: {} };  // what GET /aliases told last

function element(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children);
  return node;
}

/** Return the node with its attributes set; never `style`, which the page's policy forbids. */
function having(node, attributes) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
const listed = (words) => new Intl.ListFormat("en").format(words);
const isNumber = (value) => typeof value === "number";
const milliseconds = (value) => `${value.toFixed(value < 10 ? 1 : 0)} ms`;

// What the page keeps: the key for this tab, the theme for this browser. A browser may forbid both.

function remember(storage, name, value) {
  try {
    if (value) window[storage].setItem(name, value);
    else window[storage].removeItem(name);
  } catch { /* then it holds for this page only */ }
  return value;
}

function recalled(storage, name) {
  try { return window[storage].getItem(name) || ""; } catch { return ""; }
}

let key = recalled("sessionStorage", KEY);

// The search, as the address and the form hold it

/** Return the search that an address's query string holds. */
function stateOf(address) {
  const params = new URLSearchParams(address);
  const text = (name) => (params.get(name) || "").trim();
  const whole = (name, otherwise) => /^[1-9]\d{0,6}$/.test(text(name)) ? Number(text(name)) : otherwise;
  return {
    query: text("q"), k: whole("k", DEFAULT_K), alias: text("alias"), version: text("version"), against: text("with"),
    rerank: text("rerank") === "1", answer: text("answer") === "1", filter: text("filter"), budget: whole("budget", 0),
  };
}

function addressOf(state) {
  const params = new URLSearchParams({ q: state.query });
  if (state.k !== DEFAULT_K) params.set("k", state.k);
  for (const name of ["alias", "version"]) if (state[name]) params.set(name, state[name]);
  if (state.against) params.set("with", state.against);
  for (const stage of ["rerank", "answer"]) if (state[stage]) params.set(stage, "1");
  if (state.filter) params.set("filter", state.filter);
  if (state.budget) params.set("budget", state.budget);
  return `?${params.toString().replaceAll("%2F", "/")}`;
}

function formState() {
  const shown = (id) => !$(`${id}-choice`).hidden;
  const chosen = (id) => shown(id) ? $(id).value : "";
  return {
    query: $("q").value.trim(), k: Number($("k").value),
    alias: chosen("alias"), version: chosen("version"), against: chosen("with"),
    rerank: shown("rerank") && $("rerank").checked, answer: shown("answer") && $("answer").checked,
    filter: $("filter").value.trim(), budget: Math.max(0, Math.floor(Number($("budget").value))) || 0,
  };
}

/** Set the form to a search; offer what is served, and also what the search names and is not served. */
function fillForm(state) {
  const aliases = Object.keys(served.aliases);
  const alias = state.alias || served.default || "";
  if ($("q").value.trim() !== state.query) $("q").value = state.query;
  offer("k", [...new Set([5, 10, 20, 50, 100, state.k])].sort((a, b) => a - b).map((k) => [String(k), String(k)]), String(state.k));
  offer("alias", aliases.map((name) => [name, name]), alias);
  $("alias-choice").hidden = aliases.length < 2 && !state.alias;
  const versions = versionsOf(alias).map((about) => [about.version, versionLabel(about)]);
  offer("version", [["", "current"], ...versions], state.version);
  $("version-choice").hidden = versions.length < 2 && !state.version;
  const prefix = (name) => aliases.length > 1 ? `${name} ` : "";
  const all = aliases.flatMap(versionsOf).map((about) => [`${about.alias}/${about.version}`, prefix(about.alias) + versionLabel(about)]);
  offer("with", [["", "nothing"], ...all], state.against);
  $("with-choice").hidden = all.length < 2 && !state.against;
  $("swap").hidden = $("compare-keys").hidden = !state.against;
  for (const [stage, name] of [["rerank", "reranker"], ["answer", "reader"]]) {
    $(`${stage}-choice`).hidden = served.stages[name] !== true;
    $(stage).checked = state[stage];
  }
  $("filter").value = state.filter;
  $("budget").value = state.budget || "";
  if (state.filter || state.budget) showMore(true);
}

function offer(id, options, wanted) {
  const known = options.some(([value]) => value === wanted);
  const offered = known || !wanted ? options : [...options, [wanted, `${wanted} (not served)`]];
  $(id).replaceChildren(...offered.map(([value, label]) => new Option(label, value, false, value === wanted)));
}

function showMore(on) {
  $("more").hidden = !on;
  having($("more-toggle"), { "aria-expanded": on });
}

const versionsOf = (alias) => served.aliases[alias]?.versions || [];
const versionLabel = (about) => [about.version, about.state].filter(Boolean).join(" · ");

// Asking the server

function fetchFrom(path, options = {}) {
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  return fetch(base + path, { ...options, headers });
}

/** Return the body of the request that searches one version. Throws SyntaxError for a filter that is no JSON. */
function requestFor(state, target) {
  const asked = { query: state.query, k: state.k };
  for (const name of ["alias", "version"]) if (target[name]) asked[name] = target[name];
  for (const [stage, name] of [["rerank", "reranker"], ["answer", "reader"]]) {
    if (state[stage] && served.stages[name] !== false) asked[stage] = true;
  }
  if (state.filter) asked.filter = JSON.parse(state.filter);
  if (state.budget) asked.budget_ms = state.budget;
  return JSON.stringify(asked);
}

/** Return {target, answer}, or {target, problem} when the search was refused or nothing answered. */
async function ask(state, target, signal) {
  try {
    const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: requestFor(state, target), signal };
    const response = await fetchFrom("search", options);
    return response.ok ? { target, answer: await response.json() } : { target, problem: await problemOf(response) };
  } catch (error) {
    if (error.name === "AbortError") throw error;
    return { target, problem: error instanceof SyntaxError && state.filter ? filterProblem(error) : lostProblem() };
  }
}

const lostProblem = () => ({
  title: "No answer from the server",
  detail: "It may be stopped or restarting, or the connection is down.",
  next: "Check the connection, then search again.",
  wait: 0,
});

const filterProblem = (error) => ({
  title: "The filter is not JSON",
  detail: error.message,
  next: "Write it like {\"lang\": \"en\"}, with double quotes around names and texts.",
});

/** Return what a refused request means: an RFC 9457 problem, or whatever stands in for one. */
async function problemOf(response) {
  const fallback = `HTTP ${response.status} ${response.statusText}`.trim();
  const body = await response.json().catch(() => null);
  const said = response.headers.get("Retry-After");
  const wait = said === null ? null : Number.isFinite(Number(said)) ? Number(said) : (Date.parse(said) - Date.now()) / 1000;
  const request = response.headers.get("X-Request-Id");
  const next = NEXT_STEP[response.status] || AGAIN + (request ? `, under request ${request}.` : ".");
  const problem = { status: response.status, next, wait: isNumber(wait) && wait >= 0 ? Math.ceil(wait) : null };
  if (!body) return { ...problem, title: "The search failed", detail: `The server answered ${fallback}, without an explanation.` };
  const detail = typeof body.detail === "string" ? body.detail : JSON.stringify(body.detail ?? body);
  return { ...problem, title: body.title || fallback, detail };
}

/** Search for `state`. A newer search cancels the one in flight, so answers never arrive out of order. */
async function search(state) {
  if (running) running.abort();
  running = null;
  $("notice").replaceChildren();
  $("link").hidden = !state.query;
  document.title = state.query ? `${state.query} · Pinakes` : "Pinakes";
  if (!state.query) {
    busy(false);
    showSides(state, []);
    $("status").textContent = "Type a question to search.";
    return;
  }
  const mine = running = new AbortController();
  const [alias, version] = state.against.split("/");
  const targets = [{ alias: state.alias, version: state.version }, ...(state.against ? [{ alias, version }] : [])];
  $("permalink").href = addressOf(state);
  busy(true);
  $("status").textContent = "Searching…";
  try {
    const sides = await Promise.all(targets.map((target) => ask(state, target, mine.signal)));
    if (sides.some(isOutdated)) await learn();
    if (running === mine) showSides(state, sides);
  } catch (error) {
    if (error.name !== "AbortError") throw error;
  } finally {
    if (running === mine) busy(false);
  }
}

function busy(on) {
  having($("main"), { "aria-busy": on });
  $("go").textContent = on ? "Searching…" : "Search";
}
