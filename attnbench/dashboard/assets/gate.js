"use strict";

// Share of slow-downs that were alarms by each night, with its limits; a line a step and timer.
const rows = data().gate.power.by_timer;
const timers = unique(rows.map((row) => row.timer));
const steps = unique(rows.map((row) => row.step)).sort((a, b) => a - b);
const stepText = (step) => `+${+(step * 100).toFixed(2)} %`;
const dashOf = (timer) => DASHES[timers.indexOf(timer) % DASHES.length];
function styleOf(step) {
  const at = steps.indexOf(step);
  return { line: { color: css(`--c${at % 8}`), width: 2 }, marker: { symbol: SYMBOLS[at % SYMBOLS.length], size: 8, color: css(`--c${at % 8}`) } };
}

function power() {
  const lines = rows.map((row) => {
    const rates = row.confirmed.map((one) => (one.rate === null ? null : one.rate * 100));
    const { line, marker } = styleOf(row.step);
    return {
      type: "scatter", mode: "lines+markers", name: plain(`${stepText(row.step)}${timers.length > 1 ? ` ${row.timer}` : ""}`),
      legendgroup: String(row.step), showlegend: false,
      // Side by side, so that limits do not hide each other.
      x: rates.map((_, i) => i + 1 + (steps.indexOf(row.step) - (steps.length - 1) / 2) * 0.03 + timers.indexOf(row.timer) * 0.01), y: rates,
      error_y: { type: "data", symmetric: false, array: row.confirmed.map((one, i) => (rates[i] === null ? 0 : one.high * 100 - rates[i])), arrayminus: row.confirmed.map((one, i) => (rates[i] === null ? 0 : rates[i] - one.low * 100)), thickness: 1.2, width: 3 },
      hovertemplate: "%{y:.1f} %<extra>%{fullData.name}</extra>",
      line: { ...line, dash: dashOf(row.timer) },
      marker,
    };
  });
  // The legend has a colour a step and a dash a timer: together they are fewer than the lines.
  const key = { type: "scatter", x: [null], y: [null] };
  const traces = [
    ...lines,
    ...steps.map((step) => ({ ...key, mode: "lines+markers", name: stepText(step), legendgroup: String(step), ...styleOf(step) })),
    ...(timers.length > 1 ? timers.map((timer) => ({ ...key, mode: "lines", name: plain(timer), line: { color: css("--ink"), width: 2, dash: dashOf(timer) } })) : []),
  ];
  const nights = Math.max(1, ...rows.map((row) => row.confirmed.length));
  return {
    traces,
    layout: {
      showlegend: true,
      xaxis: axis("nights after the slow-down", { tickvals: Array.from({ length: nights }, (_, i) => i + 1), range: [0.7, nights + 0.3], showgrid: false, zeroline: false }),
      yaxis: axis("alarms (%)", { range: [-2, 104], zeroline: false }),
      annotations: rows.length ? [] : [{ text: "too few nights to replay", showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5 }],
    },
  };
}
draw("power", power);
