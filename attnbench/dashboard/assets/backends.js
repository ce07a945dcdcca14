"use strict";

const all = data().backends;
const hash = readHash();
const state = { group: hash.group || "", where: "", phase: "", quantity: hash.q || "latency" };
const whereOf = (row) => `${row.device}, ${row.how}`;
// A refused point has no timer: it belongs to every way the device was timed.
const sameWhere = (row) => whereOf(row) === state.where || (row.median_s === null && state.where.startsWith(`${row.device},`));

function choose() {
  const groups = unique(all.map((row) => row.group)).sort();
  if (!groups.includes(state.group)) {
    const count = new Map(groups.map((group) => [group, 0]));
    for (const row of all) if (row.median_s !== null) count.set(row.group, count.get(row.group) + 1);
    state.group = groups.reduce((best, group) => (count.get(group) > count.get(best) ? group : best), groups[0]);
  }
  fillSelect($("group"), groups.map((g) => [g, g]), state.group);
  const inGroup = all.filter((row) => row.group === state.group);
  const timed = inGroup.filter((row) => row.median_s !== null);
  const wheres = unique((timed.length ? timed : inGroup).map(whereOf)).sort();
  if (!wheres.includes(state.where)) {
    const count = (where) => timed.filter((row) => whereOf(row) === where).length;
    state.where = wheres.reduce((best, where) => (count(where) > count(best) ? where : best), wheres[0]);
  }
  fillSelect($("where"), wheres.map((w) => [w, w]), state.where);
  const phases = unique(inGroup.filter(sameWhere).map((row) => row.phase)).sort();
  if (state.phase && !phases.includes(state.phase)) state.phase = "";
  fillSelect($("phase"), [["", "all"], ...phases.map((p) => [p, p])], state.phase);
  const rows = chosen();
  const quantities = ["latency", "tflop_s", "gb_s", "roofline", "tokens_s", "itl"].filter((q) => rows.some((row) => hasQuantity(q, row)));
  if (!quantities.includes(state.quantity)) state.quantity = "latency";
  choice($("quantity"), quantities.map((q) => [q, { latency: "Latency", tflop_s: "TFLOP/s", gb_s: "GB/s", roofline: "Roofline", tokens_s: "Tokens/s", itl: "ITL" }[q]]), state.quantity,
    (value) => { state.quantity = value; show(); });
}

const chosen = () => all.filter((row) => row.group === state.group && sameWhere(row) && (!state.phase || row.phase === state.phase));

const PHASES = ["decode", "extend", "mixed", "prefill"];
function specsOf(rows) {
  const first = new Map();
  for (const row of rows) if (!first.has(row.batch_spec)) first.set(row.batch_spec, row);
  return [...first.values()]
    .sort((a, b) => PHASES.indexOf(a.phase) - PHASES.indexOf(b.phase) || a.num_tokens - b.num_tokens || a.bytes_moved - b.bytes_moved || (a.batch_spec < b.batch_spec ? -1 : 1))
    .map((row) => row.batch_spec);
}

const MOST_NAMED = 60;
function chart() {
  const rows = chosen();
  const specs = specsOf(rows);
  const place = new Map(specs.map((spec, i) => [spec, i]));
  // Names of every so many where they would stand on each other.
  const step = Math.max(1, Math.ceil(specs.length / (isNarrow() ? 12 : MOST_NAMED)));
  const named = specs.map((_, i) => i).filter((i) => i % step === 0);
  const backends = unique(rows.map((row) => row.backend)).sort();
  const { label, unit, lower_is_better: lower } = info(state.quantity);
  const traces = backends.map((backend, b) => {
    const own = rows.filter((row) => row.backend === backend && row.median_s !== null);
    const style = backendStyle(backend);
    const shift = backends.length > 1 ? (b / (backends.length - 1) - 0.5) * 0.36 : 0;
    return {
      type: "scatter",
      mode: "markers",
      name: plain(backend),
      x: own.map((row) => place.get(row.batch_spec) + shift),
      y: own.map((row) => derived(state.quantity, row.median_s, row)),
      customdata: own.map((row) => row.id),
      text: own.map((row) => `${plain(backend)}<br>${plain(row.batch_spec)} ${row.phase}, ${row.status}`),
      hovertemplate: `%{y:.4~g} ${unit}<br>%{text}<extra></extra>`,
      marker: { color: style.color, symbol: style.symbol, size: 11 },
    };
  });
  return {
    traces,
    layout: {
      showlegend: true,
      xaxis: axis("batch spec", { tickvals: named, ticktext: named.map((i) => plain(specs[i])), range: [-0.5, specs.length - 0.5], zeroline: false, showgrid: false, tickangle: specs.length > (isNarrow() ? 3 : 5) ? -45 : 0 }),
      yaxis: axis(`${label} (${unit}${lower ? ", log scale" : ""})`, lower ? { type: "log", dtick: "D2", tickformat: ",.3~r" } : { rangemode: "tozero" }),
      shapes: specs.slice(1, step > 1 ? 1 : specs.length).map((_, i) => ({ type: "line", x0: i + 0.5, x1: i + 0.5, yref: "paper", y0: 0, y1: 1, layer: "below", line: { color: css("--line"), width: 1 } })),
    },
    onClick: (point) => { if (shows("series")) location.href = `series.html#${point.customdata}`; },
  };
}

