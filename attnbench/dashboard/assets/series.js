"use strict";

const { runs, stacks } = data().runs;
const state = { id: "", quantity: "latency", axis: "commit", fromZero: false };
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

function packages(stack, driver) {
  const versions = {};
  for (const entry of stacks[stack] || []) {
    const [name, version] = entry.split("==");
    versions[name] = version || "";
  }
  if (driver) versions.driver = driver;
  return versions;
}
function stackChange(before, after) {
  const old = packages(before.stack, before.driver);
  const now = packages(after.stack, after.driver);
  return unique([...Object.keys(old), ...Object.keys(now)]).sort()
    .filter((name) => old[name] !== now[name])
    .map((name) => (name in old && name in now ? `${name} ${old[name]} → ${now[name]}` : name in now ? `+ ${name} ${now[name]}` : `− ${name} ${old[name]}`));
}

// Levels along the axis: each a commit or a stack, with the runs measured there.
function levels() {
  const found = new Map();
  for (const point of points()) {
    const key = state.axis === "commit" ? point.commit || point.at : `${point.stack} ${point.driver}`;
    if (!found.has(key)) found.set(key, []);
    found.get(key).push(point);
  }
  const made = [...found.values()];
  if (state.axis === "stack") made.sort((a, b) => a[0].run - b[0].run);
  return made;
}

function levelLabel(level, before) {
  const first = level[0];
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
  const known = [...dots.y, ...again.y].filter((y) => y !== null);
  const low = known.length ? Math.min(...known) : 0;
  const high = known.length ? Math.max(...known) : 1;
  const pad = (high - low || high || 1) * 0.12;
  const floor = state.fromZero ? 0 : low - pad;
  lost.y = lost.x.map(() => floor + (high + pad - floor) * 0.03);
  const template = `%{y:.4~g} ${unit}<br>%{text}<extra></extra>`;
  const traces = [
    { type: "scatter", mode: "lines+markers", name: "median of the replicates", x: all.map((_, x) => x), y: middles, connectgaps: false, hoverinfo: "skip", line: { color: style.color, width: 2 }, marker: { symbol: "line-ew", size: 14, line: { width: 2.5, color: style.color } } },
    { type: "scatter", mode: "markers", name: "replicate", ...dots, hovertemplate: template, marker: { color: style.color, size: 6, opacity: 0.55 } },
  ];
  if (again.x.length) traces.push({ type: "scatter", mode: "markers", name: "measured again", ...again, hovertemplate: template, marker: { symbol: "diamond-open", size: 9, color: css("--ink"), line: { width: 1.5 } } });
  if (lost.x.length) traces.push({ type: "scatter", mode: "markers", name: "no time", ...lost, hovertemplate: "%{text}<extra></extra>", marker: { symbol: "x", size: 11, color: css("--bad") } });
  const labels = all.map((level, i) => levelLabel(level, all[i - 1]));
  const step = Math.max(1, Math.ceil(all.length / (isNarrow() ? 8 : 24)));
  const ticks = all.map((_, i) => i).filter((i) => (all.length - 1 - i) % step === 0);
  return {
    traces,
    layout: {
      xaxis: axis(state.axis === "commit" ? "commit, by commit time" : "stack, by first run", {
        tickvals: ticks, ticktext: ticks.map((i) => labels[i]), range: [-0.5, all.length - 0.5], zeroline: false, showgrid: false,
        tickangle: state.axis === "commit" && all.length > 6 ? -45 : 0,
      }),
      yaxis: axis(`${label} (${unit})`, { range: [floor, high + pad], zeroline: false }),
      ...marks(all),
    },
    onClick: (clicked) => {
      const level = all[Math.round(clicked.x)];
      if (level && shows("conditions")) location.href = `conditions.html#run=${level[level.length - 1].run}`;
    },
  };
}

