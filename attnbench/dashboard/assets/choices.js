"use strict";

const { maps, regret: regrets, advice } = data().choices;
const whereOf = (one) => `${one.device}, ${one.how.slice(one.how.indexOf(", ") + 2)}`;
const sliceKey = (one) => `${one.phase}-${one.query}`;
const sliceLabel = (one) => (one.query > 1 ? `${one.phase}, ${number(one.query)} new tokens` : one.phase);
const hash = () => new URLSearchParams(location.hash.slice(1));
const state = { where: "", layer: "", slice: "", cell: "", batch: "", axis: "commit", every: "" };
const find = (list, value) => (list.includes(value) ? value : list[0] || "");

// The same winner has the same colour in all maps. More than seven could not be told apart: the rest are grey, and named.
const winners = new Map();
for (const cell of maps.flatMap((map) => map.cells)) if (cell.winner) winners.set(cell.winner, (winners.get(cell.winner) || 0) + 1);
const colored = [...winners.keys()].sort((a, b) => winners.get(b) - winners.get(a) || (a < b ? -1 : 1)).slice(0, 7);
const colorOf = (name) => (colored.includes(name) ? `var(--c${colored.indexOf(name)})` : "var(--quiet)");

const stored = () => [...maps, ...regrets];
const mine = (one) => whereOf(one) === state.where && one.layer === state.layer;
const currentMap = () => maps.find((one) => mine(one) && sliceKey(one) === state.slice);
const currentRegret = () => regrets.find(mine);

function tokensText(tokens) {
  if (tokens >= 1024 && tokens % 1024 === 0) return `${tokens / 1024}k`;
  return String(tokens);
}
const count = (value) => value.toLocaleString("en-US");
function estimateText(found) {
  if (!found || found.ratio === null) return "";
  return changeText(found.ratio) + (found.low === null ? "" : ` [${changeText(found.low)}, ${changeText(found.high)}]`);
}
// One line under the winner's name: how clearly it wins.
const KINDS = { decided: "", tie: "tie", open: "open", "only one": "", "not measured": "none" };
function howText(cell) {
  if (cell.verdict === "tie") return `= tie of ${cell.tied.length}${cell.margin ? `, ${changeText(cell.margin.ratio)}` : ""}`;
  if (cell.verdict === "open") return `? open${cell.margin ? `, ${changeText(cell.margin.ratio)}` : ""}`;
  if (cell.verdict === "decided") return changeText(cell.margin.ratio);
  return cell.verdict === "only one" ? "the only one" : "";
}
// 2 % is faint, 50 % and more is the deepest that text can still be read on.
const depth = (cell) => (cell.verdict === "decided" ? 12 + 33 * Math.min(1, Math.log(cell.margin.ratio) / Math.log(1.5)) : 12);

// A trace's batches bring lengths of their own: where there is a grid, what is no part of it is asked for.
function shownCells(map) {
  if (state.every) return map.cells;
  const sizes = new Map();
  for (const cell of map.cells) sizes.set(cell.tokens, (sizes.get(cell.tokens) || 0) + 1);
  const grid = map.cells.filter((cell) => sizes.get(cell.tokens) > 1);
  return grid.length ? grid : map.cells;
}
function mapTable() {
  const map = currentMap();
  $("map-section").hidden = !map;
  $("crossovers-section").hidden = !map || !map.crossovers.length;
  if (!map) return;
  const shown = shownCells(map);
  const columns = unique(shown.map((cell) => cell.tokens)).sort((a, b) => a - b);
  const lines = unique(shown.map((cell) => cell.requests)).sort((a, b) => a - b);
  const hidden = map.cells.length - shown.length;
  $("every-label").hidden = !hidden && !state.every;
  $("every").checked = Boolean(state.every);
  const along = map.phase === "prefill" ? "tokens of each prompt" : "tokens of each sequence, the new ones included";
  $("map-note").textContent = `Downwards: requests in the batch; across: ${along}. Per cent: how much longer the next backend takes, of a tie the first outside it. ${map.published ? "From a published run. " : ""}${hidden ? `${hidden} cells of lengths that one batch size alone was measured at are not shown. ` : ""}${[map.driver && `driver ${map.driver}`, ...map.versions, ...map.notes].filter(Boolean).join(", ")}`;
  $("map").tHead.replaceChildren(el("tr", {}, el("th", {}, "Requests"), ...columns.map((tokens) => el("th", {}, tokensText(tokens)))));
  $("map").tBodies[0].replaceChildren(...lines.map((requests) => el("tr", {}, el("th", { scope: "row" }, requests), ...columns.map((tokens) => {
    const cell = shown.find((one) => one.requests === requests && one.tokens === tokens);
    if (!cell) return el("td", {});
    const key = `${requests}x${tokens}`;
    return el("td", {}, el("button", {
      type: "button",
      class: KINDS[cell.verdict],
      style: `--winner:${colorOf(cell.winner)};--depth:${depth(cell).toFixed(0)}%`,
      "data-cell": key,
      "aria-pressed": key === state.cell ? "true" : null,
      title: cell.workload,
      onclick: () => { state.cell = key; keep(); mapTable(); },
    }, el("span", {}, cell.winner || "none"), el("span", { class: "how" }, howText(cell))));
  }))));
  const entry = (style, kind, text) => el("span", {}, el("span", { class: `swatch ${kind}`, style }), text);
  const present = colored.filter((name) => shown.some((cell) => cell.winner === name));
  const verdicts = unique(shown.map((cell) => cell.verdict));
  $("map-legend").replaceChildren(
    ...present.map((name) => entry(`background:${colorOf(name)}`, "", name)),
    ...(verdicts.includes("tie") ? [entry("", "tie", "= a tie: the difference is inside the noise")] : []),
    ...(verdicts.includes("open") ? [entry("", "open", "? open: measured too little to say")] : []));
  cellView(map);
  $("crossovers").tBodies[0].replaceChildren(...map.crossovers.map((one) => el("tr", {},
    el("td", {}, one.axis === "requests" ? "requests" : `tokens of ${one.axis}`), el("td", {}, fixedText(one)), el("td", {}, one.below), el("td", {}, one.above),
    el("td", { class: "number" }, `${count(one.low)} … ${count(one.high)}`), el("td", { class: "number" }, count(Math.round(one.at))))));
  labelCells($("crossovers"));
}
const fixedText = (one) => Object.entries(one.fixed).map(([name, value]) => `${name} ${count(value)}`).join(", ");

