// What the engine's default costs, over commits and stacks. Runs after choices.js.
"use strict";

const { runs, stacks } = data().runs;
const runAt = new Map(runs.map((run, i) => [run.id, i]));
const ALL = "";

// What a run's times are of: another timer, L2 state, execution or GPU, or a stranger's machine, is another line.
const wayOf = (one) => [one.how.slice(one.how.indexOf(", ") + 2), one.at.device_name, one.at.published ? "published" : ""].filter(Boolean).join(", ");
// Of several ways what they differ in; "" where there is one.
function wayText(one, points) {
  const ways = unique(points.map(wayOf)).map((way) => way.split(", "));
  return wayOf(one).split(", ").filter((word) => !ways.every((words) => words.includes(word))).join(", ");
}

// Runs measured in one way, whose batches are mostly the same, stand on one line, by the batches that all of
// them have: a mean over other batches is another number.
const ALIKE = 0.8;
function lines(points) {
  const found = [];
  for (const one of [...points].sort((a, b) => a.number - b.number)) {
    const own = one.batches.map((batch) => batch.workload);
    const line = found.find((other) => other.way === wayOf(one) && own.filter((text) => other.common.has(text)).length >= ALIKE * Math.max(own.length, other.common.size));
    if (line) line.common = new Set(own.filter((text) => line.common.has(text)));
    else found.push({ way: wayOf(one), common: new Set(own), points: [] });
    (line || found[found.length - 1]).points.push(one);
  }
  for (const line of found) {
    for (const one of line.points) one.mean = geometricMean(one.batches.filter((batch) => line.common.has(batch.workload)).map((batch) => batch.ratio));
    line.points.sort((a, b) => points.indexOf(a) - points.indexOf(b));
  }
  return found;
}
const geometricMean = (ratios) => Math.exp(ratios.reduce((sum, ratio) => sum + Math.log(ratio), 0) / ratios.length);

// The runs with their batches, or with the one batch that is looked at.
function regretPoints() {
  const found = currentRegret();
  const points = found.runs.filter((one) => runAt.has(one.run)).map((one) => {
    const batches = one.batches.filter((batch) => state.batch === ALL || batch.workload === state.batch);
    const worst = batches.reduce((a, b) => (!a || b.ratio > a.ratio ? b : a), null);
    return { ...one, batches, worst, at: runs[runAt.get(one.run)], number: runAt.get(one.run) };
  }).filter((one) => one.batches.length);
  const key = (one) => (state.axis === "commit" ? one.at.commit_at || one.at.at : one.at.at);
  return points.sort((a, b) => (key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : a.number - b.number));
}
const stackText = (run) => [run.stack.slice(0, 7), run.driver && `driver ${run.driver}`, ...(stacks[run.stack] || []).filter((one) => /^(torch|triton|vllm|flash|flashinfer)/.test(one)).map((one) => one.replace("==", " "))].filter(Boolean);
function levelOf(one) {
  return state.axis === "commit" ? one.at.commit || one.at.at : `${one.at.stack} ${one.at.driver} ${wayOf(one)}`;
}
const percent = (ratio) => (ratio - 1) * 100;

function regretChart() {
  const points = regretPoints();
  const levels = unique(points.map(levelOf));
  const own = (level) => points.filter((one) => levelOf(one) === level);
  const xOf = (one) => {
    const mates = own(levelOf(one));
    return levels.indexOf(levelOf(one)) + (mates.length > 1 ? (mates.indexOf(one) / (mates.length - 1) - 0.5) * 0.3 : 0);
  };
  const text = (one) => `${plain(shortCommit(one.at.commit))} ${plain(one.at.subject.slice(0, 80))}<br>${dateText(one.at.at)} UTC, ${stackText(one.at).map(plain).join(", ")}<br>${plain(wayOf(one))}<br>${one.batches.length} batches, worst ${changeText(one.worst.ratio)}: ${plain(one.worst.workload)}<br>${plain(one.worst.default)} instead of ${plain(one.worst.best)}`;
  const trace = (name, own, value, style) => ({
    type: "scatter", name, x: own.map(xOf), y: own.map((one) => percent(value(one))), text: own.map(text), customdata: own.map((one) => one.number),
    hovertemplate: "%{y:.3~g} %<br>%{text}<extra></extra>", ...style,
  });
  const lineName = (line) => [state.batch === ALL ? `mean of ${line.common.size} batches` : "this batch", wayText(line.points[0], points)].filter(Boolean).map(plain).join(", ");
  const traces = lines(points).map((line, i) => trace(lineName(line), line.points, (one) => one.mean, {
    mode: "lines+markers", line: { color: css("--c0"), width: 2, dash: DASHES[i % DASHES.length] }, marker: { size: 8, symbol: SYMBOLS[i % SYMBOLS.length], color: css("--c0") },
  }));
  if (state.batch === ALL) traces.push(trace("worst batch", points, (one) => one.worst.ratio, { mode: "markers", marker: { size: 9, symbol: "triangle-up-open", color: css("--c1"), line: { width: 2 } } }));
  const label = (level) => {
    const one = own(level)[0];
    return state.axis === "commit" ? plain(one.at.commit ? shortCommit(one.at.commit) : dateText(one.at.at)) : [wayText(one, points), ...stackText(one.at)].filter(Boolean).slice(0, 4).map(plain).join("<br>");
  };
  const step = Math.max(1, Math.ceil(levels.length / (isNarrow() ? 6 : 24)));
  const ticks = levels.map((_, i) => i).filter((i) => (levels.length - 1 - i) % step === 0);
  return {
    traces,
    layout: {
      showlegend: true,
      xaxis: axis(state.axis === "commit" ? "commit, by commit time" : "stack, by first run", { tickvals: ticks, ticktext: ticks.map((i) => label(levels[i])), range: [-0.5, levels.length - 0.5], zeroline: false, showgrid: false, tickangle: state.axis === "commit" && levels.length > (isNarrow() ? 3 : 6) ? -45 : 0 }),
      yaxis: axis("regret of the default (%)", { rangemode: "tozero" }),
      annotations: currentRegret().made_up ? [{ text: "MADE UP", xref: "paper", yref: "paper", x: 0.5, y: 0.5, showarrow: false, textangle: -20, opacity: 0.16, font: { size: isNarrow() ? 44 : 84, color: css("--ink") } }] : [],
    },
    onClick: (point) => {
      if (shows("conditions")) location.href = `conditions.html#run=${point.customdata}`;
    },
  };
}

