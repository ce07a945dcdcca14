"use strict";

const details = JSON.parse($("details").textContent);
const FILTERS = ["q", "device", "versions", "kind", "cost"];
const rows = [...$("changes").tBodies[0].rows];
const lines = rows.map((row) => row.textContent.toLowerCase());

// What is chosen and the open cell are in the address: `#device=9.0&cell=9.0+head_size%3D128`.
const address = () => new URLSearchParams(location.hash.slice(1));
function addressWith(changes) {
  const now = address();
  for (const [name, value] of Object.entries(changes)) {
    if (value) now.set(name, value);
    else now.delete(name);
  }
  return `#${now}`;
}

const isShown = (row) => !row.hidden;
function filter() {
  const words = $("q").value.toLowerCase().split(/\s+/).filter(Boolean);
  rows.forEach((row, i) => {
    row.hidden = !(FILTERS.slice(1).every((name) => !$(name).value || row.dataset[name] === $(name).value) &&
      words.every((word) => lines[i].includes(word)));
  });
  const count = rows.filter(isShown).length;
  $("count").textContent = count === rows.length ? `${count}` : `${count} of ${rows.length}`;
  if (rows.length) $("none").hidden = count > 0;
}

function list(texts) {
  return el("ul", {}, ...texts.map((text) => el("li", {}, text)));
}
function facts(pairs) {
  return el("dl", { class: "facts" }, ...pairs.filter(([, value]) => value !== null && value !== undefined && value !== "")
    .flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
}
function table(head, body, rowClass = () => null) {
  return el("div", { class: "scroll" }, el("table", {},
    el("thead", {}, el("tr", {}, ...head.map((text) => el("th", {}, text)))),
    el("tbody", {}, ...body.map((row, i) => el("tr", { class: rowClass(i) }, ...row.map((text) => el("td", {}, text)))))));
}
function say(value) {
  if (value === null || value === undefined) return "not stated";
  if (Array.isArray(value)) return value.map(say).join(", ");
  if (typeof value === "object") {
    return Object.entries(value).map(([name, one]) => `${name}: ${say(one)}`).join("; ");
  }
  return String(value);
}
const words = (name) => name.replaceAll("_", " ");
const interval = (found) => (found.ratio === null ? "" :
  changeText(found.ratio) + (found.low === null ? "" : ` [${changeText(found.low)}, ${changeText(found.high)}]`));

function sideView(index, version, how) {
  const side = details.sides[index];
  const candidates = details.candidates[side.candidates];
  const chosen = candidates.findIndex((one) => one.backend === side.backend);
  const notes = [
    ["chosen", side.backend || "no backend"],
    ["class", side.class],
    ["obtained", how],
    ["model override", side.model_override],
    ["refused", side.refused],
    ["holds with", side.depends_on.join("\n")],
    ["not certain", side.untrusted.join("\n")],
    ["not evaluated", side.not_evaluated.join("\n")],
    ["not asked about", side.not_asked.join(", ")],
  ];
  return el("div", {}, el("h4", {}, `${version}: ${side.backend || "no backend"}`), facts(notes),
    Object.keys(side.behind).length ? el("h4", {}, "Behind the name") : null,
    facts(Object.entries(side.behind).map(([name, value]) => [words(name), say(value)])),
    candidates.length ? el("h4", {}, "Candidates, in the platform's order") : null,
    candidates.length ? table(["", "Backend", "Why not"], candidates.map((one, i) => [
      i + 1,
      one.backend,
      (one.reasons.join("; ") || (i === chosen ? "chosen" : "valid")) +
        (one.absent.length ? ` (absent here: ${one.absent.join(", ")})` : ""),
    ]), (i) => (i === chosen ? "chosen" : null)) : null);
}

const seconds = (side) => (side ? `${side.backend} ${timeText(side.seconds)}` : "not measured");
function costView(cost) {
  const how = [cost.device_class, cost.timer, cost.l2_state && `L2 ${cost.l2_state}`, cost.execution].filter(Boolean);
  return el("div", {},
    el("p", {}, el("strong", {}, `${details.signs[cost.verdict] || ""} ${cost.verdict}`), " ",
      [interval(cost), how.join(", "), cost.why, cost.certain ? "" : "whether the default changes is not certain"].filter(Boolean).join("; ")),
    cost.batches.length ? table(["Batch", "Share", "Before", "After", "Change", ""], cost.batches.map((one) =>
      [one.batch, number(one.weight), seconds(one.before), seconds(one.after), interval(one), one.same_kernels ? "same kernels" : one.why])) : null,
    cost.notes.length ? list(cost.notes) : null,
    cost.measure ? el("p", {}, "Measure it: ", el("code", { class: "again" }, cost.measure)) : null);
}

function changeView(change) {
  const [before, after] = change.versions;
  const [old, now] = [details.sides[change.before].backend, details.sides[change.after].backend];
  const names = old === now ? old : `${old || "no backend"} → ${now || "no backend"}`;
  return el("section", {},
    el("h3", {}, `${before} → ${after}: ${details.kinds[change.kind]}, ${names}`),
    list(change.reasons),
    change.behind.length ? table(["Behind the name", before, after], change.behind.map((one) => [words(one.what), say(one.before), say(one.after)])) : null,
    ...(change.cost || []).map(costView),
    el("div", { class: "sides" }, sideView(change.before, before, change.how[0]), sideView(change.after, after, change.how[1])));
}

function openCell() {
  const id = address().get("cell");
  const dialog = $("detail");
  if (!id) {
    if (dialog.open) dialog.close();
    return;
  }
  const changes = Object.hasOwn(details.cells, id) ? details.cells[id] : null;
  $("detail-title").textContent = id;
  $("detail-body").replaceChildren(...(changes ? changes.map(changeView) : [el("p", {}, "This cell does not change.")]));
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
}

function follow() {
  const now = address();
  for (const name of FILTERS) {
    if ($(name).value !== (now.get(name) || "")) $(name).value = now.get(name) || "";
  }
  filter();
  openCell();
}

function exportCsv() {
  const body = rows.filter(isShown).map((row) => {
    const cells = [...row.querySelectorAll("[data-cell]")].map((one) => one.textContent);
    const reasons = [...row.querySelectorAll(".reasons li")].map((one) => one.textContent);
    const { device, versions, kind, cost } = row.dataset;
    const [before, after] = versions.split(" → ");
    return [device, before, after, kind, row.querySelector(".headline").textContent, cells.length, cells.join("; "), reasons.join(". "), cost];
  });
  saveCsv("upgrade.csv", ["device", "from", "to", "kind", "change", "cells", "which", "why", "cost"], body);
}

for (const name of FILTERS.slice(1)) {
  const values = unique(rows.map((row) => row.dataset[name]));
  if (name === "device") values.sort((a, b) => parseFloat(a) - parseFloat(b));
  fillSelect($(name), [["", "all"], ...values.map((value) => [value, value])], "");
  $(name).parentElement.hidden = values.length < 2;
}
for (const name of FILTERS) {
  $(name).addEventListener("input", () => {
    history.replaceState(null, "", addressWith({ [name]: $(name).value }));
    filter();
  });
}
for (const anchor of document.querySelectorAll("[data-cell]")) {
  anchor.addEventListener("click", (event) => {
    event.preventDefault();
    location.hash = addressWith({ cell: anchor.dataset.cell });
  });
}
for (const anchor of document.querySelectorAll("a.filter")) {
  anchor.addEventListener("click", () => $("all-changes").scrollIntoView());
}
$("detail-close").addEventListener("click", () => $("detail").close());
$("detail").addEventListener("click", (event) => { if (event.target === $("detail")) $("detail").close(); });
$("detail").addEventListener("close", () => history.replaceState(null, "", addressWith({ cell: "" })));
$("export").addEventListener("click", exportCsv);
window.addEventListener("hashchange", follow);
follow();
