// Notices

function showNotice(title, detail, next, ...more) {
  const lines = [detail, next].filter(Boolean).map((line) => element("p", "", line));
  $("notice").append(element("div", "notice", element("strong", "", title), ...lines, ...more));
}

/** Show a refusal and what to do next; one that names a time to wait offers to search again after it. */
function showProblem(problem, where) {
  const title = where ? `${where}: ${problem.title}` : problem.title;
  const wait = problem.wait ? ` Search again in ${count(problem.wait, "second")}.` : "";
  const again = having(element("button", "", "Search again"), { type: "button" });
  again.addEventListener("click", () => search(stateOf(location.search)));
  const retriable = isNumber(problem.wait) || [429, 503, 504].includes(problem.status);
  if (problem.wait) {
    again.disabled = true;
    setTimeout(() => { again.disabled = false; }, problem.wait * 1000);
  }
  showNotice(title, problem.detail, problem.next + wait, ...(retriable ? [again] : []));
  if (problem.status === 401 || problem.status === 403) askForKey();
}

/** Say plainly what an incomplete answer lacks. */
function showGaps(answer, where) {
  if (answer.complete !== false) return;
  const title = where ? `${where}: incomplete answer` : "Incomplete answer";
  const skipped = (answer.skipped || []).map((stage) => ({ rerank: "reranking", answer: "answering" })[stage] || stage);
  const missing = answer.missing_shards || [];
  if (skipped.length) {
    showNotice(title, `There was no time left for ${listed(skipped)}. Raise the time limit under More, or ask for fewer results.`);
  }
  if (missing.length) {
    const all = factsOf(answer)?.num_shards;
    const which = `${missing.length === 1 ? "Shard" : "Shards"} ${listed(missing.map(String))}${all ? ` of ${all} (counted from 0)` : ""}`;
    showNotice(title, `${which} did not answer in time: passages kept there are missing, better ones perhaps among them. Search again.`);
  }
  if (!skipped.length && !missing.length) {
    showNotice(title, "A part of the index did not answer in time, so better passages may be missing. Search again.");
  }
}

function askForKey() {
  $("unlock").hidden = false;
  $("key").focus();
}

// What is served

/** Ask what is served; fill in the choices. While the service is starting, ask again every few seconds. */
async function learn() {
  clearTimeout(waiting);
  let told = null, response = null;
  try {
    response = await fetchFrom("aliases");
    told = response.ok ? await response.json() : null;
  } catch { /* told below, and by the search itself */ }
  if ([401, 403].includes(response?.status)) {
    $("about").textContent = "This server asks for an API key.";
    return key ? showProblem(await problemOf(response), "") : askForKey();
  }
  if (!told) {
    $("about").textContent = "The service is not ready yet.";
    waiting = setTimeout(learn, 3000);
    return;
  }
  served = told;
  const aliases = Object.entries(told.aliases);
  $("about").replaceChildren(...aliases.flatMap(([alias, { current, versions }]) => versions.filter((about) => about.version === current)
    .map((about) => element("p", "", ...originNodes({ alias, version: about.version, encoder: about.encoder })))));
  const { query, filter, budget } = formState();  // what was typed meanwhile stays
  fillForm({ ...stateOf(location.search), query, filter, budget });
}

// What the user does

/** Search for what the address says, unless a key has to be given first. */
function searchAddress() {
  const state = stateOf(location.search);
  if (state.query && $("unlock").hidden) search(state);
}

function submit() {
  const state = formState();
  const address = state.query ? addressOf(state) : location.pathname;
  if (address !== location.search && state.query) history.pushState(null, "", address);
  fillForm(state);
  search(state);
}

function swap() {
  const state = formState();
  const alias = state.alias || served.default, version = state.version || served.aliases[alias]?.current || "";
  const [otherAlias, otherVersion] = state.against.split("/");
  fillForm({ ...state, alias: otherAlias, version: otherVersion, against: `${alias}/${version}` });
  if (state.query) submit();
}

