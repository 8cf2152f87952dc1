// Showing what came back

/** Show one answer as a list, two as a table; and what was refused or left out, above them. */
function showSides(state, sides) {
  const answers = sides.filter((side) => side.answer).map((side) => side.answer);
  const pattern = termPattern(state.query);
  document.body.classList.toggle("comparing", answers.length === 2);
  $("status").textContent = "";
  grid = answers.map((answer) => answer.hits.map((hit, i) => hitNode(hit, i + 1, pattern, answer)));
  if (answers.length === 2) showComparison(state, answers);
  else if (answers.length === 1) showList(answers[0]);
  else $("results").replaceChildren();
  showClamps();
  const several = sides.length > 1;
  for (const { target, answer, problem } of sides) {
    const where = several ? [(answer || target).alias || served.default, (answer || target).version].filter(Boolean).join(" ") : "";
    if (problem) showProblem(problem, where);
    else showGaps(answer, where);
  }
}

/** Say whether an alias was switched since this page asked what is served: another version answered for it. */
function isOutdated({ target, answer }) {
  if (!answer) return false;
  return !factsOf(answer) || (!target.version && served.aliases[answer.alias].current !== answer.version);
}

const factsOf = (answer) => versionsOf(answer.alias).find((about) => about.version === answer.version);

function showList(answer) {
  const list = having(element("ol", "", ...grid[0].map((node) => element("li", "", node))), { role: "list", "aria-label": "Search results" });
  const total = isNumber(answer.took_ms?.total) ? ` in ${milliseconds(answer.took_ms.total)}` : "";
  $("results").replaceChildren(element("p", "origin", ...originNodes(answer)), timingNode(answer.took_ms), ...readNodes(answer), list);
  $("status").textContent = answer.hits.length ? `${count(answer.hits.length, "passage")}${total}` : "No passages came back for this query.";
}

const originNodes = (answer) => [element("span", "side", `${answer.alias} ${answer.version}`), " · ", ...factNodes(answer)];

/** Return the facts about the version that answered, and the link to its report. */
function factNodes(answer) {
  const about = factsOf(answer) || { ...answer };
  const recall = about.recall && isNumber(about.recall.value) ? `recall@${about.recall.k} ${about.recall.value.toFixed(3)}` : "";
  const facts = [about.state, isNumber(about.num_rows) && count(about.num_rows, "passage"), answer.encoder || about.encoder,
    about.dim && `${about.dim} dimensions`, about.factory, recall].filter(Boolean);
  return [`${facts.join(" · ")} · `, reportLink(answer.alias, answer.version)];
}

/** Return a link to a version's report. With a key it is fetched and saved, for a link can't carry the key. */
function reportLink(alias, version) {
  const path = `reports/${encodeURIComponent(alias)}/${encodeURIComponent(version)}`;
  const link = having(element("a", "", "report"), { href: base + path, target: "_blank", rel: "noopener", "aria-label": `Report of ${alias} ${version}` });
  link.addEventListener("click", async (event) => {
    if (!key) return;
    event.preventDefault();
    const response = await fetchFrom(path).catch(() => null);
    if (!response?.ok) return showProblem(response ? await problemOf(response) : lostProblem(), "report");
    const saved = having(element("a"), { href: URL.createObjectURL(await response.blob()), download: `report-${alias}-${version}.html` });
    saved.click();
    setTimeout(() => URL.revokeObjectURL(saved.href), 60_000);
    $("status").textContent = "The report was saved to your downloads.";
  });
  return link;
}

/** Draw how long each stage took. longest: milliseconds that fill the width, to draw two answers on one scale. */
function timingNode(took = {}, longest = took.total) {
  const stages = Object.entries(took).filter(([name, value]) => name !== "total" && isNumber(value) && value > 0);
  const told = stages.map(([name, value]) => `${name} ${milliseconds(value)}`);
  const bar = having(element("div", "bar"), { role: "img", "aria-label": `Time by stage: ${told.join(", ")}` });
  for (const [name, value] of stages) {
    const piece = element("i", name);
    piece.style.flexGrow = value;
    bar.append(piece);
  }
  if (longest > 0 && isNumber(took.total)) bar.style.width = `${Math.min(100, 100 * took.total / longest)}%`;
  const legend = stages.map(([name], i) => element("span", "", element("b", name), told[i]));
  const figure = having(element("figure", "timing", bar, element("figcaption", "", ...legend)), {});
  figure.style.marginInline = 0;
  figure.hidden = !stages.length;
  return figure;
}