const SHOWN = 100;
let shown = SHOWN;
function table() {
  const rows = chosen();
  const backends = unique(rows.map((row) => row.backend)).sort();
  const { unit, lower_is_better: lower } = info(state.quantity);
  $("legend-note").textContent = `${info(state.quantity).label}, ${unit}; bold is the best of a line, the percentage how far the others are behind.`;
  $("sides-table").tHead.replaceChildren(el("tr", {}, el("th", {}, "Batch spec"), el("th", {}, "Phase"), ...backends.map((b) => el("th", { class: "number" }, b))));
  const specs = specsOf(rows);
  const cells = new Map();
  for (const row of rows) {
    const key = `${row.batch_spec} ${row.backend}`;
    if (!cells.has(key) || (cells.get(key).median_s === null && row.median_s !== null)) cells.set(key, row);
  }
  const phases = new Map(rows.map((row) => [row.batch_spec, row.phase]));
  showMore("more-sides", specs.length, "batch specs");
  $("sides-table").tBodies[0].replaceChildren(...specs.slice(0, shown).map((spec) => {
    const line = backends.map((backend) => cells.get(`${spec} ${backend}`));
    const values = line.map((row) => (row && row.median_s !== null ? derived(state.quantity, row.median_s, row) : null));
    const known = values.filter((value) => value !== null);
    const best = known.length ? (lower ? Math.min(...known) : Math.max(...known)) : null;
    return el("tr", {}, el("td", {}, spec), el("td", { class: "quiet" }, phases.get(spec)),
      ...line.map((row, i) => {
        if (!row) return el("td", { class: "number quiet" }, "not planned");
        if (values[i] === null) return el("td", { class: "number quiet" }, seriesLink(row.id, row.status));
        const behind = lower ? values[i] / best - 1 : best / values[i] - 1;
        return el("td", { class: values[i] === best ? "number best" : "number" }, seriesLink(row.id, number(values[i])),
          values[i] === best ? null : el("span", { class: "quiet" }, behind >= 1 ? ` x${number(1 + behind)}` : ` +${(behind * 100).toFixed(0)} %`));
      }));
  }));
  const refused = rows.filter((row) => row.median_s === null);
  showMore("more-refusals", refused.length, "rows");
  $("refusals").hidden = !refused.length;
  $("refusals").querySelector("tbody").replaceChildren(...refused.slice(0, shown).map((row) => el("tr", {},
    el("td", {}, row.backend), el("td", {}, seriesLink(row.id, row.batch_spec)), el("td", {}, row.status), el("td", {}, row.reasons.join("; ")))));
}

function showMore(id, count, what) {
  $(id).replaceChildren();
  if (count > shown) $(id).append(el("button", { type: "button", onclick: () => { shown = Infinity; table(); } }, `Show all ${count} ${what}`));
}

function show() {
  choose();
  history.replaceState(null, "", `#group=${encodeURIComponent(state.group)}&q=${state.quantity}`);
  draw("sides", chart);
  table();
}

for (const [id, key] of [["group", "group"], ["where", "where"], ["phase", "phase"]]) {
  $(id).addEventListener("input", (event) => { state[key] = event.target.value; shown = SHOWN; show(); });
}
if (all.length) show();
