"use strict";

const { runs } = data().runs;
const rule = data().compare;
const index = indexRows();
const ways = unpacked(rule.series);
const SHOWN = 200;
const ORDER = ["REGRESSION", "IMPROVEMENT", "UNCHANGED", "UNDECIDED", "INVALID"];
const state = { a: "", b: "", q: "", backend: "", phase: "", verdict: "", metric: "", sort: "", down: false };
let compared = [];
let shown = SHOWN;

const hasTimes = (number) => number >= rule.first_run;
const kept = runs.map((run, number) => ({ ...run, number })).filter((run) => hasTimes(run.number));

// What a word stands for, as `find_side` of attnbench/history/comparison.py says.
function findSide(text) {
  const found = new Map();
  for (const run of kept) {
    for (const [kind, name] of [["run", run.id], ["commit", run.commit], ["stack", text.includes("-") ? run.stack_key : run.stack]]) {
      if (name && (name === text || (text.length >= 4 && name.startsWith(text)))) {
        const key = `${kind} ${name}`;
        if (!found.has(key)) found.set(key, { kind, name, runs: [] });
        found.get(key).runs.push(run.number);
      }
    }
  }
  const exact = [...found.values()].filter((side) => side.name === text);
  const named = exact.length ? exact : [...found.values()];
  if (named.length > 1) throw new Error(`${text} names several things: ${[...found.keys()].slice(0, 4).join(", ")}.`);
  if (!named.length) throw new Error(`${text} is no run, commit or stack of the newest ${kept.length} runs, which these pages have; attnbench compare knows all.`);
  return named[0];
}

function options() {
  const group = (label, entries) => (entries.length ? el("optgroup", { label }, ...entries.map(([value, text]) => el("option", { value }, text))) : null);
  const newest = [...kept].reverse();
  const first = (key) => unique(newest.map((run) => run[key]).filter(Boolean)).map((name) => newest.find((run) => run[key] === name));
  const count = (key, name) => { const n = kept.filter((run) => run[key] === name).length; return n > 1 ? `, ${n} runs` : ""; };
  return [
    group("Commits", first("commit").map((run) => [run.commit, `${shortCommit(run.commit)} ${run.subject}`.slice(0, 80) + count("commit", run.commit)])),
    group("Stacks", first("stack").map((run) => [run.stack, `${run.stack.slice(0, 7)} ${(data().runs.stacks[run.stack] || []).filter((entry) => /^(torch|triton|vllm|flashinfer)/.test(entry)).join(" ")}`.slice(0, 80) + count("stack", run.stack)])),
    group("Runs", newest.map((run) => [run.id, `${dateText(run.at)} ${run.device} ${shortCommit(run.commit)}${run.published ? " published" : ""}`])),
  ].filter(Boolean);
}

// The two newest runs that may be compared: of one device, and of one's own where there are any.
function usual() {
  const own = kept.filter((run) => !run.published);
  const newest = (own.length ? own : kept)[(own.length ? own : kept).length - 1];
  const before = kept.filter((run) => run.number < newest.number && run.device === newest.device && !run.published);
  const alike = before.filter((run) => run.suites.join() === newest.suites.join());
  const chosen = alike.length ? alike : before;
  return [chosen.length ? chosen[chosen.length - 1].id : newest.id, newest.id];
}

const timesOf = new Map();
async function load(number) {
  if (!timesOf.has(number)) timesOf.set(number, await loadData(`times-${number}`));
  return timesOf.get(number);
}
function valuesOf(side, position) {
  return side.runs.map((number) => timesOf.get(number)).filter((times) => times.status[position] >= 0).map((times) => ({
    status: times.status[position],
    first: times.first[position] || [],
    again: times.again[position] || [],
  }));
}

const wayOf = (name, position) => ways[name][position];
const differing = (i, j) => rule.ways.filter((name) => wayOf(name, i) !== wayOf(name, j));

