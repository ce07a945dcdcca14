"use strict";

const { runs, stacks } = data().runs;
const AXES = { commit: "Commits", run: "Runs", stack: "Stacks" };
const state = { id: "", quantity: "latency", axis: "commit", range: "", fromZero: false };
let series = null;

// One entry per run, with the run's facts beside the stored values.
function points() {
  const made = series.values.map(([run, status, replicates, confirmations, noise, samples, discarded, reasons]) => ({
    run, status, replicates, confirmations, noise, samples, discarded, reasons,
    at: runs[run].at,
    commit: runs[run].commit,
    commitAt: runs[run].commit_at || runs[run].at,
    subject: runs[run].subject,
    stack: runs[run].stack,
    driver: runs[run].driver,
  }));
  if (state.axis === "commit") made.sort((a, b) => (a.commitAt < b.commitAt ? -1 : a.commitAt > b.commitAt ? 1 : a.run - b.run));
  return made;
}

const stackChange = (before, after) => runChange(runs[before.run], runs[after.run]);

// What a place on the axis is called, in the address too.
function keyOf(point) {
  if (state.axis === "run") return runs[point.run].id;
  return state.axis === "commit" ? point.commit || point.at : runs[point.run].stack_key;
}

// Places along the axis: each a commit, run or stack, with the runs measured there.
function levels() {
  const found = new Map();
  for (const point of points()) {
    const key = keyOf(point);
    if (!found.has(key)) found.set(key, []);
    found.get(key).push(point);
  }
  const made = [...found.values()];
  if (state.axis === "stack") made.sort((a, b) => a[0].run - b[0].run);
  return made;
}

function levelLabel(level, before) {
  const first = level[0];
  if (state.axis === "run") return first.at.slice(0, 10);
  if (state.axis === "commit") return first.commit ? shortCommit(first.commit) : dateText(first.at);
  const changed = before ? stackChange(before[0], first).map((text) => text.replace(/^(\S+) \S+ → /, "$1 ")) : [];
  const shownStack = changed.length ? changed : (stacks[first.stack] || []).filter((e) => /^(torch|triton|vllm)==/.test(e)).map((e) => e.replace("==", " "));
  return [first.stack.slice(0, 7), ...shownStack.slice(0, 3)].join("<br>");
}

function hover(point) {
  const lines = [
    `${shortCommit(point.commit)} ${point.subject}`.trim().slice(0, 90),
    `${runs[point.run].published ? "published " : ""}run ${dateText(point.at)} UTC, stack ${point.stack.slice(0, 7)}`,
    point.status + (point.samples ? `, ${point.samples} samples` : ""),
    ...point.reasons.slice(0, 3),
  ];
  return lines.map(plain).join("<br>");
}

