// What every page uses. All text from data is set as text, never as markup.
"use strict";

const data = () => window.attnbenchData || {};
const shows = (page) => document.body.dataset.pages.split(" ").includes(page);
const $ = (id) => document.getElementById(id);

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "onclick") node.addEventListener("click", value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined).map((child) =>
    child instanceof Node ? child : document.createTextNode(String(child))));
  return node;
}

function link(href, text, isShown) {
  return isShown ? el("a", { href }, text) : document.createTextNode(text);
}
const seriesLink = (id, text) => link(`series.html#${id}`, text, shows("series"));
const runLink = (number, text) => link(`conditions.html#run=${number}`, text, shows("conditions"));

// Data files that are not in the page are script tags added when needed: fetch is refused from disk.
const loading = {};
function loadData(name) {
  if (name in data()) return Promise.resolve(data()[name]);
  if (!loading[name]) {
    loading[name] = new Promise((resolve, reject) => {
      const script = el("script", { src: `data/${name}.js` });
      script.addEventListener("load", () => resolve(data()[name]));
      script.addEventListener("error", () => reject(new Error(`data/${name}.js is missing`)));
      document.head.append(script);
    });
  }
  return loading[name];
}

// Long columns name their distinct values once.
function unpacked(columns) {
  const plainColumn = (column) => (Array.isArray(column) ? column : column.at.map((at) => column.words[at]));
  return Object.fromEntries(Object.entries(columns).map(([name, column]) => [name, plainColumn(column)]));
}

// The index as one object per series; texts are stored once and pointed at.
function indexRows() {
  const { columns, count } = data().index;
  const rows = [];
  for (let i = 0; i < count; i++) {
    const row = {};
    for (const [name, column] of Object.entries(columns)) {
      row[name] = Array.isArray(column) ? column[i] : column.words[column.at[i]];
    }
    rows.push(row);
  }
  return rows;
}

const isTimed = (status) => status === "OK" || status === "NOISY";

// Mirrors attnbench/history/derived.py; a test compares the two.
function derive(quantity, seconds, identity) {
  if (!(seconds > 0)) return null;
  if (quantity === "latency") return seconds;
  if (quantity === "itl") return identity.phase === "decode" ? seconds * identity.num_layers : null;
  const amount = { tflop_s: identity.flops, gb_s: identity.bytes_moved, tokens_s: identity.num_tokens, roofline: identity.attainable_s };
  return amount[quantity] ? amount[quantity] / seconds : null;
}
const info = (quantity) => data().index.quantities[quantity];
function derived(quantity, seconds, identity) {
  const value = derive(quantity, seconds, identity);
  return value === null ? null : value * info(quantity).scale;
}
function hasQuantity(quantity, identity) {
  return derive(quantity, 1, identity) !== null;
}

function median(values) {
  const ordered = [...values].sort((a, b) => a - b);
  const middle = ordered.length >> 1;
  if (!ordered.length) return null;
  return ordered.length % 2 ? ordered[middle] : (ordered[middle - 1] + ordered[middle]) / 2;
}

// Making a formatter takes longer than using it.
const formats = new Map();
function format(digits) {
  if (!formats.has(digits)) formats.set(digits, new Intl.NumberFormat("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits }));
  return formats.get(digits);
}
// Three significant digits, as many as a benchmark deserves; thousands separated.
function number(value) {
  if (value === null || value === undefined) return "";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(2);
  const digits = size === 0 ? 0 : Math.max(0, 2 - Math.floor(Math.log10(size)));
  return format(digits).format(value);
}
function timeText(seconds) {
  if (seconds === null || seconds === undefined) return "";
  if (seconds >= 1) return `${number(seconds)} s`;
  return seconds >= 1e-3 ? `${number(seconds * 1e3)} ms` : `${number(seconds * 1e6)} µs`;
}
function changeText(ratio) {
  if (ratio === null || ratio === undefined) return "";
  if (ratio >= 2) return `x${number(ratio)}`;
  const percent = (ratio - 1) * 100;
  return `${percent < 0 ? "−" : "+"}${Math.abs(percent).toFixed(1)} %`;
}
function durationText(seconds) {
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}
function shortCommit(commit) {
  const plus = commit.indexOf("+");
  return plus < 0 ? commit.slice(0, 7) : commit.slice(0, 7) + commit.slice(plus);
}
const dateText = (iso) => (iso ? iso.slice(0, 16).replace("T", " ") : "");

const SIGNS = { REGRESSION: "▲", IMPROVEMENT: "▼", UNCHANGED: "=", UNDECIDED: "?", INVALID: "×" };
function verdictTag(verdict) {
  if (!verdict) return el("span", { class: "quiet" }, "not judged");
  return el("span", { class: `tag ${verdict.toLowerCase()}` }, `${SIGNS[verdict]} ${verdict}`);
}

// A row of buttons of which one is pressed.
function choice(holder, options, chosen, onChoose) {
  holder.querySelectorAll("button").forEach((button) => button.remove());
  for (const [value, label] of options) {
    holder.append(el("button", {
      type: "button",
      "data-value": value,
      "aria-pressed": String(value === chosen),
      onclick: () => onChoose(value),
    }, label));
  }
}
function fillSelect(select, options, chosen) {
  select.replaceChildren(...options.map(([value, label]) =>
    el("option", { value, selected: value === chosen }, label)));
}
const unique = (values) => [...new Set(values)];

// Text that a spreadsheet would run as a formula is made text again.
function csvCell(value) {
  if (value === null || value === undefined) return "";
  let text = String(value);
  if (typeof value === "string" && /^[=+\-@\t\r]/.test(text)) text = `'${text}`;
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}
function saveCsv(name, header, rows) {
  const text = [header, ...rows].map((row) => row.map(csvCell).join(",")).join("\n") + "\n";
  const address = URL.createObjectURL(new Blob([text], { type: "text/csv;charset=utf-8" }));
  const anchor = el("a", { href: address, download: name });
  document.body.append(anchor);
  anchor.click();
  anchor.remove();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}

// `#a1b2&x=stack` and `#run=3` as an object; the part without `=` is `id`.
function readHash() {
  const parts = {};
  const text = (part) => { try { return decodeURIComponent(part); } catch (error) { return part; } };
  for (const part of location.hash.slice(1).split("&")) {
    const at = part.indexOf("=");
    if (at < 0) parts.id = text(part);
    else parts[text(part.slice(0, at))] = text(part.slice(at + 1));
  }
  return parts;
}