function compareSides(a, b) {
  const rows = [];
  const loneA = [];
  const loneB = [];
  index.forEach((one, position) => {
    const [ofA, ofB] = [valuesOf(a, position), valuesOf(b, position)];
    if (ofA.length && ofB.length) {
      rows.push({ ...one, ...compareValues(ofA, ofB, rule.timers[wayOf("timer", position)], rule), note: "" });
    } else if (ofA.length) loneA.push(position);
    else if (ofB.length) loneB.push(position);
  });
  // One point measured in two ways: refused, and the fields named.
  const byPoint = new Map();
  const place = (position) => `${ways.point[position]} ${index[position].metric}`;
  for (const position of loneB) byPoint.set(place(position), [...(byPoint.get(place(position)) || []), position]);
  const paired = new Set();
  const onlyA = [];
  for (const position of loneA) {
    const others = byPoint.get(place(position)) || [];
    if (!others.length) { onlyA.push(position); continue; }
    const other = others.reduce((best, one) => (differing(position, one).length < differing(position, best).length ? one : best));
    others.forEach((one) => paired.add(one));
    const names = differing(position, other);
    rows.push({ ...index[other], verdict: "INVALID", reason: names.map((name) => `incomparable:${name}`).join(", "), found: null, a_s: null, b_s: null, a_status: null, b_status: null,
      note: names.map((name) => `${name} (${wayOf(name, position) || "none"}, ${wayOf(name, other) || "none"})`).join("; ") });
  }
  return { rows, onlyA, onlyB: loneB.filter((position) => !paired.has(position)) };
}

const statusText = (row) => (row.a_status === null ? "" : row.a_status === row.b_status ? rule.statuses[row.b_status] : `${rule.statuses[row.a_status]} → ${rule.statuses[row.b_status]}`);
const percentText = (ratio) => `${ratio < 1 ? "−" : "+"}${(Math.abs(ratio - 1) * 100).toFixed(1)}`;
const intervalText = (row) => (row.found && row.found.enough ? `[${percentText(row.found.low)}, ${percentText(row.found.high)}]` : "");

const COLUMNS = [
  { name: "verdict", label: "Verdict", value: (row) => ORDER.indexOf(row.verdict), cell: (row) => verdictTag(row.verdict) },
  { name: "ratio", label: "B / A", kind: "number", value: (row) => row.found && row.found.ratio, cell: (row) => changeText(row.found && row.found.ratio) },
  { name: "interval", label: "interval (%)", kind: "number", value: (row) => row.found && row.found.low, cell: intervalText },
  { name: "backend", label: "Backend", value: (row) => row.backend, cell: (row) => seriesLink(row.id, row.backend) },
  { name: "workload", label: "Workload", value: (row) => row.workload, cell: (row) => seriesLink(row.id, row.workload) },
  { name: "how", label: "Device, timer", kind: "quiet wide", value: (row) => `${row.device}, ${row.how}`, cell: (row) => `${row.device}, ${row.how}` },
  { name: "a_s", label: "A", kind: "number", value: (row) => row.a_s, cell: (row) => timeText(row.a_s) },
  { name: "b_s", label: "B", kind: "number", value: (row) => row.b_s, cell: (row) => timeText(row.b_s) },
  { name: "status", label: "Status", value: statusText, cell: statusText },
  { name: "reason", label: "Why", kind: "wide", value: (row) => row.reason, cell: (row) => (row.note || row.reason.replaceAll("_", " ")) },
];

function matching() {
  const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
  const found = compared.filter((row) =>
    (!state.backend || row.backend === state.backend) && (!state.phase || row.phase === state.phase) &&
    (!state.verdict || row.verdict === state.verdict) && (!state.metric || row.metric === state.metric) &&
    words.every((word) => row.line.includes(word)));
  const column = COLUMNS.find((one) => one.name === state.sort);
  return column ? sorted(found, column, state.down) : found;
}

function table() {
  const found = matching();
  $("count").textContent = found.length === compared.length ? `${compared.length}` : `${found.length} of ${compared.length}`;
  sortableHead($("points"), COLUMNS, state, (name) => { state.down = state.sort === name && !state.down; state.sort = name; remember(); table(); });
  $("points").tBodies[0].replaceChildren(...found.slice(0, shown).map((row) =>
    el("tr", {}, ...COLUMNS.map(({ kind, label, cell }) => el("td", { class: kind || null, "data-label": kind === "number" ? label : null }, cell(row))))));
  $("more").replaceChildren();
  if (found.length > shown) $("more").append(el("button", { type: "button", onclick: () => { shown = Infinity; table(); } }, `Show all ${found.length}`));
  else if (!found.length) $("more").append("No point matches; take a word or a filter away.");
}

