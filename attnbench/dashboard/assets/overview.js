"use strict";

const SHOWN = 100;
const rows = indexRows();
// One lower-case line per series to search in.
const lines = rows.map((row) =>
  [row.backend, row.workload, row.shape, row.dtype, row.phase, row.metric, row.device, row.how, row.status, row.verdict, row.id]
    .join(" ").toLowerCase());
let shown = SHOWN;

function matching() {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const verdict = $("filter-verdict").value;
  const metric = $("filter-metric").value;
  return rows.filter((row, i) =>
    (!verdict || row.verdict === verdict) &&
    (!metric || row.metric === metric) &&
    words.every((word) => lines[i].includes(word)));
}

function list() {
  const found = matching();
  const kept = { q: $("search").value, verdict: $("filter-verdict").value, metric: $("filter-metric").value === usualMetric ? "" : $("filter-metric").value || "all" };
  if (Object.values(kept).some(Boolean) || readHash().q || readHash().verdict || readHash().metric) writeHash(kept);
  $("series-count").textContent = found.length === rows.length ? `${rows.length}` : `${found.length} of ${rows.length}`;
  $("series-table").tBodies[0].replaceChildren(...found.slice(0, shown).map((row) => el("tr", {},
    el("td", {}, seriesLink(row.id, row.backend)),
    el("td", {}, seriesLink(row.id, row.workload)),
    el("td", { class: "wide" }, row.phase),
    el("td", { class: "quiet wide" }, `${row.device}, ${row.how}`),
    el("td", { class: "number" }, isTimed(row.status) ? timeText(row.latest_s) : row.status),
    el("td", { class: "number" }, changeText(row.ratio)),
    el("td", {}, verdictTag(row.verdict)),
    el("td", { class: "number wide" }, row.runs))));
  const more = $("series-more");
  more.replaceChildren();
  if (found.length > shown) {
    more.append(el("button", { type: "button", onclick: () => { shown = Infinity; list(); } },
      `Show all ${found.length}`));
  } else if (!found.length) {
    more.append("No series matches; take a word away.");
  }
}

function changes() {
  const judged = rows.filter((row) => row.ratio !== null);
  const backends = unique(judged.map((row) => row.backend));
  const widest = Math.max(1.1, judged.reduce((most, row) => Math.max(most, row.ratio, 1 / row.ratio), 1)) * 1.05;
  const place = new Map(backends.map((backend, i) => [backend, i]));
  const { dots, left } = strip(judged, { value: (row) => row.ratio, line: (row) => place.get(row.backend), alike: (row) => row.verdict, widest });
  $("changes-note").textContent = left ? `${judged.length} series; ${left} dots that would lie on others of the same verdict are not drawn.` : "";
  const traces = backends.map((backend) => {
    const own = dots.filter(({ row }) => row.backend === backend);
    const style = backendStyle(backend);
    return {
      type: "scatter",
      mode: "markers",
      name: plain(backend),
      x: own.map(({ row }) => row.ratio),
      // A fixed scatter by rank keeps dots apart without making up a value.
      y: own.map(({ y }) => y),
      text: own.map(({ row }) => `${plain(row.backend)}<br>${plain(row.workload)}<br>${changeText(row.ratio)}  ${row.verdict}`),
      customdata: own.map(({ row }) => row.id),
      hovertemplate: "%{text}<extra></extra>",
      marker: {
        color: style.color,
        symbol: style.symbol,
        size: own.map(({ row }) => (row.verdict === "UNCHANGED" ? 8 : 12)),
        opacity: own.map(({ row }) => (row.verdict === "UNCHANGED" ? 0.65 : 1)),
        line: { width: own.map(({ row }) => (row.verdict === "UNCHANGED" ? 0 : 2)), color: css("--ink") },
      },
    };
  });
  return {
    traces,
    layout: {
      showlegend: false,
      xaxis: axis(isNarrow() ? "newest / baseline (log scale)" : "latency, newest run / baseline (log scale)", {
        type: "log",
        range: [-Math.log10(widest), Math.log10(widest)],
        tickformat: ".3~g",
      }),
      yaxis: axis("", {
        tickvals: backends.map((_, i) => i),
        ticktext: backends.map(plain),
        range: [backends.length - 0.5, -0.5],
        zeroline: false,
        showgrid: false,
      }),
      shapes: [{ type: "line", x0: 1, x1: 1, yref: "paper", y0: 0, y1: 1, line: { color: css("--quiet"), width: 1 } }],
      annotations: judged.length ? [] : [{ text: "no series has a baseline yet", showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5 }],
    },
    onClick: (point) => { if (shows("series")) location.href = `series.html#${point.customdata}`; },
  };
}

fillSelect($("filter-verdict"), [["", "all"], ...unique(rows.map((row) => row.verdict)).filter(Boolean).sort().map((v) => [v, v])], "");
const metrics = unique(rows.map((row) => row.metric)).sort();
const usualMetric = metrics.includes("attention") ? "attention" : "";
fillSelect($("filter-metric"), [["", "all"], ...metrics.map((m) => [m, m])], usualMetric);
function ask() {
  const asked = readHash();
  $("search").value = asked.q || "";
  $("filter-verdict").value = asked.verdict || "";
  $("filter-metric").value = asked.metric === "all" ? "" : asked.metric || usualMetric;
  return asked;
}
ask();
window.addEventListener("hashchange", () => {
  const { q, verdict, metric } = ask();
  shown = SHOWN;
  list();
  if (q || verdict || metric) $("all-series").scrollIntoView();
});
for (const id of ["search", "filter-verdict", "filter-metric"]) {
  $(id).addEventListener("input", () => { shown = SHOWN; list(); });
}
list();
draw("changes", changes);

function exportCsv() {
  saveCsv("series.csv", ["series", "backend", "workload", "shape", "dtype", "phase", "metric", "device", "how", "status", "latest_s", "ratio", "verdict", "runs"],
    matching().map((row) => [row.id, row.backend, row.workload, row.shape, row.dtype, row.phase, row.metric, row.device, row.how, row.status, row.latest_s, row.ratio, row.verdict, row.runs]));
}
$("series-export").addEventListener("click", exportCsv);