function chart() {
  const { quantity } = state;
  const { label, unit } = info(quantity);
  const value = (seconds) => derived(quantity, seconds, series.identity);
  const style = backendStyle(backendName());
  const all = levels();
  const middles = all.map((level) => {
    const timed = level.filter((p) => isTimed(p.status) && p.replicates.length).map((p) => median(p.replicates));
    return timed.length ? value(median(timed)) : null;
  });
  const dots = { x: [], y: [], text: [] };
  const again = { x: [], y: [], text: [] };
  const lost = { x: [], y: [], text: [] };
  all.forEach((level, x) => level.forEach((point) => {
    const spread = (i, n) => x + (n > 1 ? (i / (n - 1) - 0.5) * 0.24 : 0);
    point.replicates.forEach((seconds, i) => {
      dots.x.push(spread(i, point.replicates.length)); dots.y.push(value(seconds)); dots.text.push(hover(point));
    });
    point.confirmations.forEach((seconds, i) => {
      again.x.push(spread(i, point.confirmations.length)); again.y.push(value(seconds)); again.text.push(`measured again<br>${hover(point)}`);
    });
    if (!isTimed(point.status)) { lost.x.push(x); lost.text.push(hover(point)); }
  }));
  const shown = shownRange(all);
  const isShown = (x) => x >= shown[0] && x <= shown[1];
  const known = [dots, again].flatMap(({ x, y }) => y.filter((one, i) => one !== null && isShown(x[i])));
  const low = known.length ? Math.min(...known) : 0;
  const high = known.length ? Math.max(...known) : 1;
  const pad = (high - low || high || 1) * 0.12;
  const floor = state.fromZero ? 0 : low - pad;
  lost.y = lost.x.map(() => floor + (high + pad - floor) * 0.03);
  const template = `%{y:.4~g} ${unit}<br>%{text}<extra></extra>`;
  const { spans, changes } = levelsOfSeries(all, value);
  const traces = [
    { type: "scatter", mode: "lines+markers", name: "median of the replicates", x: all.map((_, x) => x), y: middles, connectgaps: false, hoverinfo: "skip", line: { color: style.color, width: 2 }, marker: { symbol: "line-ew", size: 14, line: { width: 2.5, color: style.color } } },
    { type: "scatter", mode: "markers", name: "replicate", ...dots, hovertemplate: template, marker: { color: style.color, size: 6, opacity: 0.55 } },
  ];
  if (again.x.length) traces.push({ type: "scatter", mode: "markers", name: "measured again", ...again, hovertemplate: template, marker: { symbol: "diamond-open", size: 9, color: css("--ink"), line: { width: 1.5 } } });
  if (lost.x.length) traces.push({ type: "scatter", mode: "markers", name: "no time", ...lost, hovertemplate: "%{text}<extra></extra>", marker: { symbol: "x", size: 11, color: css("--bad") } });
  if (spans.length) {
    const line = { x: [], y: [] };
    for (const span of spans) { line.x.push(span.x0, span.x1, null); line.y.push(span.middle, span.middle, null); }
    traces.push({ type: "scatter", mode: "lines", name: "level, with nine tenths of its runs", ...line, hoverinfo: "skip", line: { color: css("--ink"), width: 1.5, dash: "dot" } });
  }
  if (state.axis !== "stack" && stackMarks(all).length) {
    traces.push({ type: "scatter", mode: "lines", name: "software or machine changed", x: [null], y: [null], line: { color: css("--quiet"), width: 1.5, dash: "dash" } });
  }
  const labels = all.map((level, i) => levelLabel(level, all[i - 1]));
  const inView = all.map((_, i) => i).filter(isShown);
  const step = Math.max(1, Math.ceil(inView.length / (isNarrow() ? 8 : 24)));
  const ticks = inView.filter((i) => (all.length - 1 - i) % step === 0);
  return {
    traces,
    layout: {
      xaxis: axis({ commit: "commit, by commit time", run: "run, by its start", stack: "stack, by first run" }[state.axis], {
        tickvals: ticks, ticktext: ticks.map((i) => plainLabel(labels[i])), range: shown, zeroline: false, showgrid: false,
        tickangle: state.axis !== "stack" && inView.length > 6 ? -45 : 0,
      }),
      yaxis: axis(`${label} (${unit})`, { range: [floor, high + pad], zeroline: false, fixedrange: true }),
      dragmode: "zoom",
      ...marks(all, spans, changes, isShown),
    },
    onZoom: (range) => zoom(all, range),
    onClick: (clicked) => {
      const level = all[Math.round(clicked.x)];
      if (level && shows("conditions")) location.href = `conditions.html#run=${level[level.length - 1].run}`;
    },
  };
}

const plainLabel = (label) => label.split("<br>").map(plain).join("<br>");

function quantile(values, share) {
  const ordered = [...values].sort((a, b) => a - b);
  const at = (ordered.length - 1) * share;
  const [below, above] = [ordered[Math.floor(at)], ordered[Math.ceil(at)]];
  return below + (above - below) * (at - Math.floor(at));
}