function chart() {
  const found = matching().filter((row) => row.found);
  const backends = unique(found.map((row) => row.backend)).sort();
  const widest = Math.max(1.02, found.reduce((most, row) => Math.max(most, row.found.ratio, 1 / row.found.ratio), 1)) * 1.03;
  const place = new Map(backends.map((backend, i) => [backend, i]));
  const { dots, left } = strip(found, { value: (row) => row.found.ratio, line: (row) => place.get(row.backend), alike: (row) => row.verdict, widest });
  $("ratios-note").textContent = left ? `${found.length} points; ${left} dots that would lie on others of the same verdict are not drawn.` : "";
  const plainRow = (row) => row.verdict === "UNCHANGED" || row.verdict === "UNDECIDED";
  return {
    traces: backends.map((backend) => {
      const own = dots.filter(({ row }) => row.backend === backend);
      const style = backendStyle(backend);
      return {
        type: "scatter", mode: "markers", name: plain(backend), x: own.map(({ row }) => row.found.ratio), y: own.map(({ y }) => y),
        text: own.map(({ row }) => `${plain(row.backend)}<br>${plain(row.workload)}<br>${changeText(row.found.ratio)} ${intervalText(row)}  ${row.verdict}`), customdata: own.map(({ row }) => row.id),
        hovertemplate: "%{text}<extra></extra>",
        marker: { color: style.color, symbol: style.symbol, size: own.map(({ row }) => (plainRow(row) ? 8 : 12)), opacity: own.map(({ row }) => (plainRow(row) ? 0.65 : 1)) },
      };
    }),
    layout: {
      showlegend: false,
      xaxis: axis(isNarrow() ? "B / A (log scale)" : "latency, B over A (log scale); to the right B is slower", { type: "log", range: [-Math.log10(widest), Math.log10(widest)], tickformat: ".3~g" }),
      yaxis: axis("", { tickvals: backends.map((_, i) => i), ticktext: backends.map(plain), range: [backends.length - 0.5, -0.5], zeroline: false, showgrid: false }),
      shapes: [{ type: "line", x0: 1, x1: 1, yref: "paper", y0: 0, y1: 1, line: { color: css("--quiet"), width: 1 } }],
      annotations: found.length ? [] : [{ text: "no point was timed on both sides", showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5 }],
    },
    onClick: (point) => { if (shows("series")) location.href = `series.html#${point.customdata}`; },
  };
}

function exportCsv() {
  const rows = matching().map((row) => [row.verdict, row.found && row.found.ratio, row.found && row.found.enough ? row.found.low : null, row.found && row.found.enough ? row.found.high : null,
    row.backend, row.workload, row.metric, row.device, row.how, row.a_s, row.b_s, row.a_status === null ? "" : rule.statuses[row.a_status], row.b_status === null ? "" : rule.statuses[row.b_status], row.reason, row.note, row.id]);
  saveCsv(`compare-${state.a.slice(0, 12)}-${state.b.slice(0, 12)}.csv`.replace(/[^A-Za-z0-9._-]+/g, "_"),
    ["verdict", "ratio", "low", "high", "backend", "workload", "metric", "device", "how", "a_s", "b_s", "a_status", "b_status", "reason", "note", "series"], rows);
}

function texts(a, b, onlyA, onlyB) {
  const sideText = (name, side) => {
    const newest = runs[side.runs[side.runs.length - 1]];
    return [`${name}: ${side.kind === "run" ? "the run of " : `${side.kind} ${side.name.slice(0, 12)}, ${side.runs.length} run${side.runs.length === 1 ? "" : "s"}, newest `}`, runLink(side.runs[side.runs.length - 1], dateText(newest.at)),
      ` UTC, commit ${shortCommit(newest.commit) || "unknown"} ${newest.subject}, ${newest.device}`];
  };
  $("sides-text").replaceChildren(...sideText("A", a), el("br"), ...sideText("B", b));
  const changed = runChange(runs[a.runs[a.runs.length - 1]], runs[b.runs[b.runs.length - 1]]);
  $("stack-text").hidden = !changed.length;
  $("stack-text").textContent = `Their software or machine differs: ${changed.join(", ")}.`;
  const timed = compared.filter((row) => row.found && (!state.metric || row.metric === state.metric));
  const counts = ORDER.map((name) => [name, compared.filter((row) => row.verdict === name && (!state.metric || row.metric === state.metric)).length]).filter(([, count]) => count);
  const mean = timed.length ? Math.exp(timed.reduce((sum, row) => sum + Math.log(row.found.ratio), 0) / timed.length) : null;
  const summary = [];
  counts.forEach(([name, count], i) => summary.push(i ? ", " : "", `${count} `, verdictTag(name)));
  if (mean !== null) summary.push(`. Geometric mean of B / A over ${timed.length} timed points: ${changeText(mean)}.`);
  $("summary-text").replaceChildren(...summary);
  const lone = [...onlyA.map((position) => ["A", position]), ...onlyB.map((position) => ["B", position])];
  $("lone").hidden = !lone.length;
  $("lone").querySelector(".tally").textContent = `${onlyA.length} of A, ${onlyB.length} of B`;
  $("lone").querySelector("tbody").replaceChildren(...lone.slice(0, SHOWN).map(([side, position]) => el("tr", {}, el("td", {}, side),
    el("td", {}, seriesLink(index[position].id, index[position].backend)), el("td", {}, index[position].workload), el("td", { class: "quiet" }, `${index[position].device}, ${index[position].how}`))));
  $("lone").querySelector("p.quiet").textContent = lone.length > SHOWN ? `and ${lone.length - SHOWN} more` : "";
  $("command").textContent = `attnbench compare ${state.a} ${state.b}`;
}

