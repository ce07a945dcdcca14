// CSV export of every table: what is shown, or all rows where the page shows only some.
"use strict";

const cellText = (cell) => [...cell.childNodes].map((node) => node.textContent.trim()).filter(Boolean).join(" ").replace(/\s+/g, " ");

function exportTable(table, name) {
  // Of a table that shows only some rows the rest is shown first.
  if (table.dataset.more) $(table.dataset.more).querySelector("button")?.click();
  const rows = [...table.rows].map((row) => [...row.cells].map(cellText));
  saveCsv(`${name}.csv`, rows[0], rows.slice(1));
}

// A table with its own export has data-csv="no"; the others get a button below them.
function addExports() {
  for (const table of document.querySelectorAll("main table")) {
    const name = table.dataset.csv || table.id || document.body.dataset.page;
    if (name === "no") continue;
    const holder = table.closest(".scroll") || table;
    holder.after(el("p", { class: "csv" }, el("button", { type: "button", class: "small", onclick: () => exportTable(table, name) }, "Export CSV")));
  }
}
addExports();

// A phone shows a row as a block: its cells say which column they are of.
function labelCells(table) {
  const labels = [...table.tHead.rows[0].cells].map((cell) => cell.textContent.trim());
  for (const row of table.tBodies[0].rows) [...row.cells].forEach((cell, i) => { if (cell.tagName === "TD") cell.dataset.label = labels[i]; });
}

// Column heads as buttons: `columns` are { label, value, kind }, `state` has sort and down.
function sortableHead(table, columns, state, onSort) {
  table.tHead.replaceChildren(el("tr", {}, ...columns.map(({ name, label, kind }) => el("th", {
    class: kind || null,
    "aria-sort": state.sort === name ? (state.down ? "descending" : "ascending") : null,
  }, el("button", { type: "button", class: "sort", onclick: () => onSort(name) }, label, state.sort === name ? (state.down ? " ▼" : " ▲") : "")))));
}
function sorted(rows, column, down) {
  const isEmpty = (value) => value === null || value === undefined || value === "";
  const order = (x, y) => (x < y ? -1 : x > y ? 1 : 0);
  // What has no value comes last in both directions.
  return [...rows].sort((r, s) => {
    const [x, y] = [column.value(r), column.value(s)];
    if (isEmpty(x) || isEmpty(y)) return isEmpty(x) - isEmpty(y);
    return down ? order(y, x) : order(x, y);
  });
}

// `#a=1&b=2` of an object; what is empty is left out.
function writeHash(parts) {
  const words = Object.entries(parts).filter(([, value]) => value !== "" && value !== null && value !== undefined && value !== false)
    .map(([name, value]) => (name === "id" ? encodeURIComponent(value) : `${name}=${encodeURIComponent(value)}`));
  history.replaceState(null, "", `#${words.join("&")}`);
}