// Which level a run is of: how many changes had begun by then.
const levelOf = (run) => series.changes.filter(([first]) => first <= run).length;

// The levels of the series as stretches of the axis, and where it changed from one to the next.
function levelsOfSeries(all, value) {
  if (state.axis === "stack") return { spans: [], changes: [] };
  const own = points().filter((point) => isTimed(point.status) && point.replicates.length && !runs[point.run].published);
  const medians = new Map();
  for (const point of own) {
    const number = levelOf(point.run);
    if (!medians.has(number)) medians.set(number, []);
    medians.get(number).push(value(median(point.replicates)));
  }
  const spans = [];
  all.forEach((level, x) => {
    const number = levelOf(level[level.length - 1].run);
    const last = spans[spans.length - 1];
    if (last && last.number === number) last.x1 = x + 0.5;
    else if (medians.has(number)) {
      const values = medians.get(number);
      spans.push({ number, x0: x - 0.5, x1: x + 0.5, middle: median(values), low: quantile(values, 0.05), high: quantile(values, 0.95), runs: values.length });
    }
  });
  const place = new Map();
  all.forEach((level, x) => level.forEach((point) => place.set(point.run, x)));
  const changes = series.changes.map(([first, low, high, ratio, p]) => {
    const ends = [place.get(low), place.get(high)].sort((a, b) => a - b);
    return { first, low, high, ratio, p, x: place.get(first) - 0.5, x0: ends[0], x1: ends[1] };
  }).filter((change) => Number.isFinite(change.x) && Number.isFinite(change.x0) && Number.isFinite(change.x1));
  return { spans, changes };
}

// Bands of the levels, where they changed, and a dashed line where software or machine changed.
const NAMED_MARKS = 5;
function marks(all, spans, changes, isShown) {
  const shapes = [];
  const annotations = [];
  const upright = { type: "line", yref: "paper", y0: 0, y1: 1 };
  for (const span of spans) {
    shapes.push({ type: "rect", layer: "below", x0: span.x0, x1: span.x1, y0: span.low, y1: span.high, fillcolor: css("--quiet"), opacity: 0.14, line: { width: 0 } });
  }
  let before = -Infinity;
  let level = 0;
  for (const change of changes) {
    // Beside another one it stands a line higher.
    level = (change.x - before) / Math.max(1, all.length) < (isNarrow() ? 0.35 : 0.08) ? (level + 1) % 3 : 0;
    before = change.x;
    const color = css(change.ratio > 1 ? "--bad" : "--good");
    shapes.push({ type: "rect", layer: "below", yref: "paper", y0: 0, y1: 1, x0: change.x0, x1: change.x1, fillcolor: color, opacity: 0.13, line: { width: 0 } });
    shapes.push({ ...upright, x0: change.x, x1: change.x, line: { width: 2, color } });
    if (isShown(change.x)) annotations.push({ x: change.x, yref: "paper", y: level * 0.09, yanchor: "bottom", xanchor: "center", showarrow: false, font: { size: 12, color }, bgcolor: css("--ground"), text: `${change.ratio > 1 ? "▲" : "▼"} ${changeText(change.ratio)}` });
  }
  if (state.axis !== "stack") {
    const found = stackMarks(all);
    const named = found.filter(({ x }) => isShown(x)).length <= NAMED_MARKS && !isNarrow();
    for (const { x, changed } of found) {
      shapes.push({ ...upright, x0: x, x1: x, line: { dash: "dash", width: 1.5, color: css("--quiet") } });
      const text = named ? plain(changed.length > 2 ? `stack: ${changed.slice(0, 2).join(", ")} …` : `stack: ${changed.join(", ")}`) : "";
      if (text && isShown(x)) annotations.push({ x, yref: "paper", y: 1, yanchor: "top", xanchor: x > all.length / 2 ? "right" : "left", showarrow: false, align: "left", font: { size: 11, color: css("--quiet") }, bgcolor: css("--ground"), text });
    }
  }
  return { shapes, annotations };
}
function stackMarks(all) {
  const found = [];
  all.forEach((level, x) => {
    if (!x) return;
    const changed = stackChange(all[x - 1][all[x - 1].length - 1], level[0]);
    if (changed.length) found.push({ x: x - 0.5, changed, run: level[0].run });
  });
  return found;
}

