"use strict";

const { answers } = data().traffic;
const QUANTITIES = {
  itl_ms: ["ITL of tokens", "inter-token latency (ms)", "tokens"],
  itl_request_p99_ms: ["ITL p99 of requests", "a request's own p99 of inter-token latency (ms)", "requests"],
  ttft_ms: ["TTFT", "time to first token (ms)", "requests"],
};
const AXES = {
  itl: ["ITL against throughput", "tokens_per_s", "itl_p99_ms"],
  throughput: ["Throughput against concurrency", "concurrency", "tokens_per_busy_s"],
  latency: ["ITL against concurrency", "concurrency", "itl_p99_ms"],
};
const LABELS = {
  itl_p50_ms: "ITL p50 (ms)", itl_p90_ms: "ITL p90 (ms)", itl_p99_ms: "ITL p99 (ms)",
  ttft_p50_ms: "TTFT p50 (ms)", ttft_p99_ms: "TTFT p99 (ms)", ttft_attention_pct: "attention in TTFT (%)",
  tokens_per_s: "tokens/s", tokens_per_busy_s: "tokens/s while steps run",
  load: "load", requests_per_s: "requests/s", concurrency: "concurrency (requests in a step, mean)",
  extrapolated_pct: "extrapolated (%)",
};
const MADE_UP = "MADE UP";
const EXTRAPOLATED_PCT = 5;
const state = { answer: null, quantity: "itl_ms", axis: "throughput" };
const find = (list, value) => (list.includes(value) ? value : list[0]);
const nameOf = (one) => (one.is_bound ? "roofline (lower bound)" : one.backend);

// Colour, marker and dash by the place among all answers' backends; the bound is quiet and dotted.
const everybody = unique(answers.flatMap((answer) => answer.backends.filter((one) => !one.is_bound).map((one) => one.backend))).sort();
function styleOf(one) {
  if (one.is_bound) return { color: css("--quiet"), symbol: "line-ew", dash: "dot" };
  const at = everybody.indexOf(one.backend);
  return { color: css(`--c${at % 8}`), symbol: SYMBOLS[at % SYMBOLS.length], dash: DASHES[at % DASHES.length] };
}
const watermark = () => (state.answer.made_up ? [{
  text: MADE_UP, xref: "paper", yref: "paper", x: 0.5, y: 0.5, showarrow: false, textangle: -20, opacity: 0.16, font: { size: isNarrow() ? 44 : 84, color: css("--ink") },
}] : []);

function curves() {
  const [, title, whose] = QUANTITIES[state.quantity];
  const { shares } = state.answer;
  const traces = state.answer.backends.filter((one) => one.curves[state.quantity]).map((one) => {
    const style = styleOf(one);
    return {
      type: "scatter", mode: "lines", name: plain(nameOf(one)),
      x: one.curves[state.quantity], y: shares.map((share) => share * 100),
      hovertemplate: `%{y:.4~g} % of the ${whose} within %{x:.4~g} ms<br>${plain(nameOf(one))}<extra></extra>`,
      line: { color: style.color, dash: style.dash, width: 2.2 },
    };
  });
  const line = (y) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y, layer: "below", line: { color: css("--line"), width: 1.5, dash: "dot" } });
  return {
    traces,
    layout: {
      showlegend: true,
      xaxis: axis(`${title}, log scale`, { type: "log", tickformat: ",.3~r", dtick: isNarrow() ? 1 : "D2" }),
      yaxis: axis(`${whose} within (%)`, { range: [0, 101], tickvals: [0, 25, 50, 75, 90, 99] }),
      shapes: [50, 90, 99].map(line),
      annotations: watermark(),
    },
  };
}

function loadsChart() {
  const [, x, y] = AXES[state.axis];
  const traces = state.answer.backends.filter((one) => one.loads.length).map((one) => {
    const style = styleOf(one);
    const hollow = one.loads.map((load) => load.extrapolated_pct > EXTRAPOLATED_PCT);
    return {
      type: "scatter", mode: "lines+markers", name: plain(nameOf(one)),
      x: one.loads.map((load) => load[x]), y: one.loads.map((load) => load[y]),
      text: one.loads.map((load) => `${plain(nameOf(one))}<br>load ${number(load.load)}: ${number(load.requests_per_s)} requests/s, concurrency ${number(load.concurrency)}<br>${number(load.tokens_per_s)} tokens/s, ITL p50 ${number(load.itl_p50_ms)} ms, p99 ${number(load.itl_p99_ms)} ms${load.extrapolated_pct === null ? "" : `<br>extrapolated ${number(load.extrapolated_pct)} %`}`),
      hovertemplate: "%{text}<extra></extra>",
      line: { color: style.color, dash: style.dash, width: 2 },
      marker: { symbol: hollow.map((h) => (one.is_bound ? "circle" : h ? `${style.symbol}-open` : style.symbol)), size: one.is_bound ? 5 : 10, color: style.color, line: { width: 2, color: style.color } },
    };
  });
  const scale = (key) => (key === "concurrency" || key.endsWith("_ms")
    ? { type: "log", tickformat: ",.3~r", dtick: isNarrow() ? 1 : "D2" } : { rangemode: "tozero" });
  return { traces, layout: { showlegend: true, xaxis: axis(LABELS[x], scale(x)), yaxis: axis(LABELS[y], scale(y)), annotations: watermark() } };
}