// A dashed line where the stack changed between neighbours on the commit axis.
function marks(all) {
  const shapes = [];
  const annotations = [];
  if (state.axis === "commit") {
    all.forEach((level, x) => {
      if (!x) return;
      const changed = stackChange(all[x - 1][all[x - 1].length - 1], level[0]);
      if (!changed.length) return;
      shapes.push({ type: "line", x0: x - 0.5, x1: x - 0.5, yref: "paper", y0: 0, y1: 1, line: { dash: "dash", width: 1.5, color: css("--quiet") } });
      annotations.push({ x: x - 0.5, yref: "paper", y: 1, yanchor: "top", xanchor: x > all.length / 2 ? "right" : "left", showarrow: false, align: "left", font: { size: 11, color: css("--quiet") }, bgcolor: css("--ground"), text: isNarrow() ? "stack changed" : plain(changed.length > 2 ? `stack: ${changed.slice(0, 2).join(", ")} …` : `stack: ${changed.join(", ")}`) });
    });
  }
  return { shapes, annotations };
}

function backendName() {
  const { backend, variant } = series.identity;
  return variant ? `${backend} [${variant}]` : backend;
}

const HEADER = ["started", "commit", "subject", "stack", "status"];
const WIDE = ["subject", "stack"];
function table() {
  const { unit } = info(state.quantity);
  const all = points().sort((a, b) => b.run - a.run);
  $("values").tHead.replaceChildren(el("tr", {},
    ...HEADER.map((name) => el("th", { class: WIDE.includes(name) ? "wide" : null }, name)),
    el("th", { class: "number" }, `median (${unit})`),
    el("th", { class: "number" }, `replicates (${unit})`),
    el("th", { class: "number" }, "noise"),
    el("th", {}, "reasons")));
  $("values").tBodies[0].replaceChildren(...all.map((point) => {
    const shown = (seconds) => number(derived(state.quantity, seconds, series.identity));
    const again = point.confirmations.length ? ` | again ${point.confirmations.map(shown).join(" ")}` : "";
    return el("tr", {},
      el("td", { class: "tag" }, runLink(point.run, dateText(point.at)), runs[point.run].published ? " published" : ""),
      el("td", { class: "commit" }, shortCommit(point.commit)),
      el("td", { class: "subject wide" }, point.subject),
      el("td", { class: "commit wide" }, point.stack.slice(0, 7)),
      el("td", {}, point.status),
      el("td", { class: "number" }, isTimed(point.status) ? shown(median(point.replicates)) : ""),
      el("td", { class: "number" }, point.replicates.map(shown).join(" ") + again),
      el("td", { class: "number" }, point.noise === null ? "" : `${(point.noise * 100).toFixed(1)} %`),
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
  choice($("axis"), [["commit", "Commits"], ["stack", "Stacks"]], state.axis, (value) => go({ axis: value }));
  $("note").textContent = state.quantity === "itl"
    ? `ITL here is attention only: seconds per decode step times ${series.identity.num_layers} layer${series.identity.num_layers === 1 ? "" : "s"}. Linear layers, sampling and scheduling come on top.`
    : state.quantity === "tokens_s" ? "Query tokens of one call over the time of one layer." : "";
  draw("history", chart);
  table();
}

// What is shown is in the address, so that it can be sent to somebody.
function go(change) {
  Object.assign(state, change);
  const words = [state.id, state.quantity !== "latency" && `q=${state.quantity}`, state.axis !== "commit" && `x=${state.axis}`].filter(Boolean);
  history.replaceState(null, "", `#${words.join("&")}`);
  show();
}

async function route() {
  const hash = readHash();
  state.id = hash.id || "";
  state.quantity = hash.q in data().index.quantities ? hash.q : "latency";
  state.axis = hash.x === "stack" ? "stack" : "commit";
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
  show();
}

$("export").addEventListener("click", exportCsv);
$("from-zero").addEventListener("change", (event) => { state.fromZero = event.target.checked; draw("history", chart); });
window.addEventListener("hashchange", route);
route();