function fill(id, values) {
  fillSelect($(id), [["", "all"], ...values.map((value) => [value, value])], state[id]);
  $(id).value = state[id];
}

function remember() {
  writeHash({ ...state, down: state.down ? "1" : "", metric: state.metric === "attention" ? "" : state.metric || "all" });
}

let sidesShown = "";
async function show() {
  for (const id of ["a", "b"]) {
    if ([...$(id).options].some((option) => option.value === state[id])) $(id).value = state[id];
  }
  $("search").value = state.q;
  const wanted = `${state.a} ${state.b}`;
  if (wanted !== sidesShown) {
    try {
      const [a, b] = [findSide(state.a), findSide(state.b)];
      $("a").value = a.name;
      $("b").value = b.name;
      if (a.runs.join() === b.runs.join()) throw new Error("A and B are the same runs; choose two different ones.");
      await Promise.all([...a.runs, ...b.runs].map(load));
      // Another choice may have been made while these were loading.
      if (wanted !== `${state.a} ${state.b}`) return;
      const { rows, onlyA, onlyB } = compareSides(a, b);
      compared = rows.map((row) => ({ ...row, line: [row.backend, row.workload, row.shape, row.dtype, row.phase, row.metric, row.device, row.how, row.verdict, row.reason, statusText(row)].join(" ").toLowerCase() }));
      compared.sort((r, s) => ORDER.indexOf(r.verdict) - ORDER.indexOf(s.verdict) || (s.found ? s.found.ratio : 0) - (r.found ? r.found.ratio : 0));
      if (!compared.length) throw new Error("A and B share no point; measure the same suite on both sides.");
      $("problem").hidden = true;
      $("result").hidden = false;
      fill("backend", unique(compared.map((row) => row.backend)).sort());
      fill("phase", unique(compared.map((row) => row.phase)).sort());
      fill("verdict", unique(compared.map((row) => row.verdict)));
      fill("metric", unique(compared.map((row) => row.metric)).sort());
      texts(a, b, onlyA, onlyB);
      sidesShown = wanted;
    } catch (error) {
      $("problem").textContent = error.message;
      $("problem").hidden = false;
      $("result").hidden = true;
      sidesShown = "";
      return;
    }
  }
  for (const id of ["backend", "phase", "verdict", "metric"]) $(id).value = state[id];
  table();
  draw("ratios", chart);
}

function route() {
  const hash = readHash();
  const [a, b] = usual();
  Object.assign(state, { a: hash.a || a, b: hash.b || b, q: hash.q || "", backend: hash.backend || "", phase: hash.phase || "", verdict: hash.verdict || "", sort: hash.sort || "", down: hash.down === "1" });
  state.metric = hash.metric === "all" ? "" : hash.metric || "attention";
  if (!index.some((row) => row.metric === state.metric)) state.metric = "";
  shown = SHOWN;
  show();
}

for (const id of ["a", "b", "backend", "phase", "verdict", "metric"]) {
  $(id).addEventListener("input", (event) => { state[id] = event.target.value; shown = SHOWN; remember(); show(); });
}
$("search").addEventListener("input", (event) => { state.q = event.target.value; shown = SHOWN; remember(); show(); });
$("swap").addEventListener("click", () => { [state.a, state.b] = [state.b, state.a]; remember(); show(); });
$("export").addEventListener("click", exportCsv);
$("confidence").textContent = `${rule.confidence * 100} %`;
$("kept").textContent = `${kept.length} of ${runs.length} runs`;
if (kept.length) {
  $("a").replaceChildren(...options());
  $("b").replaceChildren(...options());
  window.addEventListener("hashchange", route);
  route();
}