const NUMBERS = ["itl_p50_ms", "itl_p90_ms", "itl_p99_ms", "ttft_p50_ms", "ttft_p99_ms", "ttft_attention_pct", "tokens_per_s", "tokens_per_busy_s"];
function limited([value, low, high]) {
  if (value === null) return [""];
  return low === null || high === null ? [number(value)] : [number(value), " ", el("span", { class: "quiet limits" }, `[${number(low)}, ${number(high)}]`)];
}
function heads(texts) {
  return el("tr", {}, ...texts.map(([text, isNumber]) => el("th", { class: isNumber ? "number" : null }, text)));
}
const cells = (values) => values.map((value) => el("td", { class: "number" }, ...[value].flat()));

function numbersTable() {
  const rest = [["Extrapolated (%)", true], ["Left-out error (%)", true], ["Processes", true]];
  $("numbers").tHead.replaceChildren(heads([["Backend", false], ...NUMBERS.map((name) => [LABELS[name], true]), ...rest]));
  $("numbers").tBodies[0].replaceChildren(...state.answer.backends.map((one) => el("tr", { class: one.is_bound ? "quiet" : null },
    el("th", { scope: "row" }, nameOf(one)),
    ...cells(NUMBERS.map((name) => limited(one.numbers[name]))),
    ...cells([one.extrapolated_pct, one.left_out_error_pct, one.replicates].map((value) => (value === null ? "" : value === 0 ? "0" : number(value)))))));
  labelCells($("numbers"));
}
function exportNumbers() {
  const rows = state.answer.backends.map((one) => [
    state.answer.name, state.answer.scope, state.answer.made_up ? "made up" : "measured", one.backend,
    ...NUMBERS.flatMap((name) => one.numbers[name]), one.extrapolated_pct, one.left_out_error_pct, one.replicates, one.steps]);
  saveCsv(`${state.answer.name}-backends.csv`, ["answer", "scope", "times", "backend",
    ...NUMBERS.flatMap((name) => [name, `${name}_low`, `${name}_high`]), "extrapolated_pct", "left_out_error_pct", "replicates", "steps"], rows);
}

const SHOWN_SHARES = [0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1];
const withCurve = () => state.answer.backends.filter((one) => one.curves[state.quantity]);
function curveTable() {
  const places = SHOWN_SHARES.map((share) => state.answer.shares.findIndex((one) => Math.abs(one - share) < 1e-9)).filter((i) => i >= 0);
  $("curve-values").tHead.replaceChildren(heads([[`${QUANTITIES[state.quantity][0]}, ms`, false], ...places.map((i) => [`${Number((state.answer.shares[i] * 100).toFixed(4))} %`, true])]));
  $("curve-values").tBodies[0].replaceChildren(...withCurve().map((one) => el("tr", { class: one.is_bound ? "quiet" : null },
    el("th", { scope: "row" }, nameOf(one)), ...cells(places.map((i) => number(one.curves[state.quantity][i]))))));
  labelCells($("curve-values"));
}
function exportCurves() {
  const shown = withCurve();
  saveCsv(`${state.answer.name}-${state.quantity}.csv`, ["share", ...shown.map((one) => one.backend)],
    state.answer.shares.map((share, i) => [share, ...shown.map((one) => one.curves[state.quantity][i])]));
}