// The series of a time, where the pages have it.
let seriesOf = null;
function seriesId(line, device) {
  if (!seriesOf) {
    seriesOf = new Map(indexRows().filter((row) => row.metric === "attention").map((row) => [[row.backend, row.workload, row.device].join("\u0000"), row.id]));
  }
  return seriesOf.get([line.series, line.workload, device].join("\u0000"));
}
function cellView(map) {
  const cell = map.cells.find((one) => `${one.requests}x${one.tokens}` === state.cell);
  $("cell").hidden = !cell;
  if (!cell) return;
  $("cell-title").textContent = `${cell.workload}: ${cell.winner ? `${cell.winner} ${howText(cell)}` : "not measured"}`;
  const rows = cell.lines.map((line) => {
    const id = seriesId(line, map.device);
    return el("tr", {}, el("td", {}, id ? seriesLink(id, line.backend) : line.backend), el("td", { class: "number" }, timeText(line.seconds)),
      el("td", { class: "number" }, line.standing === "winner" ? "" : estimateText(line)), el("td", {}, line.standing));
  });
  const head = el("thead", {}, el("tr", {}, el("th", {}, "Backend"), el("th", { class: "number" }, "Time of a layer"), el("th", { class: "number" }, "Over the winner"), el("th", {}, "Standing")));
  $("cell-body").replaceChildren(
    el("div", { class: "scroll" }, el("table", { class: "stacked" }, head, el("tbody", {}, ...rows))),
    ...(cell.excluded.length ? [el("p", {}, "Not chosen from: ", el("button", { id: "export-excluded", type: "button", onclick: exportExcluded }, "Export CSV of all cells")), el("ul", {}, ...cell.excluded.map((one) => el("li", {}, `${one.backend}: ${one.why}`)))] : []));
  labelCells($("cell-body").querySelector("table"));
}

function exportMap() {
  const map = currentMap();
  const head = ["device", "how", "layer", "phase", "requests", "sequence_tokens", "workload", "verdict", "winner", "backend", "seconds", "standing", "over_winner", "low", "high"];
  saveCsv("winners.csv", head, map.cells.flatMap((cell) => cell.lines.map((line) =>
    [map.device, map.how, map.layer, map.phase, cell.requests, cell.tokens, line.workload, cell.verdict, cell.winner, line.backend, line.seconds, line.standing, line.ratio, line.low, line.high])));
}
function exportExcluded() {
  const map = currentMap();
  saveCsv("not-chosen-from.csv", ["device", "how", "layer", "phase", "requests", "sequence_tokens", "workload", "backend", "why"],
    map.cells.flatMap((cell) => cell.excluded.map((one) => [map.device, map.how, map.layer, map.phase, cell.requests, cell.tokens, cell.workload, one.backend, one.why])));
}
function exportCrossovers() {
  const map = currentMap();
  saveCsv("crossovers.csv", ["device", "how", "layer", "along", "at", "below", "above", "low", "high", "interpolated"],
    map.crossovers.map((one) => [map.device, map.how, map.layer, one.axis, fixedText(one), one.below, one.above, one.low, one.high, one.at]));
}

function keep() {
  const kept = new URLSearchParams();
  for (const [name, value] of Object.entries(state)) if (value && !(name === "axis" && value === "commit")) kept.set(name, value);
  history.replaceState(null, "", `#${kept}`);
}
function show() {
  const all = stored();
  $("stored").hidden = !all.length;
  if (!all.length) return;
  const wheres = unique(all.map(whereOf)).sort();
  state.where = find(wheres, state.where);
  fillSelect($("where"), wheres.map((one) => [one, one]), state.where);
  const layers = unique(all.filter((one) => whereOf(one) === state.where).map((one) => one.layer)).sort();
  state.layer = find(layers, state.layer);
  fillSelect($("layer"), layers.map((one) => [one, one]), state.layer);
  const slices = maps.filter(mine);
  state.slice = find(slices.map(sliceKey), state.slice);
  choice($("slice"), slices.map((one) => [sliceKey(one), sliceLabel(one)]), state.slice, (value) => { state.slice = value; state.cell = ""; show(); });
  const madeUp = all.some((one) => mine(one) && one.made_up);
  $("made-up").hidden = !madeUp;
  $("map-frame").classList.toggle("made-up", madeUp);
  mapTable();
  showRegret();
  keep();
}
function follow() {
  const now = hash();
  for (const name of Object.keys(state)) state[name] = now.get(name) || (name === "axis" ? "commit" : "");
  show();
}
for (const name of ["where", "layer"]) {
  $(name).addEventListener("input", () => { state[name] = $(name).value; state.cell = ""; state.batch = ""; show(); });
}
$("every").addEventListener("input", () => { state.every = $("every").checked ? "1" : ""; show(); });
$("export-map").addEventListener("click", exportMap);
$("export-crossovers").addEventListener("click", exportCrossovers);
window.addEventListener("hashchange", follow);
