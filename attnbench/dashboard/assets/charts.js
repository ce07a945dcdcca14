// plotly in the colours of the page. plotly.js is large: it is asked for when the first chart comes near the sight.
"use strict";

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "x", "triangle-down", "star", "cross"];
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];

// The same backend has the same colour and shape on every page and in every chart.
function backendStyle(backend) {
  const words = data().index.columns.backend.words;
  const at = Math.max(0, words.indexOf(backend));
  return {
    color: css(`--c${at % 8}`),
    symbol: SYMBOLS[at % SYMBOLS.length],
    dash: DASHES[Math.floor(at / 8) % DASHES.length],
  };
}

// plotly reads a few tags in its texts: names from data must not become any.
const plain = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

// Dots of a strip, beside each other where they would lie on each other. Of a crowd that is drawn alike only
// as many are kept as there is room for: the others would be painted over. `left` counts those left out.
const ROOM = 7;
function strip(rows, { value, line, alike, widest }) {
  const bin = Math.log(widest) / 150;
  const crowds = new Map();
  const dots = [];
  let left = 0;
  for (const row of rows) {
    const key = `${line(row)} ${alike(row)} ${Math.round(Math.log(value(row)) / bin)}`;
    const count = crowds.get(key) || 0;
    crowds.set(key, count + 1);
    if (count >= ROOM) { left += 1; continue; }
    dots.push({ row, y: line(row) + ((dots.length % ROOM) - (ROOM >> 1)) * 0.08 });
  }
  return { dots, left };
}

// On a phone a title stands in several lines, so that nothing of it is cut off.
function titleLines(title) {
  if (!isNarrow()) return title;
  const lines = [""];
  for (const word of title.split(" ")) {
    if (lines[lines.length - 1].length + word.length > 22) lines.push("");
    lines.push(`${lines.pop()} ${word}`.trim());
  }
  return lines.filter(Boolean).join("<br>");
}
function axis(title, more = {}) {
  return {
    title: { text: titleLines(title), standoff: 8 },
    gridcolor: css("--line"),
    linecolor: css("--line"),
    zerolinecolor: css("--line"),
    automargin: true,
    ...more,
  };
}

const isNarrow = () => innerWidth < 640;
const drawn = new Map();

let isPlotlyAsked = false;
function loadPlotly() {
  if (isPlotlyAsked) return;
  isPlotlyAsked = true;
  const script = el("script", { src: "assets/plotly.min.js" });
  script.addEventListener("load", redraw);
  script.addEventListener("error", () => {
    for (const id of drawn.keys()) $(id).classList.replace("waiting", "missing");
  });
  document.head.append(script);
}

// A chart far below costs nothing until somebody scrolls there.
const near = new Set();
const watcher = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    watcher.unobserve(target);
    near.add(target.id);
    paint(target.id);
  }
}, { rootMargin: "60% 0px" });

// Draws when it is in sight or nearly, and again when the page turns dark or light.
function draw(id, make) {
  drawn.set(id, make);
  if (near.has(id)) paint(id);
  else {
    $(id).classList.add("waiting");
    watcher.observe($(id));
  }
}

function paint(id) {
  const node = $(id);
  if (!window.Plotly) {
    loadPlotly();
    return;
  }
  node.classList.remove("waiting");
  const { traces, layout, onClick, onZoom } = drawn.get(id)();
  const full = {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 13, color: css("--ink") },
    margin: { l: 62, r: 16, t: 18, b: 52 },
    hoverlabel: { bgcolor: css("--raised"), bordercolor: css("--line"), font: { color: css("--ink") }, align: "left" },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    // Its default is a half-opaque black where the paper is transparent.
    modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--quiet"), activecolor: css("--ink") },
    ...layout,
  };
  const options = { displaylogo: false, responsive: true, displayModeBar: "hover", modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"] };
  window.Plotly.react(node, traces, full, options).then(() => {
    node.removeAllListeners("plotly_click");
    if (onClick) node.on("plotly_click", (event) => onClick(event.points[0]));
    node.removeAllListeners("plotly_relayout");
    if (onZoom) {
      node.on("plotly_relayout", (event) => {
        if (event["xaxis.autorange"]) onZoom(null);
        else if ("xaxis.range[0]" in event) onZoom([event["xaxis.range[0]"], event["xaxis.range[1]"]]);
        else if ("xaxis.range" in event) onZoom(event["xaxis.range"]);
      });
    }
    node.dataset.drawn = String(Number(node.dataset.drawn || 0) + 1);
  });
}
function redraw() {
  for (const id of drawn.keys()) if (near.has(id)) paint(id);
}
window.addEventListener("beforeprint", () => {
  for (const id of drawn.keys()) near.add(id);
  redraw();
});
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