// The part of the axis that is looked at, by the names of its ends, so that a new night moves nothing.
function shownRange(all) {
  const [from, to] = state.range.split("..").map((name) => (name ? all.findIndex((level) => keyOf(level[0]).startsWith(name)) : -1));
  const first = from >= 0 ? from : 0;
  const last = to >= first ? to : all.length - 1;
  return [first - 0.5, last + 0.5];
}
function zoom(all, range) {
  if (!range) { go({ range: "" }); return; }
  const first = Math.max(0, Math.min(all.length - 1, Math.ceil(Math.min(...range))));
  const last = Math.max(first, Math.min(all.length - 1, Math.floor(Math.max(...range))));
  const name = (x) => (state.axis === "run" ? keyOf(all[x][0]) : keyOf(all[x][0]).slice(0, 12));
  // An open end stays open: the newest run is in sight tomorrow too.
  const ends = [first > 0 ? name(first) : "", last < all.length - 1 ? name(last) : ""];
  go({ range: ends.some(Boolean) ? ends.join("..") : "" });
}
function newestRange(count) {
  const all = levels();
  zoom(all, count && count < all.length ? [all.length - count, all.length - 1] : null);
}

// Changes of level and of software or machine, newest first, with what changed together.
function changeTable() {
  const inOrder = [...series.values].filter(([run]) => !runs[run].published).map(([run]) => run).sort((a, b) => a - b);
  const rows = series.changes.map(([first, low, high, ratio, p]) => {
    const [before, after] = [runs[low], runs[high]];
    const commits = before.commit === after.commit ? [] : [`commits ${shortCommit(before.commit) || "unknown"}..${shortCommit(after.commit) || "unknown"}`];
    const together = [...commits, ...runChange(before, after)];
    return { run: first, kind: `level ${changeText(ratio)}`, slower: ratio > 1, text: together.join(", ") || "nothing that is recorded", low, high, ratio, p };
  });
  inOrder.forEach((run, i) => {
    const changed = i ? runChange(runs[inOrder[i - 1]], runs[run]) : [];
    if (changed.length) rows.push({ run, kind: "environment", text: changed.join(", "), low: inOrder[i - 1], high: run, ratio: null, p: null });
  });
  rows.sort((a, b) => b.run - a.run);
  $("changes").hidden = !rows.length;
  const range = (row) => (row.ratio === null || row.high === row.low ? "" : [" between ", runLink(row.low, dateText(runs[row.low].at)), " and ", runLink(row.high, dateText(runs[row.high].at))]);
  $("changes").querySelector("tbody").replaceChildren(...rows.map((row) => el("tr", {},
    el("td", { class: "tag" }, runLink(row.run, dateText(runs[row.run].at))),
    el("td", { class: "commit" }, shortCommit(runs[row.run].commit)),
    el("td", { class: row.ratio === null ? null : `state ${row.slower ? "bad" : "good"}` }, row.ratio === null ? row.kind : `${row.slower ? "▲" : "▼"} ${row.kind}`),
    el("td", {}, row.text, ...range(row)))));
}

function backendName() {
  const { backend, variant } = series.identity;
  return variant ? `${backend} [${variant}]` : backend;
}

