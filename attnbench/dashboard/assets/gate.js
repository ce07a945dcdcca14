"use strict";

// Share of slow-downs that were alarms by each night, with its limits; a line a step and timer.
const rows = data().gate.power.by_timer;
const timers = unique(rows.map((row) => row.timer));

function power() {
  const traces = rows.map((row) => {
    const steps = unique(rows.filter((one) => one.timer === row.timer).map((one) => one.step));
    const at = steps.indexOf(row.step);
    const rates = row.confirmed.map((one) => (one.rate === null ? null : one.rate * 100));
    return {
      type: "scatter", mode: "lines+markers", name: plain(`+${+(row.step * 100).toFixed(2)} %${timers.length > 1 ? ` ${row.timer}` : ""}`),
      // Side by side, so that limits do not hide each other.
      x: rates.map((_, i) => i + 1 + (at - (steps.length - 1) / 2) * 0.03 + timers.indexOf(row.timer) * 0.01), y: rates,
      error_y: { type: "data", symmetric: false, array: row.confirmed.map((one, i) => (rates[i] === null ? 0 : one.high * 100 - rates[i])), arrayminus: row.confirmed.map((one, i) => (rates[i] === null ? 0 : rates[i] - one.low * 100)), thickness: 1.2, width: 3 },
      hovertemplate: "%{y:.1f} %<extra>%{fullData.name}</extra>",
      line: { color: css(`--c${at % 8}`), width: 2, dash: DASHES[timers.indexOf(row.timer) % DASHES.length] },
      marker: { symbol: SYMBOLS[at % SYMBOLS.length], size: 8, color: css(`--c${at % 8}`) },
    };
  });
  const nights = Math.max(1, ...rows.map((row) => row.confirmed.length));
  return {
    traces,
    layout: {
      ...(isNarrow() ? { legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, entrywidth: 105, font: { size: 11 } } } : {}),
      xaxis: axis("nights after the slow-down", { tickvals: Array.from({ length: nights }, (_, i) => i + 1), range: [0.7, nights + 0.3], showgrid: false, zeroline: false }),
      yaxis: axis("alarms (%)", { range: [-2, 104], zeroline: false }),
      annotations: rows.length ? [] : [{ text: "too few nights to replay", showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5 }],
    },
  };
}
draw("power", power);
