"use strict";

const cells = data().matrix;
const reasonsOf = (cell) => cell.refused || cell.reasons || [];
const backendOf = (cell) => cell.backend || "none";
// The seven backends chosen most often get a colour; more could not be told apart.
const COLORED = 7;
const counts = new Map();
for (const cell of cells) counts.set(backendOf(cell), (counts.get(backendOf(cell)) || 0) + 1);
const ranked = [...counts.keys()].filter((name) => name !== "none").sort((a, b) => counts.get(b) - counts.get(a));
const OTHER = "var(--quiet)";
function colorOf(name) {
  if (name === "none") return "transparent";
  return ranked.indexOf(name) < COLORED ? `var(--c${ranked.indexOf(name)})` : OTHER;
}

const chosen = () => cells.filter((cell) =>
  (!$("device").value || cell.device === $("device").value) &&
  (!$("dtype").value || cell.dtype === $("dtype").value) &&
  (!$("backend").value || backendOf(cell) === $("backend").value));

function rowKey(cell) {
  return [cell.device, cell.dtype].join("\u0000");
}
const cellKey = (cell) => [cell.device, cell.dtype, cell.feature, cell.kv_cache_dtype, cell.head_size].join(", ");

function explain(cell, button) {
  document.querySelectorAll(".grid button[aria-pressed]").forEach((other) => other.removeAttribute("aria-pressed"));
  button.setAttribute("aria-pressed", "true");
  const feature = cell.feature === "none" ? "no feature" : cell.feature;
  $("cell").hidden = false;
  $("cell-title").textContent = `${cell.device}, ${cell.dtype}, ${feature}: ${backendOf(cell)}`;
  const more = [`head size ${cell.head_size}`, `KV cache ${cell.kv_cache_dtype}`];
  if (cell.block_size) more.push(`block ${cell.block_size}`);
  if (cell.source) more.push(cell.source);
  if (cell.note) more.push(cell.note);
  if (cell.followed && cell.followed !== cell.backend) more.push(`vLLM itself takes ${cell.followed}`);
  $("cell-source").textContent = more.join(" · ");
  const reasons = reasonsOf(cell);
  $("cell-reasons").replaceChildren(...(reasons.length ? reasons : ["Nothing better ranked refused."]).map((text) => el("li", {}, text)));
}

function show() {
  const rows = chosen();
  const features = unique(cells.map((cell) => cell.feature)).filter((feature) => rows.some((cell) => cell.feature === feature));
  const byPlace = new Map(rows.map((cell) => [`${rowKey(cell)}\u0000${cell.feature}`, cell]));
  $("grid").tHead.replaceChildren(el("tr", {}, el("th", {}, "Device, dtype"), ...features.map((feature) => el("th", {}, feature === "none" ? "no feature" : feature))));
  $("grid").tBodies[0].replaceChildren(...unique(rows.map(rowKey)).map((key) => {
    const [device, dtype] = key.split("\u0000");
    return el("tr", {}, el("th", {}, `${device}, ${dtype}`), ...features.map((feature) => {
      const cell = byPlace.get(`${key}\u0000${feature}`);
      if (!cell) return el("td", {});
      const name = backendOf(cell);
      const button = el("button", { type: "button", class: name === "none" ? "none" : "", style: `border-left-color:${colorOf(name)}`, title: cellKey(cell) }, name);
      button.addEventListener("click", () => explain(cell, button));
      return el("td", {}, button);
    }));
  }));
  const present = unique(rows.map(backendOf));
  const entry = (color, name) => el("span", {}, el("span", { class: "swatch", style: `background:${color}` }), name);
  const colored = ranked.filter((name, i) => i < COLORED && present.includes(name));
  const others = present.some((name) => colorOf(name) === OTHER);
  $("legend").replaceChildren(...colored.map((name) => entry(colorOf(name), name)), ...(others ? [entry(OTHER, "others")] : []));
}

if ($("grid")) {
  const options = (values) => [["", "all"], ...values.map((value) => [value, value])];
  fillSelect($("device"), options(unique(cells.map((cell) => cell.device))), "");
  fillSelect($("dtype"), options(unique(cells.map((cell) => cell.dtype))), "");
  fillSelect($("backend"), options([...ranked].sort().concat(counts.has("none") ? ["none"] : [])), "");
  for (const id of ["device", "dtype", "backend"]) $(id).addEventListener("input", show);
  show();
}