function regretTable() {
  const points = regretPoints().reverse();
  lines(points);
  const single = state.batch !== ALL;
  const heads = [["Run"], ["Commit"], ["Stack"], ...(single ? [["Default"], ["Fastest"], ["Regret", true], ["Standing"]] : [["Batches", true], ["Mean regret", true], ["Slower than the fastest", true], ["Worst", true], ["Where"]])];
  $("regret-table").tHead.replaceChildren(el("tr", {}, ...heads.map(([text, isNumber]) => el("th", { class: isNumber ? "number" : null }, text))));
  $("regret-table").tBodies[0].replaceChildren(...points.map((one) => {
    const slower = one.batches.filter((batch) => batch.standing === "slower").length;
    const last = single
      ? [el("td", {}, one.worst.default), el("td", {}, one.worst.best), el("td", { class: "number" }, estimateText(one.worst)), el("td", {}, one.worst.standing)]
      : [el("td", { class: "number" }, one.batches.length), el("td", { class: "number" }, changeText(one.mean)), el("td", { class: "number" }, slower), el("td", { class: "number" }, changeText(one.worst.ratio)),
        one.worst.ratio === 1 ? el("td", { class: "quiet" }, "the default is the fastest") : el("td", { class: "where" }, el("button", { type: "button", onclick: () => { state.batch = one.worst.workload; show(); } }, one.worst.batch), ` ${one.worst.best} instead of ${one.worst.default}`)];
    return el("tr", {}, el("td", { class: "tag" }, runLink(one.number, dateText(one.at.at)), one.at.published ? el("span", { class: "quiet" }, " published") : null),
      el("td", { class: "commit" }, one.at.commit ? shortCommit(one.at.commit) : ""), el("td", { class: "wide" }, [wayText(one, points), ...stackText(one.at)].filter(Boolean).slice(0, 4).join(", ")), ...last);
  }));
  $("regret-table").tHead.rows[0].cells[2].className = "wide";
  labelCells($("regret-table"));
}

function exportRegret() {
  const found = currentRegret();
  saveCsv("regret.csv", ["device", "how", "layer", "engine", "device_name", "run", "commit", "stack", "driver", "workload", "phase", "default", "fastest", "ratio", "low", "high", "standing"],
    regretPoints().flatMap((one) => one.batches.map((batch) => [found.device, one.how, found.layer, found.engine, one.at.device_name, one.run, one.at.commit, (stacks[one.at.stack] || []).join(" "), one.at.driver,
      batch.workload, batch.phase, batch.default, batch.best, batch.ratio, batch.low, batch.high, batch.standing])));
}

function showRegret() {
  const found = currentRegret();
  $("regret-section").hidden = !found;
  if (!found) return;
  const batches = new Map(found.runs.flatMap((one) => one.batches.map((batch) => [batch.workload, `${batch.phase}: ${batch.workload}`])));
  if (!batches.has(state.batch)) state.batch = ALL;
  fillSelect($("batch"), [[ALL, `all ${batches.size}`], ...[...batches].sort((a, b) => (a[1] < b[1] ? -1 : 1))], state.batch);
  choice($("axis"), [["commit", "Commits"], ["stack", "Stacks"]], state.axis, (value) => { state.axis = value; show(); });
  const missing = found.runs.reduce((sum, one) => sum + one.not_measured, 0);
  $("regret-note").textContent = `${found.engine} takes ${found.default} unasked. Regret: its time over that of the fastest valid backend of the same run, batch by batch; the mean over batches is geometric, and over those that all runs of a line measured.`
    + (missing ? ` ${missing} times a batch was measured without the default.` : "");
  regretTable();
  draw("regret", regretChart);
}
$("batch").addEventListener("input", () => { state.batch = $("batch").value; show(); });
$("export-regret").addEventListener("click", exportRegret);