const HEADER = ["started", "commit", "subject", "stack", "status"];
const WIDE = ["subject", "stack"];
let valuesShown = 60;
function table() {
  const { unit } = info(state.quantity);
  const all = points().sort((a, b) => b.run - a.run);
  $("values").tHead.replaceChildren(el("tr", {},
    ...HEADER.map((name) => el("th", { class: WIDE.includes(name) ? "wide" : null }, name)),
    el("th", { class: "number" }, `median (${unit})`),
    el("th", { class: "number" }, `replicates (${unit})`),
    el("th", { class: "number" }, "noise"),
    el("th", {}, "reasons")));
  $("more-values").replaceChildren();
  if (all.length > valuesShown) $("more-values").append(el("button", { type: "button", onclick: () => { valuesShown = Infinity; table(); } }, `Show all ${all.length} runs`));
  $("values").tBodies[0].replaceChildren(...all.slice(0, valuesShown).map((point) => {
    const shown = (seconds) => number(derived(state.quantity, seconds, series.identity));
    const again = point.confirmations.length ? ` | again ${point.confirmations.map(shown).join(" ")}` : "";
    return el("tr", {},
      el("td", { class: "tag" }, runLink(point.run, dateText(point.at)), runs[point.run].published ? " published" : ""),
      el("td", { class: "commit" }, shortCommit(point.commit)),
      el("td", { class: "subject wide" }, point.subject),
      el("td", { class: "commit wide" }, point.stack.slice(0, 7)),
      el("td", {}, point.status),
      el("td", { class: "number", "data-label": "median" }, isTimed(point.status) ? shown(median(point.replicates)) : ""),
      el("td", { class: "number", "data-label": "replicates" }, point.replicates.map(shown).join(" ") + again),
      el("td", { class: "number", "data-label": "noise" }, point.noise === null ? "" : `${(point.noise * 100).toFixed(1)} %`),
      el("td", {}, point.reasons.join("; ")));
  }));
}

function exportCsv() {
  const rows = [];
  // Ceilings are of a run, and a series has many runs: percent of roofline is on the backends page.
  const exported = Object.keys(data().index.quantities).filter((q) => q !== "latency" && q !== "roofline");
  for (const point of points()) {
    const times = [...point.replicates.map((s) => [s, "first"]), ...point.confirmations.map((s) => [s, "again"])];
    for (const [seconds, kind] of times.length ? times : [[null, ""]]) {
      rows.push([runs[point.run].id, point.at, point.commit, point.subject, point.stack, point.status, kind, seconds,
        ...exported.map((q) => (seconds === null ? null : derive(q, seconds, series.identity))),
        point.reasons.join("; ")]);
    }
  }
  const names = { tflop_s: "flop_per_s", gb_s: "bytes_per_s", tokens_s: "tokens_per_s", itl: "itl_attention_s" };
  const derivedNames = exported.map((q) => names[q]);
  saveCsv(`${series.title.replace(/[^A-Za-z0-9._=-]+/g, "_")}.csv`,
    ["run_id", "started_at", "commit", "subject", "stack_id", "status", "look", "median_s", ...derivedNames, "reasons"], rows);
}

function verdictBox() {
  const box = $("verdict");
  const said = series.verdict;
  if (!said) {
    box.className = "verdict small";
    box.replaceChildren(el("p", {}, "This metric is shown, not judged."));
    return;
  }
  box.className = `verdict small ${said.verdict.toLowerCase()}`;
  const interval = said.low === null ? "" : `, 99 % interval ${changeText(said.low)} to ${changeText(said.high)}`;
  const change = said.ratio === null ? "" : `Latency ${changeText(said.ratio)} against ${said.baseline_runs} earlier run${said.baseline_runs === 1 ? "" : "s"}${interval}.`;
  const since = said.since === null ? "" : `Since ${shortCommit(runs[said.since].commit) || "the run"} of ${runs[said.since].at.slice(0, 10)}.`;
  const before = said.status_before && said.ratio === null ? `Status before: ${said.status_before}.` : "";
  box.replaceChildren(
    el("p", { class: "word" }, `${SIGNS[said.verdict]} ${said.verdict}`),
    el("p", {}, [change, before, since, said.note].filter(Boolean).join(" ")),
    el("p", { class: "facts" }, `${said.reasons.map((r) => r.replaceAll("_", " ")).join(", ")} · run of ${dateText(runs[said.run].at)} UTC`));
}