/** Focus the passage `down` ranks below the focused one and `across` columns beside it; above the first is the box. */
function moveFocus(down, across) {
  const hit = document.activeElement.closest(".hit");
  const column = Math.max(0, grid.findIndex((nodes) => nodes.includes(hit)));
  const rank = hit ? grid[column].indexOf(hit) : -1;
  const nodes = grid[Math.min(Math.max(0, column + across), grid.length - 1)] || [];
  if (rank + down < 0) return $("q").focus();
  const next = nodes[across ? Math.min(rank, nodes.length - 1) : rank + down];
  if (next) next.focus();
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  const hit = event.target.closest(".hit"), typing = event.target.matches("input, select, textarea");
  const arrows = { ArrowDown: [1, 0], ArrowUp: [-1, 0], ...(hit ? { ArrowLeft: [0, -1], ArrowRight: [0, 1] } : {}) };
  const step = hit || event.target === $("q") ? arrows[event.key] : null;
  const letters = typing ? null : { j: [1, 0], k: [-1, 0] }[event.key];
  if (event.key === "/" && !typing) $("q").select();
  else if (event.key === "Escape" && hit) $("q").focus();
  else if (event.key === "Enter" && hit && event.target === hit) twinOf(hit)?.focus();
  else if (step || letters) moveFocus(...(step || letters));
  else return;
  event.preventDefault();
}

function onResultsClick(event) {
  const expand = event.target.closest(".expand"), move = event.target.closest("button.move");
  if (move) twinOf(move.closest(".hit"))?.focus();
  if (!expand) return;
  const open = !expand.previousElementSibling.classList.toggle("clamped");
  expand.textContent = open ? "Show less" : "Show all";
  having(expand, { "aria-expanded": open });
}

/** Offer to show all of those passages of which the page cuts something off. */
function showClamps() {
  const nodes = [...document.querySelectorAll(".passage.clamped")];
  const cut = nodes.map((node) => node.scrollHeight > node.clientHeight + 1);
  nodes.forEach((node, i) => { node.nextElementSibling.hidden = !cut[i]; });
}

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  $("theme").textContent = `Theme: ${theme || "auto"}`;
}

function useKey(event) {
  event.preventDefault();
  const given = $("key").value.trim();
  const usable = /^[\x21-\x7e]+$/.test(given);
  $("key").setCustomValidity(usable ? "" : "A key holds letters, digits and signs only, without spaces.");
  if (!usable) return $("key").reportValidity();
  key = remember("sessionStorage", KEY, given);
  $("key").value = "";
  $("unlock").hidden = true;
  $("forget").hidden = false;
  $("notice").replaceChildren();
  learn().then(searchAddress);
}

function forgetKey() {
  key = remember("sessionStorage", KEY, "");
  $("forget").hidden = true;
  $("status").textContent = "The key is forgotten.";
}

async function copyLink() {
  try {
    await navigator.clipboard.writeText($("permalink").href);
    $("status").textContent = "Link copied.";
  } catch {
    $("status").textContent = "The browser refused; copy the link by hand.";
  }
}

document.addEventListener("keydown", onKey);
window.addEventListener("resize", showClamps);
window.addEventListener("popstate", () => { fillForm(stateOf(location.search)); search(stateOf(location.search)); });
$("form").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
$("alias").addEventListener("change", () => { $("version").value = ""; });
for (const id of ["k", "alias", "version", "with", "rerank", "answer"]) {
  $(id).addEventListener("change", () => $("q").value.trim() ? submit() : fillForm(formState()));
}
$("swap").addEventListener("click", swap);
$("more-toggle").addEventListener("click", () => showMore($("more").hidden));
$("unlock").addEventListener("submit", useKey);
$("key").addEventListener("input", () => $("key").setCustomValidity(""));
$("forget").addEventListener("click", forgetKey);
$("forget").hidden = !key;
$("copy").hidden = !navigator.clipboard;  // browsers offer it on https and localhost only
$("copy").addEventListener("click", copyLink);
$("results").addEventListener("click", onResultsClick);
for (const kind of ["focusin", "mouseover"]) $("results").addEventListener(kind, (event) => showTwins(event.target.closest(".hit")));
for (const kind of ["focusout", "mouseleave"]) $("results").addEventListener(kind, () => showTwins(null));
$("theme").addEventListener("click", () => {
  const next = { "": "dark", dark: "light", light: "" }[recalled("localStorage", THEME)] ?? "";
  setTheme(remember("localStorage", THEME, next));
});

setTheme({ dark: "dark", light: "light" }[recalled("localStorage", THEME)] || "");
fillForm(stateOf(location.search));
if (document.activeElement === document.body) $("q").focus();  // the attribute would come late, and complain in the console
learn().then(searchAddress);
