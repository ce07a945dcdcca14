"use strict";

const { runs } = data().runs;
const { newest } = data().support;
const SHOWN = 150;
const state = { id: "", q: "", device: "", backend: "", status: "", changed: false };
let shownCells = SHOWN;
let shownChanges = SHOWN;

// A word, a sign and a colour for each: none of them alone.
const STATES = {
  OK: ["✓", "good"], UNSUPPORTED: ["–", "quiet"], ERROR: ["!", "warn"], TIMEOUT: ["◷", "warn"], OOM: ["▣", "warn"], CRASH: ["✕", "bad"], INCORRECT: ["≠", "bad"],
};
const ORDER = Object.keys(STATES);
const sign = (status) => STATES[status][0];
const kindOf = (status) => `state ${STATES[status][1]}`;

const cells = data().support.cells.map((cell, number) => {
  const stretches = cell.stretches.map(([first, last, status, members, so, reasons, id]) => ({ first, last, status, members, so, reasons, id }));
  const now = stretches[stretches.length - 1];
  return {
    ...cell, number, stretches, now, changed: stretches.length > 1,
    name: `${cell.backend} / ${cell.group} / ${cell.device}`,
    line: [cell.device, cell.group, cell.backend, now.status].join(" ").toLowerCase(),
  };
});
const changesOf = (cell) => cell.stretches.slice(1).map((stretch, i) => ({ cell, before: cell.stretches[i], after: stretch }));

function matching() {
  const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
  return cells.filter((cell) =>
    (!state.device || cell.device === state.device) && (!state.backend || cell.backend === state.backend) &&
    (!state.status || cell.now.status === state.status) && (!state.changed || cell.changed) &&
    words.every((word) => cell.line.includes(word)));
}

const soText = ({ status, members, so }) => (members > 1 && so < members ? `${status} ${so} of ${members}` : status);
const runText = (number) => `${dateText(runs[number].at)} ${shortCommit(runs[number].commit)}`.trim();
const isStale = (cell) => newest[cell.device] !== undefined && cell.now.last < newest[cell.device];

function changeRows(found) {
  const rows = found.flatMap(changesOf).sort((a, b) => b.after.first - a.after.first);
  $("num-changes").textContent = String(rows.length);
  $("changes").tBodies[0].replaceChildren(...rows.slice(0, shownChanges).map(({ cell, before, after }) => el("tr", {},
    el("td", { class: "tag" }, runLink(after.first, runText(after.first))),
    el("td", {}, cell.backend),
    el("td", {}, link(`#${encodeURIComponent(cell.name)}`, cell.group, true), cell.device && state.device === "" ? el("span", { class: "quiet" }, ` ${cell.device}`) : null),
    el("td", {}, el("span", { class: kindOf(before.status) }, `${sign(before.status)} ${soText(before)}`), " → ", el("span", { class: kindOf(after.status) }, `${sign(after.status)} ${soText(after)}`)),
    el("td", {}, after.reasons.join("; ") || before.reasons.map((reason) => `was: ${reason}`).join("; ")))));
  const more = $("more-changes");
  more.replaceChildren();
  if (rows.length > shownChanges) more.append(el("button", { type: "button", onclick: () => { shownChanges = Infinity; show(); } }, `Show all ${rows.length}`));
  else if (!rows.length) more.append("Nothing changed.");
  return rows;
}

function nowTable(found) {
  const backends = unique(found.map((cell) => cell.backend)).sort();
  const rowOf = (cell) => `${cell.device}\u0000${cell.group}`;
  const groups = new Map();
  for (const cell of found) {
    if (!groups.has(rowOf(cell))) groups.set(rowOf(cell), new Map());
    groups.get(rowOf(cell)).set(cell.backend, cell);
  }
  const several = unique(cells.map((cell) => cell.device)).length > 1;
  $("num-cells").textContent = found.length === cells.length ? `${cells.length} cells` : `${found.length} of ${cells.length} cells`;
  $("now").tHead.replaceChildren(el("tr", {}, el("th", {}, "Shape, dtype, features"), ...backends.map((name) => el("th", {}, name))));
  $("now").tBodies[0].replaceChildren(...[...groups].slice(0, shownCells).map(([key, byBackend]) => {
    const [device, group] = key.split("\u0000");
    return el("tr", {}, el("th", { scope: "row" }, group, several ? el("span", { class: "quiet" }, ` ${device}`) : null), ...backends.map((backend) => {
      const cell = byBackend.get(backend);
      if (!cell) return el("td", {});
      const { now } = cell;
      const label = `${soText(now)}${cell.changed ? `, changed ${dateText(runs[now.first].at).slice(0, 10)}` : ""}${isStale(cell) ? ", not in the newest run" : ""}`;
      const button = el("button", { type: "button", class: kindOf(now.status), title: `${cell.name}: ${label}`, "aria-label": `${cell.name}: ${label}`, "aria-pressed": state.id === cell.name ? "true" : null },
        `${sign(now.status)} ${now.status}${now.so < now.members ? ` ${now.so}/${now.members}` : ""}${cell.changed ? " •" : ""}${isStale(cell) ? " ⋯" : ""}`);
      button.addEventListener("click", () => { state.id = cell.name; show(); $("cell").scrollIntoView({ block: "nearest" }); });
      return el("td", {}, button);
    }));
  }));
  const more = $("more-cells");
  more.replaceChildren();
  if (groups.size > shownCells) more.append(el("button", { type: "button", onclick: () => { shownCells = Infinity; show(); } }, `Show all ${groups.size} rows`));
  else if (!groups.size) more.append("No cell matches; take a word or a filter away.");
}