// Graphs of asv's site that show this series, where these pages lie beside it.
function asvLinks() {
  const graphs = (data().asv || {}).graphs || {};
  const { backend, variant, workload } = series.identity;
  const method = [series.key.timer, series.key.l2_state, series.key.execution].filter(Boolean).join("_");
  const wanted = { workload: `'${workload}'`, backend: `'${variant ? `${backend}:${variant}` : backend}'` };
  const found = Object.entries(graphs).filter(([name, axes]) =>
    Object.entries(wanted).every(([axis, value]) => axes[axis].includes(value)) &&
    // The nightly history names what was timed and how; a suite's own graph does not.
    (name.startsWith("nightly.") ? name.endsWith(`.${series.key.metric}.${method}.points`) : name.endsWith(`.track_${series.key.metric}`)))
    .sort(([a], [b]) => Number(b.startsWith("nightly.")) - Number(a.startsWith("nightly.")));
  const query = Object.entries(wanted).map(([axis, value]) => `p-${axis}=${encodeURIComponent(value)}`).join("&");
  $("asv").hidden = !found.length;
  $("asv").replaceChildren("In asv: ", ...found.flatMap(([name], i) => [i ? ", " : "", el("a", { href: `../index.html#${encodeURIComponent(name)}?${query}` }, name)]));
}

// First look, second look, and the build before that took turns with it.
const looks = () => [["first look", series.verdict.replicates, "circle"], ["measured again", series.verdict.confirmations, "diamond-open"], ["the build before, in turn", series.verdict.references, "square-open"]].filter(([, seconds]) => seconds.length);
function processes() {
  const { label, unit } = info("latency");
  const value = (seconds) => derived("latency", seconds, series.identity);
  return {
    traces: looks().map(([name, seconds, symbol], row) => ({
      type: "scatter", mode: "markers", name, x: seconds.map(value), y: seconds.map((_, i) => row + ((i % 5) - 2) * 0.1), hovertemplate: `%{x:.4~g} ${unit}<extra>${name}</extra>`,
      marker: { symbol, size: 9, color: css(`--c${row}`), line: { width: 1.5, color: css(`--c${row}`) } },
    })),
    layout: {
      showlegend: false, xaxis: axis(`${label} (${unit})`),
      yaxis: axis("", { tickvals: looks().map((_, i) => i), ticktext: looks().map(([name]) => name.replace(", ", ",<br>")), range: [looks().length - 0.5, -0.5], zeroline: false, showgrid: false, fixedrange: true }),
    },
  };
}
function night() {
  const isShown = Boolean(series.verdict && series.verdict.confirmations.length);
  $("night").hidden = !isShown;
  if (!isShown) return;
  $("night").querySelector("tbody").replaceChildren(...looks().map(([name, seconds]) => el("tr", {}, el("td", {}, name), el("td", { class: "number", "data-label": "processes" }, seconds.length),
    ...[["lowest", Math.min(...seconds)], ["median", median(seconds)], ["highest", Math.max(...seconds)]].map(([label, one]) => el("td", { class: "number", "data-label": label }, timeText(one))))));
  draw("processes", processes);
}

function related() {
  const own = indexRows().find((row) => row.id === state.id);
  const others = indexRows().filter((row) => row.workload === own.workload && row.id !== own.id);
  $("related").hidden = !others.length;
  $("related").querySelector("tbody").replaceChildren(...others.map((row) => el("tr", {},
    el("td", {}, seriesLink(row.id, row.backend)), el("td", {}, row.metric),
    el("td", { class: "quiet" }, `${row.device}, ${row.how}`),
    el("td", { class: "number" }, timeText(row.latest_s)), el("td", {}, row.status))));
}