const LOAD_COLUMNS = ["load", "requests_per_s", "concurrency", "tokens_per_s", "tokens_per_busy_s", "itl_p50_ms", "itl_p99_ms", "ttft_p50_ms", "ttft_p99_ms", "extrapolated_pct"];
const loadRows = () => state.answer.backends.flatMap((one) => one.loads.map((load) => [one, load]));
function loadsTable() {
  $("loads-table").tHead.replaceChildren(heads([["Backend", false], ...LOAD_COLUMNS.map((name) => [LABELS[name].replace(/ \(requests.*/, ""), true])]));
  $("loads-table").tBodies[0].replaceChildren(...loadRows().map(([one, load]) => el("tr", { class: one.is_bound ? "quiet" : null },
    el("th", { scope: "row" }, nameOf(one)), ...cells(LOAD_COLUMNS.map((name) => (name === "load" || load[name] === 0 ? String(load[name]) : number(load[name])))))));
  labelCells($("loads-table"));
}
function exportLoads() {
  saveCsv(`${state.answer.name}-loads.csv`, ["backend", ...LOAD_COLUMNS], loadRows().map(([one, load]) => [one.backend, ...LOAD_COLUMNS.map((name) => load[name])]));
}

function exportNotMeasured() {
  saveCsv(`${state.answer.name}-without-an-answer.csv`, ["answer", "backend", "why"], state.answer.not_measured.map((one) => [state.answer.name, one.backend, one.reason]));
}

function about() {
  const { answer } = state;
  $("made-up").hidden = !answer.made_up;
  $("scope").replaceChildren("A step is ", el("strong", {}, answer.scope), answer.scope === "attention only" ? ": the rest of the model is left out, so these are no latencies of a whole engine." : ".");
  const facts = [
    ["trace", `${answer.trace}, ${answer.requests.toLocaleString("en-US")} requests${answer.rate_scale === 1 ? "" : `, ${number(answer.rate_scale)} times its rate`}`],
    ["model", [answer.model, answer.tp === 1 ? "" : `TP ${answer.tp}`, answer.layer].filter(Boolean).join(", ")],
    ["device", answer.device],
    ["times of", (answer.times || "no stored times") + (answer.published ? ", published" : "")],
    ["stack", [answer.driver && `driver ${answer.driver}`, ...answer.versions].filter(Boolean).join(", ")],
    ["batches", `${answer.batches} measured batches stand for all steps`],
  ];
  $("asked").replaceChildren(...facts.filter(([, text]) => text).flatMap(([name, text]) => [el("dt", {}, name), el("dd", {}, text)]));
  $("lacking").hidden = !answer.not_measured.length;
  $("not-measured").tBodies[0].replaceChildren(...answer.not_measured.map((one) => el("tr", {}, el("th", { scope: "row" }, one.backend), el("td", {}, one.reason))));
  $("measure-line").hidden = !answer.measure;
  $("measure").textContent = answer.measure;
}

function show() {
  about();
  numbersTable();
  const known = Object.keys(QUANTITIES).filter((name) => state.answer.backends.some((one) => one.curves[name]));
  state.quantity = find(known, state.quantity);
  choice($("quantity"), known.map((name) => [name, QUANTITIES[name][0]]), state.quantity, (value) => { state.quantity = value; show(); });
  if (known.length) {
    curveTable();
    draw("curves", curves);
    $("curve-note").textContent = `Curves are of the times as they are, without their limits. Dotted lines: 50, 90 and 99 % of the ${QUANTITIES[state.quantity][2]}.`;
  }
  const hasLoads = state.answer.backends.some((one) => one.loads.length);
  $("loads-section").hidden = !hasLoads;
  $("no-loads").hidden = hasLoads;
  if (hasLoads) {
    choice($("axis"), Object.entries(AXES).map(([name, [label]]) => [name, label]), state.axis, (value) => { state.axis = value; show(); });
    loadsTable();
    draw("loads", loadsChart);
  }
  history.replaceState(null, "", `#answer=${encodeURIComponent(state.answer.name)}&q=${state.quantity}&x=${state.axis}`);
}
function follow() {
  const hash = new URLSearchParams(location.hash.slice(1));
  state.answer = answers.find((one) => one.name === hash.get("answer")) || answers[0];
  state.quantity = find(Object.keys(QUANTITIES), hash.get("q"));
  state.axis = find(Object.keys(AXES), hash.get("x") || state.axis);
  fillSelect($("answer"), answers.map((one) => [one.name, `${one.name}: ${one.trace}, ${one.model}${one.tp === 1 ? "" : ` TP ${one.tp}`}, ${one.device}`]), state.answer.name);
  show();
}

$("answer").addEventListener("input", () => { state.answer = answers.find((one) => one.name === $("answer").value); show(); });
$("export-numbers").addEventListener("click", exportNumbers);
$("export-curves").addEventListener("click", exportCurves);
$("export-loads").addEventListener("click", exportLoads);
$("export-not-measured").addEventListener("click", exportNotMeasured);
window.addEventListener("hashchange", follow);
follow();