/** Show what the reader answered: the best answer, where it was read, and the others. */
function readNodes(answer) {
  if (!answer.answers) return [];
  const [best, ...others] = answer.answers;
  if (!best) return [element("div", "read", element("p", "", "The reader found no answer in these passages."))];
  const box = element("div", "read", element("strong", "", element("bdi", "", best.text)));
  if (best.passage) box.append(element("p", "", "read in ", element("code", "", best.passage)));
  if (others.length) box.append(element("p", "", "or: ", ...others.flatMap((other, i) => [i ? " · " : "", element("bdi", "", other.text)])));
  return [box];
}

function hitNode(hit, rank, pattern, answer) {
  const title = hit.title || hit.id;
  const heading = having(element("h2", "", ...highlighted(title, pattern)), { dir: "auto" });
  const score = isNumber(hit.rerank_score) ? `rerank ${hit.rerank_score.toFixed(2)} · ${hit.score.toFixed(3)}` : hit.score.toFixed(3);
  const scored = element("span", "score", element("span", "visually-hidden", "score "), score);
  const spans = (answer.answers || []).filter((found) => found.passage === hit.id && isNumber(found.start) && isNumber(found.end)).slice(0, 1);
  const passage = having(element("p", "passage clamped", ...highlighted(hit.text, pattern, spans[0])), { dir: "auto" });
  const expand = having(element("button", "plain expand", "Show all"), { type: "button", "aria-expanded": "false" });
  expand.hidden = true;
  const body = element("div", "body", passage, expand);
  if (Array.isArray(hit.answers)) {
    body.append(element("p", "answers", "Answer: ", element("strong", "", element("bdi", "", hit.answers.join(" · ")))));
  }
  const metadata = Object.entries(hit.metadata || {}).map(([name, value]) => ` · ${name} ${Array.isArray(value) ? value.join(", ") : value}`);
  body.append(element("p", "id", element("code", "", hit.id), ` · row ${hit.row.toLocaleString("en")}`, ...metadata));
  const node = element("article", "hit", element("div", "head", element("span", "rank", `${rank}.`), heading, scored), body);
  return having(node, { tabindex: "-1", "data-id": hit.id, "aria-label": `${rank}. ${title}` });
}

// The query's words in the text

const UNSPACED = /[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Thai}\p{Script=Lao}\p{Script=Khmer}\p{Script=Myanmar}]/u;

/** Return a regular expression that finds the query's telling words, plural or not; null when it has none. */
function termPattern(query) {
  const words = query.toLowerCase().match(/[\p{L}\p{M}\p{N}]{2,}/gu) || [];
  const inside = words.filter((word) => UNSPACED.test(word)).flatMap(segmentsOf);
  const apart = words.filter((word) => !UNSPACED.test(word) && !COMMON.has(word))
    .map((word) => word.length > 4 ? word.replace(/(ing|ed|es|s)$/u, "") : word);
  const anyOf = (terms) => `(?:${[...new Set(terms)].sort((a, b) => b.length - a.length).join("|")})`;
  const sought = [];
  if (apart.length) sought.push(`(?<![\\p{L}\\p{M}\\p{N}])${anyOf(apart)}[\\p{L}\\p{M}]{0,3}(?![\\p{L}\\p{M}\\p{N}])`);
  if (inside.length) sought.push(anyOf(inside));
  return sought.length ? new RegExp(sought.join("|"), "giu") : null;
}

/** Return the words of a text in a script that writes them without spaces, those of a few kana aside: they tell little. */
function segmentsOf(text) {
  const words = Intl.Segmenter ? [...new Intl.Segmenter("und", { granularity: "word" }).segment(text)].map(({ segment }) => segment) : [text];
  return words.filter((word) => !/^\p{Script=Hiragana}{1,2}$/u.test(word));
}

/** Return the text as nodes, the query's words in <mark>, and the answer's span too ({start, end}, in characters). */
function highlighted(text, pattern, span) {
  const from = span ? unitsOf(text, span.start) : 0, to = span ? unitsOf(text, span.end) : 0;
  const terms = [...(pattern ? text.matchAll(pattern) : [])].map((match) => [match.index, match.index + match[0].length, ""]);
  const marks = terms.filter(([start, end]) => end <= from || start >= to);
  if (to > from) marks.push([from, to, "span"]);
  const nodes = [];
  let done = 0;
  for (const [start, end, className] of marks.sort((a, b) => a[0] - b[0])) {
    nodes.push(text.slice(done, start), element("mark", className, text.slice(start, end)));
    done = end;
  }
  return [...nodes, text.slice(done)];
}

/** Return how many UTF-16 units the first `characters` of the text take: the server counts code points. */
function unitsOf(text, characters) {
  let units = 0;
  for (const character of text) {
    if (characters-- <= 0) break;
    units += character.length;
  }
  return units;
}
