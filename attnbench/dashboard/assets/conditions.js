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

function during() {
  const key = $("condition").value;
  const { name, scale, unit } = conditionInfo(key);
  const side = (label, values, style) => {
    const at = values.map((_, i) => i).filter((i) => key in values[i]);
    return {
      type: "scatter", mode: "markers", name: label,
      x: at.map((i) => details.started_at[i]), y: at.map((i) => values[i][key] * scale),
      text: at.map(rowName), hovertemplate: `%{y:.4~g} ${unit}<br>%{text}<extra></extra>`, marker: style,
    };
  };
  return {
    traces: [
      side("before a point", details.before, { color: css("--c0"), symbol: "circle", size: 7 }),
      side("after it", details.after, { color: css("--c1"), symbol: "diamond-open", size: 8 }),
    ],
    layout: { xaxis: axis("time (UTC)"), yaxis: axis(unit ? `${name} (${unit})` : name) },
  };
}

function noise() {
  const timed = details.noise.map((_, i) => i).filter((i) => details.noise[i] !== null && details.metric[i] === "attention");
  const backends = unique(timed.map((i) => details.backend[i])).sort();
  return {
    traces: backends.map((backend) => {
      const own = timed.filter((i) => details.backend[i] === backend);
      const style = backendStyle(backend);
      return {
        type: "box", name: plain(backend), x: own.map((i) => details.noise[i] * 100), orientation: "h", boxpoints: "all", jitter: 0.4, pointpos: 0,
        text: own.map(rowName), hovertemplate: "%{x:.3~g} %<br>%{text}<extra></extra>",
        marker: { color: style.color, symbol: style.symbol, size: 5, opacity: 0.6 }, line: { width: 1.5 }, fillcolor: "rgba(0,0,0,0)",
      };
    }),
    layout: { showlegend: false, xaxis: axis(isNarrow() ? "spread of the samples (%)" : "interquartile range of the samples over their median (%)", { rangemode: "tozero" }), yaxis: axis("", { autorange: "reversed" }) },
  };
}

// Lowest, median and highest of every condition, and the point where it was highest.
function extremes() {
  $("extremes").tBodies[0].replaceChildren(...conditionKeys().map((key) => {
    const { name, scale, unit } = conditionInfo(key);
    const seen = [details.before, details.after].flatMap((side) => side.map((values, i) => [values[key], i]).filter(([value]) => typeof value === "number"));
    seen.sort((a, b) => a[0] - b[0]);
    const [lowest, highest] = [seen[0], seen[seen.length - 1]];
    const text = (value) => `${number(value)} ${unit}`.trim();
    return el("tr", {}, el("td", {}, name), el("td", { class: "number", "data-label": "lowest" }, text(lowest[0] * scale)), el("td", { class: "number", "data-label": "median" }, text(median(seen.map(([value]) => value * scale)))),
      el("td", { class: "number", "data-label": "highest" }, text(highest[0] * scale)), el("td", { class: "quiet" }, `${details.backend[highest[1]]} ${details.workload[highest[1]]}`));
  }));
}

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
  const found = details.status.map((_, i) => i).filter((i) => {
    if (rowState.stopped && details.stop_reason[i] !== rowState.stopped) return false;
    if (!words.length) return true;
    const line = COLUMNS.map((column) => column.value(i)).join(" ").toLowerCase();
    return words.every((word) => line.includes(word));
  });
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
    const floors = unique(details.timer.map((timer, i) => (timer && details.timer_floor_s[i] !== null ? `${timer}: reads ${timeText(details.timer_floor_s[i])} of nothing` : "")).filter(Boolean));
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
  details = null;
  try {
    if (run.conditions) details = unpacked(await loadData(`run-${current}`));
  } catch (error) {
    details = null;
  }
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
