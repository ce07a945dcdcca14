// Saved answers of `attnbench choose`. Runs last: it also starts the page.
"use strict";

const isExpired = (one) => Boolean(one.expires_at) && Date.parse(one.expires_at) < Date.now();
const said = (one) => {
  if (!one.winner) return "not measured";
  if (one.verdict === "tie") return `= tie of ${one.tie_class.join(", ")}`;
  if (one.verdict === "decided") return `before ${one.runner_up} ${estimateText(one.margin)}`;
  return one.verdict === "open" ? `? open: ${one.runner_up} ${estimateText(one.margin)}` : one.verdict;
};
function regretText(one) {
  if (!one.regret) return `not known${one.default_why ? `: ${one.default_why}` : ""}`;
  return one.default_tied ? `none: tied with the winner (${estimateText(one.regret)})` : estimateText(one.regret);
}
function adviceTable() {
  $("advice-section").hidden = !advice.length;
  $("advice").tHead.replaceChildren(el("tr", {}, ...["Answer", "Device", "Layers and batches", "Winner", "Regret of the default", "Flags", "Holds until"].map((text) => el("th", {}, text))));
  $("advice").tBodies[0].replaceChildren(...advice.map((one) => el("tr", {},
    el("th", { scope: "row" }, one.name, one.made_up ? el("span", { class: "tag undecided" }, " MADE UP") : null),
    el("td", {}, one.device),
    el("td", {}, el("details", {}, el("summary", {}, `${one.layers.length === 1 ? one.layers[0] : `${one.layers.length} kinds of layers`}, ${one.batches.length === 1 ? one.batches[0].batch : `${one.batches.length} batches`}`),
      el("ul", {}, ...one.layers.map((text) => el("li", {}, text)), ...one.batches.slice(0, 50).map((batch) => el("li", {}, `${number(batch.weight)} × ${batch.batch}`)), one.batches.length > 50 ? el("li", {}, `and ${one.batches.length - 50} more`) : null))),
    el("td", {}, el("strong", {}, one.winner), ` ${said(one)}`),
    el("td", {}, `${one.engine}, ${one.default}: ${regretText(one)}`),
    el("td", { class: "flags" }, one.flags.length ? el("code", {}, one.flags.join(" ")) : one.flags_why),
    el("td", { class: "tag" }, dateText(one.expires_at).slice(0, 10), isExpired(one) ? el("span", { class: "tag undecided" }, " expired") : null))));
  labelCells($("advice"));
}
function exportAdvice() {
  saveCsv("advice.csv", ["answer", "device", "timer", "layers", "batches", "verdict", "winner", "runner_up", "margin", "engine", "default", "regret", "regret_low", "regret_high", "flags", "expires_at"],
    advice.map((one) => [one.name, one.device, one.timer, one.layers.join("; "), one.batches.map((batch) => `${batch.weight}*${batch.batch}`).join("; "), one.verdict, one.winner, one.runner_up, one.margin && one.margin.ratio, one.engine, one.default, one.regret && one.regret.ratio, one.regret && one.regret.low, one.regret && one.regret.high, one.flags.join(" "), one.expires_at]));
}
$("export-advice").addEventListener("click", exportAdvice);
adviceTable();
follow();