function oneCell() {
  const cell = cells.find((one) => one.name === state.id);
  $("cell").hidden = !cell;
  if (!cell) return;
  $("cell-title").textContent = cell.name;
  $("cell-line").replaceChildren(...cell.stretches.map((stretch) => el("span", {
    class: kindOf(stretch.status), style: `flex-grow:${stretch.last - stretch.first + 1}`, title: `${soText(stretch)}: ${runText(stretch.first)} to ${runText(stretch.last)}`,
  }, `${sign(stretch.status)} ${stretch.status}`)));
  $("cell-list").replaceChildren(...[...cell.stretches].reverse().map((stretch) => el("li", {},
    el("span", { class: kindOf(stretch.status) }, `${sign(stretch.status)} ${soText(stretch)}`), " from ", runLink(stretch.first, runText(stretch.first)),
    ...(stretch.last > stretch.first ? [" to ", runLink(stretch.last, runText(stretch.last))] : []),
    stretch.reasons.length ? `: ${stretch.reasons.join("; ")}` : "", " ", seriesLink(stretch.id, "one of its series"))));
}

function show() {
  writeHash(state.changed ? { ...state, changed: "1" } : state);
  for (const id of ["device", "backend", "status"]) $(id).value = state[id];
  $("search").value = state.q;
  $("changed").checked = state.changed;
  const found = matching();
  changeRows(found);
  nowTable(found);
  oneCell();
}

function route() {
  const hash = readHash();
  Object.assign(state, { id: hash.id || "", q: hash.q || "", device: hash.device || "", backend: hash.backend || "", status: hash.status || "", changed: hash.changed === "1" });
  show();
}

function exportChanges() {
  const rows = matching().flatMap(changesOf).map(({ cell, before, after }) => [runs[after.first].id, runs[after.first].at, runs[after.first].commit, cell.device, cell.backend, cell.group,
    before.status, after.status, after.so, after.members, after.reasons.join("; "), after.id]);
  saveCsv("support-changes.csv", ["run_id", "started_at", "commit", "device", "backend", "group", "before", "after", "series", "of", "reasons", "one_series"], rows);
}
function exportCells() {
  const rows = matching().map((cell) => [cell.device, cell.backend, cell.group, cell.now.status, cell.now.so, cell.now.members, runs[cell.now.first].id, runs[cell.now.last].id, cell.now.reasons.join("; "), cell.now.id]);
  saveCsv("support.csv", ["device", "backend", "group", "status", "series", "of", "since_run", "last_run", "reasons", "one_series"], rows);
}

const options = (values) => [["", "all"], ...values.map((value) => [value, value])];
fillSelect($("device"), options(unique(cells.map((cell) => cell.device)).sort()), "");
fillSelect($("backend"), options(unique(cells.map((cell) => cell.backend)).sort()), "");
fillSelect($("status"), options(ORDER.filter((status) => cells.some((cell) => cell.now.status === status))), "");
$("legend").replaceChildren(...ORDER.map((status) => el("span", {}, el("span", { class: kindOf(status) }, `${sign(status)} ${status}`))), el("span", { class: "quiet" }, "• changed"), el("span", { class: "quiet" }, "⋯ not in the newest run"));
for (const [id, key] of [["search", "q"], ["device", "device"], ["backend", "backend"], ["status", "status"]]) {
  $(id).addEventListener("input", (event) => { state[key] = event.target.value; shownCells = shownChanges = SHOWN; show(); });
}
$("changed").addEventListener("change", (event) => { state.changed = event.target.checked; show(); });
$("export-changes").addEventListener("click", exportChanges);
$("export-cells").addEventListener("click", exportCells);
window.addEventListener("hashchange", route);
route();
