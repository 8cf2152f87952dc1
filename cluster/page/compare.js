// Two versions side by side

/** Compare two rankings by passage id: the ranks on either side, what they share, how far the shared ones moved. */
function compare(before, after) {
  const ranks = (hits) => new Map(hits.map((hit, i) => [hit.id, i + 1]));
  const was = ranks(before), is = ranks(after);
  const moves = [...is].filter(([id]) => was.has(id)).map(([id, rank]) => Math.abs(was.get(id) - rank));
  const texts = new Map(before.map((hit) => [hit.id, hit.text]));
  const edited = new Set(after.filter((hit) => texts.has(hit.id) && texts.get(hit.id) !== hit.text).map((hit) => hit.id));
  return {
    was, is, edited, shared: moves.length, fresh: is.size - moves.length, gone: was.size - moves.length,
    mean: moves.length ? moves.reduce((a, b) => a + b, 0) / moves.length : null,
    sameFirst: before.length > 0 && before[0].id === after[0]?.id,
  };
}

function showComparison(state, [before, after]) {
  const found = compare(before.hits, after.hits);
  grid.forEach((column, side) => column.forEach((node) => markMove(node, side, found)));
  const longest = Math.max(before.took_ms?.total || 0, after.took_ms?.total || 0);
  const nameOf = (answer) => `${answer.alias} ${answer.version}`;
  const header = (answer) => having(element("th", "side", nameOf(answer)), { scope: "col", role: "columnheader" });
  const facts = (answer) => cell(nameOf(answer), element("p", "origin", ...factNodes(answer)), timingNode(answer.took_ms, longest), ...readNodes(answer));
  const corner = having(element("th", "number", element("span", "visually-hidden", "Rank")), { scope: "col", role: "columnheader" });
  const rows = Array.from({ length: Math.max(grid[0].length, grid[1].length) }, (_, i) =>
    row(String(i + 1), ...grid.map((column, side) => cell(nameOf(side ? after : before), ...(column[i] ? [column[i]] : [])))));
  const head = element("thead", "", having(element("tr", "", corner, header(before), header(after)), { role: "row" }),
    row(element("span", "visually-hidden", "About"), facts(before), facts(after)));
  const same = before.alias === after.alias && before.version === after.version;
  const hint = same ? "Both columns are the same version: choose another to compare with."
    : "Moves in rank are from the first version to the second; ranks count the results shown.";
  const caption = element("caption", "", tallyNode(found, Math.max(grid[0].length, grid[1].length)), element("p", "hint", hint));
  const table = element("table", "", caption, having(head, { role: "rowgroup" }), having(element("tbody", "", ...rows), { role: "rowgroup" }));
  $("results").replaceChildren(having(table, { role: "table", "aria-label": `${nameOf(before)} beside ${nameOf(after)}` }));
  $("status").textContent = `${found.shared} of ${count(Math.max(grid[0].length, grid[1].length), "passage")} shared`;
}

/** Return a cell; on narrow screens, where there are no columns, it shows whose side it is. */
const cell = (side, ...children) => having(element("td", "", ...children), { role: "cell", ...(children.length ? { "data-side": side } : {}) });

function row(heading, ...cells) {
  return having(element("tr", "", having(element("th", "", heading), { scope: "row", role: "rowheader" }), ...cells), { role: "row" });
}

function tallyNode(found, depth) {
  const mean = found.mean === null ? "–" : found.mean.toFixed(1);
  const told = [[`${found.shared} of ${depth}`, "shared"], [found.fresh, "new"], [found.gone, "gone"],
    [mean, "ranks moved on average"], [found.sameFirst ? "same" : "another", "first passage"]];
  return element("dl", "tally", ...told.map(([value, name]) => element("div", "", element("dt", "", name), element("dd", "", String(value)))));
}

/** Put in place of the rank what became of the passage: on the left where it went, on the right where it came from. */
function markMove(node, side, found) {
  const id = node.dataset.id;
  const there = (side ? found.was : found.is).get(id), here = (side ? found.is : found.was).get(id);
  const up = side ? there - here : here - there;
  const told = !there ? (side ? ["new", "new", "new here"] : ["gone", "gone", "gone in the other version"])
    : up === 0 ? ["same", "same", "the same rank in both"]
    : side ? [up > 0 ? "up" : "down", `${up > 0 ? "▲" : "▼"} ${Math.abs(up)}`, `${up > 0 ? "up" : "down"} ${Math.abs(up)}, from rank ${there}`]
    : ["", `→ ${there}`, `rank ${there} in the other version`];
  const badge = there ? having(element("button", `move ${told[0]}`), { type: "button", tabindex: "-1" }) : element("span", `move ${told[0]}`);
  badge.append(having(element("span", "", told[1]), { "aria-hidden": "true" }), element("span", "visually-hidden", told[2]));
  node.querySelector(".rank").replaceWith(badge);
  having(node, { "aria-label": `${node.ariaLabel}, ${told[2]}` });
  if (found.edited.has(id)) node.querySelector(".id").append(" · its text differs between the two");
}

const twinOf = (node) => grid.flat().find((other) => other !== node && other.dataset.id === node.dataset.id);

function showTwins(node) {
  for (const other of grid.flat()) other.classList.toggle("twin", Boolean(node) && grid.length > 1 && other.dataset.id === node.dataset.id);
}
