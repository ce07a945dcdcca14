"use strict";

const { runs, stacks } = data().runs;
const UNTIMED_SHOWN = 50;
let current = runs.length - 1;
let details = null;

function facts(id, pairs) {
  $(id).replaceChildren(...pairs.filter(([, value]) => value !== "" && value !== null && value !== undefined)
    .flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
}
function tally(values) {
  const counts = new Map();
  for (const value of values) if (value) counts.set(value, (counts.get(value) || 0) + 1);
  return [...counts].sort((a, b) => b[1] - a[1]).map(([value, count]) => `${count} ${value}`).join(", ");
}

const UNITS = [["_bytes", 1 / 2 ** 30, "GiB"], ["_hz", 1e-9, "GHz"], ["_c", 1, "°C"], ["_w", 1, "W"], ["_s", 1, "s"], ["_percent", 1, "%"]];
function conditionInfo(key) {
  for (const [ending, scale, unit] of UNITS) {
    if (key.endsWith(ending)) return { name: key.slice(0, -ending.length).replaceAll("_", " "), scale, unit };
  }
  return { name: key.replaceAll("_", " "), scale: 1, unit: key.startsWith("load") ? "processes" : "" };
}
const conditionKeys = () => unique([...details.before, ...details.after].flatMap((values) => Object.keys(values))).sort();
const rowName = (i) => `${plain(details.backend[i])}<br>${plain(details.workload[i])}, ${plain(details.metric[i])}, replicate ${details.replicate[i]}`;

// Of very many rows a chart draws those that its picture is made of; the table below has all.
const MOST_DRAWN = 2000;
const drawnNote = (count) => (count ? "Of very many rows the lowest and highest of each moment are drawn." : "");

// The lowest and the highest of each of MOST_DRAWN / 4 stretches of the rows, which are in order of time.
function outline(rows, value) {
  if (rows.length <= MOST_DRAWN) return rows;
  const stretch = Math.ceil(rows.length / (MOST_DRAWN / 4));
  const kept = [];
  for (let from = 0; from < rows.length; from += stretch) {
    const own = rows.slice(from, from + stretch);
    const lowest = own.reduce((a, b) => (value(b) < value(a) ? b : a));
    const highest = own.reduce((a, b) => (value(b) > value(a) ? b : a));
    kept.push(...unique([lowest, highest]).sort((a, b) => a - b));
  }
  return kept;
}

function during() {
  const key = $("condition").value;
  const { name, scale, unit } = conditionInfo(key);
  let left = 0;
  const side = (label, values, style) => {
    const all = values.map((_, i) => i).filter((i) => key in values[i]);
    const at = outline(all, (i) => values[i][key]);
    left += all.length - at.length;
    return {
      type: "scatter", mode: "markers", name: label,
      x: at.map((i) => details.started_at[i]), y: at.map((i) => values[i][key] * scale),
      text: at.map(rowName), hovertemplate: `%{y:.4~g} ${unit}<br>%{text}<extra></extra>`, marker: style,
    };
  };
  const traces = [
    side("before a point", details.before, { color: css("--c0"), symbol: "circle", size: 7 }),
    side("after it", details.after, { color: css("--c1"), symbol: "diamond-open", size: 8 }),
  ];
  $("during-note").textContent = drawnNote(left);
  return { traces, layout: { xaxis: axis("time (UTC)", isNarrow() ? { nticks: 4 } : {}), yaxis: axis(unit ? `${name} (${unit})` : name) } };
}

function noise() {
  const timed = details.noise.map((_, i) => i).filter((i) => details.noise[i] !== null && details.metric[i] === "attention");
  const backends = unique(timed.map((i) => details.backend[i])).sort();
  const isCrowd = timed.length > MOST_DRAWN;
  const noisiest = Math.floor(MOST_DRAWN / 2 / Math.max(1, backends.length));
  $("noise-note").textContent = isCrowd ? `Of very many rows the dots are the ${noisiest} noisiest of each backend; the lines end at a twentieth and at nineteen twentieths.` : "";
  return {
    traces: backends.flatMap((backend) => {
      const own = timed.filter((i) => details.backend[i] === backend).sort((a, b) => details.noise[b] - details.noise[a]);
      const style = backendStyle(backend);
      const box = { type: "box", name: plain(backend), orientation: "h", line: { width: 1.5, color: style.color }, fillcolor: "rgba(0,0,0,0)" };
      const marker = { color: style.color, symbol: style.symbol, size: 5, opacity: 0.6 };
      const dots = (rows) => ({ x: rows.map((i) => details.noise[i] * 100), text: rows.map(rowName), hovertemplate: "%{x:.3~g} %<br>%{text}<extra></extra>", marker });
      if (!isCrowd) return [{ ...box, ...dots(own), boxpoints: "all", jitter: 0.4, pointpos: 0 }];
      const share = (part) => [details.noise[own[Math.round((own.length - 1) * (1 - part))]] * 100];
      return [
        { ...box, y: [plain(backend)], q1: share(0.25), median: share(0.5), q3: share(0.75), lowerfence: share(0.05), upperfence: share(0.95), hoverinfo: "x" },
        { type: "scatter", mode: "markers", name: plain(backend), ...dots(own.slice(0, noisiest)), y: own.slice(0, noisiest).map(() => plain(backend)) },
      ];
    }),
    layout: { showlegend: false, xaxis: axis(isNarrow() ? "spread of the samples (%)" : "interquartile range of the samples over their median (%)", { rangemode: "tozero" }), yaxis: axis("", { autorange: "reversed" }) },
  };
}

// Lowest, median and highest of every condition, and the point where it was highest.
function extremes() {
  const text = (value, { scale, unit }) => `${number(value * scale)} ${unit}`.trim();
  $("extremes").tBodies[0].replaceChildren(...conditionKeys().map((key) => {
    const about = conditionInfo(key);
    const sides = [details.before, details.after];
    const seen = Float64Array.from(sides.flatMap((side) => side.map((values) => values[key]).filter((value) => typeof value === "number"))).sort();
    const middle = (seen[(seen.length - 1) >> 1] + seen[seen.length >> 1]) / 2;
    const highest = seen[seen.length - 1];
    const at = details.status.findIndex((_, i) => sides.some((side) => side[i][key] === highest));
    return el("tr", {}, el("td", {}, about.name), el("td", { class: "number", "data-label": "lowest" }, text(seen[0], about)), el("td", { class: "number", "data-label": "median" }, text(middle, about)),
      el("td", { class: "number", "data-label": "highest" }, text(highest, about)), el("td", { class: "quiet" }, `${details.backend[at]} ${details.workload[at]}`));
  }));
}

let lines = null; // one a row to search in, made when somebody searches
const rowState = { sort: "noise", down: true, q: "", stopped: "" };
let rowsShown = UNTIMED_SHOWN;
const noiseText = (i) => (details.noise[i] === null ? "" : `${(details.noise[i] * 100).toFixed(2)} %`);
const COLUMNS = [
  { name: "backend", label: "Backend", value: (i) => details.backend[i] },
  { name: "workload", label: "Workload", value: (i) => details.workload[i] },
  { name: "metric", label: "Metric", kind: "wide", value: (i) => details.metric[i] },
  { name: "replicate", label: "Replicate", kind: "number", value: (i) => details.replicate[i] },
  { name: "status", label: "Status", value: (i) => details.status[i] },
  { name: "median_s", label: "Median", kind: "number", value: (i) => details.median_s[i], text: (i) => timeText(details.median_s[i]) },
  { name: "noise", label: "Noise", kind: "number", value: (i) => details.noise[i], text: noiseText },
  { name: "samples", label: "Samples", kind: "number", value: (i) => details.samples[i] },
  { name: "stop_reason", label: "Stopped", value: (i) => details.stop_reason[i] },
  { name: "discarded", label: "Discarded", kind: "number", value: (i) => details.discarded[i] },
  { name: "throttle_reasons", label: "Throttled", value: (i) => details.throttle_reasons[i].join(", ") },
];

function matchingRows() {
  const words = rowState.q.toLowerCase().split(/\s+/).filter(Boolean);
  if (words.length && !lines) lines = details.status.map((_, i) => COLUMNS.map((column) => column.value(i)).join(" ").toLowerCase());
  const found = details.status.map((_, i) => i).filter((i) =>
    (!rowState.stopped || details.stop_reason[i] === rowState.stopped) && words.every((word) => lines[i].includes(word)));
  return sorted(found, COLUMNS.find((column) => column.name === rowState.sort), rowState.down);
}

function rowTable() {
  const found = matchingRows();
  $("num-rows").textContent = found.length === details.status.length ? String(found.length) : `${found.length} of ${details.status.length}`;
  sortableHead($("rows"), COLUMNS, rowState, (name) => { rowState.down = rowState.sort === name ? !rowState.down : true; rowState.sort = name; rowTable(); });
  $("rows").tBodies[0].replaceChildren(...found.slice(0, rowsShown).map((i) => el("tr", {}, ...COLUMNS.map(({ label, kind, value, text }) =>
    el("td", { class: kind || null, "data-label": kind === "number" ? label.toLowerCase() : null }, text ? text(i) : value(i))))));
  $("more-rows").replaceChildren();
  if (found.length > rowsShown) $("more-rows").append(el("button", { type: "button", onclick: () => { rowsShown = Infinity; rowTable(); } }, `Show all ${found.length}`));
  else if (!found.length) $("more-rows").append("No row matches; take a word away.");
}

function exportRows() {
  const keys = conditionKeys();
  saveCsv(`rows-${runs[current].id}.csv`, [...COLUMNS.map((column) => column.name), "started_at", "timer", "l2_state", "execution", "reasons", ...keys.map((key) => `before_${key}`), ...keys.map((key) => `after_${key}`)],
    matchingRows().map((i) => [...COLUMNS.map((column) => column.value(i)), details.started_at[i], details.timer[i], details.l2_state[i], details.execution[i], details.reasons[i].join("; "),
      ...keys.map((key) => details.before[i][key]), ...keys.map((key) => details.after[i][key])]));
}

function tables() {
  const cell = (text, kind) => el("td", kind ? { class: kind } : {}, text);
  extremes();
  rowsShown = UNTIMED_SHOWN;
  fillSelect($("stopped"), [["", "all"], ...unique(details.stop_reason).filter(Boolean).sort().map((reason) => [reason, reason])], "");
  rowState.stopped = "";
  rowTable();
  const untimed = details.status.map((_, i) => i).filter((i) => !isTimed(details.status[i]));
  $("failures").hidden = !untimed.length;
  $("untimed").tBodies[0].replaceChildren(...untimed.slice(0, UNTIMED_SHOWN).map((i) => el("tr", {},
    cell(details.backend[i]), cell(details.workload[i]), cell(details.replicate[i], "number"), cell(details.status[i]), cell(details.reasons[i].join("; ")))));
  $("untimed-more").textContent = untimed.length > UNTIMED_SHOWN ? `and ${untimed.length - UNTIMED_SHOWN} more in the rows above` : "";
}

function header(run) {
  $("change").hidden = !run.change;
  $("change").textContent = `The stack changed since the run before: ${run.change}.`;
  facts("machine", [
    ["device", run.device_name], ["class", run.device], ["kind", run.facts.device_kind], ["UUID", run.facts.device_uuid],
    ["capability", run.facts.compute_capability], ["driver", run.driver], ["CUDA", run.facts.cuda_version],
    ["clocks", run.facts.clocks], ["host", run.facts.hostname], ["container", run.facts.container_digest],
    ["published", run.published ? "host and UUID are hashes" : ""],
  ]);
  facts("stack", [["stack", run.stack.slice(0, 16)], ...(stacks[run.stack] || []).map((entry) => entry.split("==")), ["attnbench", run.facts.harness_version]]);
}

function measuring(run) {
  const pairs = [
    ["run", run.id], ["started", `${dateText(run.at)} UTC`], ["took", durationText(run.seconds)],
    ["commit", `${shortCommit(run.commit)} ${run.subject}`.trim()], ["suites", run.suites.join(", ")],
    ["points", Object.entries(run.points).map(([status, count]) => `${count} ${status}`).join(", ")],
  ];
  if (details) {
    const floor = new Map(details.timer.map((timer, i) => [`${timer} ${details.timer_floor_s[i]}`, [timer, details.timer_floor_s[i]]]));
    const floors = unique([...floor.values()].filter(([timer, seconds]) => timer && seconds !== null).map(([timer, seconds]) => `${timer}: reads ${timeText(seconds)} of nothing`));
    pairs.push(
      ["timers", tally(details.timer)], ["timer floor", floors.slice(0, 3).join("; ")], ["L2", tally(details.l2_state)], ["execution", tally(details.execution)],
      ["stopped by", tally(details.stop_reason)], ["discarded", `${details.discarded.reduce((sum, n) => sum + n, 0)} samples`],
      ["throttling", tally(details.throttle_reasons.flat()) || "none seen"],
    );
  }
  facts("measuring", pairs);
}

async function route() {
  const wanted = Number(readHash().run);
  current = Number.isInteger(wanted) && runs[wanted] ? wanted : runs.length - 1;
  const run = runs[current];
  document.title = `Run ${dateText(run.at)} · ${data().index.title}`;
  $("run").value = String(current);
  const wantedRun = current;
  let loaded = null;
  try {
    if (run.conditions) loaded = unpacked(await loadData(`run-${wantedRun}`));
  } catch (error) {
    loaded = null;
  }
  // Another run may have been chosen while this one was loading.
  if (current !== wantedRun) return;
  details = loaded;
  lines = null;
  header(run);
  measuring(run);
  $("unavailable").hidden = Boolean(details);
  $("details").hidden = !details;
  if (!details) return;
  const keys = conditionKeys();
  keys.sort((a, b) => b.startsWith("load") - a.startsWith("load"));
  const keep = keys.includes($("condition").value) ? $("condition").value : keys[0];
  fillSelect($("condition"), keys.map((key) => [key, conditionInfo(key).name]), keep);
  if (keys.length) draw("during", during);
  draw("noise", noise);
  tables();
}

fillSelect($("run"), runs.map((run, i) => [String(i), `${dateText(run.at)} · ${run.device}${run.published ? ", published" : ""} · ${shortCommit(run.commit) || "no commit"} ${run.subject}`.slice(0, 110)]).reverse(), String(current));
$("run").addEventListener("input", (event) => { location.hash = `run=${event.target.value}`; });
$("search").addEventListener("input", (event) => { rowState.q = event.target.value; rowsShown = UNTIMED_SHOWN; rowTable(); });
$("stopped").addEventListener("input", (event) => { rowState.stopped = event.target.value; rowsShown = UNTIMED_SHOWN; rowTable(); });
$("export-rows").addEventListener("click", exportRows);
$("condition").addEventListener("input", () => draw("during", during));
window.addEventListener("hashchange", route);
if (runs.length) route();