function show() {
  const quantities = Object.keys(data().index.quantities).filter((q) => hasQuantity(q, series.identity));
  if (!quantities.includes(state.quantity)) state.quantity = "latency";
  choice($("quantity"), quantities.map((q) => [q, { latency: "Latency", tflop_s: "TFLOP/s", gb_s: "GB/s", tokens_s: "Tokens/s", itl: "ITL" }[q]]), state.quantity, (value) => go({ quantity: value }));
  choice($("axis"), Object.entries(AXES), state.axis, (value) => go({ axis: value, range: "" }));
  const count = levels().length;
  choice($("range"), [[0, "All"], [90, "90"], [30, "30"]].filter(([n]) => n < count), state.range ? -1 : 0, newestRange);
  $("note").textContent = state.quantity === "itl"
    ? `ITL here is attention only: seconds per decode step times ${series.identity.num_layers} layer${series.identity.num_layers === 1 ? "" : "s"}. Linear layers, sampling and scheduling come on top.`
    : state.quantity === "tokens_s" ? "Query tokens of one call over the time of one layer." : "";
  draw("history", chart);
  table();
}

// What is shown is in the address, so that it can be sent to somebody.
function go(change) {
  Object.assign(state, change);
  const words = [state.id, state.quantity !== "latency" && `q=${state.quantity}`, state.axis !== "commit" && `x=${state.axis}`, state.range && `r=${encodeURIComponent(state.range)}`].filter(Boolean);
  history.replaceState(null, "", `#${words.join("&")}`);
  show();
}

// A series may also be named: `#backend=CPU_ATTN&workload=16q1s4k dtype=fp32&metric=attention`.
function namedSeries(hash) {
  if (!hash.workload) return "";
  const found = indexRows().filter((row) => row.workload === hash.workload && (!hash.backend || row.backend === hash.backend) && row.metric === (hash.metric || "attention"));
  return found.length ? found[0].id : "";
}

async function route() {
  const hash = readHash();
  state.id = hash.id || namedSeries(hash);
  state.quantity = hash.q in data().index.quantities ? hash.q : "latency";
  state.axis = hash.x in AXES ? hash.x : "commit";
  state.range = hash.r || "";
  const known = /^[0-9a-f]{16}$/.test(state.id);
  let chunk = null;
  try {
    const name = state.id.slice(0, data().index.chunk_digits) || "all";
    chunk = known ? await loadData(`series-${name}`) : null;
    // Values of the older runs have a file of their own, which does not change every night.
    if (chunk && chunk[state.id] && chunk[state.id].older) {
      const older = (await loadData(`values-${name}`))[state.id] || [];
      chunk[state.id] = { ...chunk[state.id], older: false, values: [...older, ...chunk[state.id].values] };
    }
  } catch (error) {
    chunk = null;
  }
  series = chunk ? chunk[state.id] : null;
  $("one").hidden = !series;
  $("finder").hidden = Boolean(series);
  if (!series) return;
  const { identity, key } = series;
  document.title = `${series.title} · ${data().index.title}`;
  $("title").textContent = series.title;
  $("facts").textContent = [
    key.metric, identity.phase, `${identity.num_reqs} request${identity.num_reqs === 1 ? "" : "s"}`, identity.shape || `${identity.num_heads}/${identity.num_kv_heads} heads`,
    `head size ${identity.head_size}`, `${identity.dtype}, KV ${identity.kv_cache_dtype}, block ${identity.block_size}`,
    key.device_class, key.timer ? `timer ${key.timer}` : "", key.l2_state ? `L2 ${key.l2_state}` : "", key.execution, `protocol ${key.protocol_version}`,
  ].filter(Boolean).join(" · ");
  $("again").textContent = series.again;
  verdictBox();
  related();
  changeTable();
  asvLinks();
  night();
  show();
}

$("export").addEventListener("click", exportCsv);
$("from-zero").addEventListener("change", (event) => { state.fromZero = event.target.checked; draw("history", chart); });
window.addEventListener("hashchange", route);
route();
