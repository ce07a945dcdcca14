// plotly in the colours of the page. plotly.js may arrive after the page is read.
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

function axis(title, more = {}) {
  return {
    title: { text: title, standoff: 8 },
    gridcolor: css("--line"),
    linecolor: css("--line"),
    zerolinecolor: css("--line"),
    automargin: true,
    ...more,
  };
}

const isNarrow = () => innerWidth < 640;
const drawn = new Map();

// Draws now or when plotly has loaded, and again when the page turns dark or light.
function draw(id, make) {
  drawn.set(id, make);
  const node = $(id);
  if (!window.Plotly) {
    node.classList.add("waiting");
    return;
  }
  node.classList.remove("waiting");
  const { traces, layout, onClick, onZoom } = make();
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
  for (const [id, make] of drawn) draw(id, make);
}
window.addEventListener("load", redraw);
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
