// The arithmetic of `attnbench compare` (attnbench/history/rule.py); a test holds the two together.
"use strict";

// ln of the gamma function, Lanczos' series (Numerical Recipes, 3rd ed., 6.1).
function lnGamma(x) {
  const terms = [76.18009172947146, -86.50532032941677, 24.01409824083091, -1.231739572450155, 0.1208650973866179e-2, -0.5395239384953e-5];
  const base = x + 5.5;
  let sum = 1.000000000190015;
  terms.forEach((term, i) => { sum += term / (x + 1 + i); });
  return (x + 0.5) * Math.log(base) - base + Math.log((2.5066282746310005 * sum) / x);
}

// Regularised incomplete beta function by Lentz's continued fraction (Numerical Recipes, 6.4).
function incompleteBeta(a, b, x) {
  if (x <= 0) return 0;
  if (x >= 1) return 1;
  if (x > (a + 1) / (a + b + 2)) return 1 - incompleteBeta(b, a, 1 - x);
  const tiny = 1e-300;
  const front = Math.exp(lnGamma(a + b) - lnGamma(a) - lnGamma(b) + a * Math.log(x) + b * Math.log(1 - x)) / a;
  let c = 1;
  let d = 1 / (1 - ((a + b) * x) / (a + 1) || tiny);
  let fraction = d;
  for (let m = 1; m <= 500; m++) {
    for (const term of [(m * (b - m) * x) / ((a + 2 * m - 1) * (a + 2 * m)), (-(a + m) * (a + b + m) * x) / ((a + 2 * m) * (a + 2 * m + 1))]) {
      d = 1 / (1 + term * d || tiny);
      c = 1 + term / c || tiny;
      fraction *= c * d;
    }
    if (Math.abs(c * d - 1) < 1e-14) break;
  }
  return front * fraction;
}

// The t of a two-sided interval: Student's distribution has `confidence` between -t and t.
const quantiles = new Map();
function tQuantile(confidence, freedom) {
  const key = `${confidence} ${freedom}`;
  if (!quantiles.has(key)) {
    const outside = (t) => incompleteBeta(freedom / 2, 0.5, freedom / (freedom + t * t));
    let low = 0;
    let high = 1;
    while (outside(high) > 1 - confidence) high *= 2;
    for (let i = 0; i < 100; i++) {
      const middle = (low + high) / 2;
      if (outside(middle) > 1 - confidence) low = middle;
      else high = middle;
    }
    quantiles.set(key, (low + high) / 2);
  }
  return quantiles.get(key);
}

function scaledMad(values) {
  const middle = median(values);
  return 1.4826 * median(values.map((value) => Math.abs(value - middle)));
}
function variance(values) {
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  return values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / (values.length - 1);
}

function interval(shift, half) {
  return { ratio: Math.exp(shift), low: Math.exp(shift - half), high: Math.exp(shift + half), enough: true };
}

// `b` over `a`: each a list of runs, a run a list of seconds.
function estimateGroups(a, b, noise, rule) {
  if (Math.min(a.length, b.length) >= rule.min_runs) {
    const [first, second] = [a, b].map((group) => group.map((run) => Math.log(median(run))));
    return interval(median(second) - median(first), welch(first, second, rule.confidence));
  }
  const [first, second] = [a, b].map((group) => group.flat().map(Math.log));
  const shift = median(second) - median(first);
  if (Math.min(first.length, second.length) < noise.min_replicates) {
    return { ratio: Math.exp(shift), low: Math.exp(shift), high: Math.exp(shift), enough: false };
  }
  const freedom = rule.prior_runs + first.length + second.length - 2;
  const squares = [first, second].reduce((sum, side) => sum + (side.length - 1) * scaledMad(side) ** 2, 0);
  const pooled = (rule.prior_runs * noise.spread ** 2 + squares) / freedom;
  const half = tQuantile(rule.confidence, freedom) * Math.sqrt(pooled * (1 / first.length + 1 / second.length));
  return interval(shift, half + Math.log1p(noise.floor));
}

function welch(a, b, confidence) {
  const shares = [a, b].map((group) => variance(group) / group.length);
  const total = shares[0] + shares[1];
  if (total === 0) return 0;
  const squares = shares[0] ** 2 / (a.length - 1) + shares[1] ** 2 / (b.length - 1);
  return tQuantile(confidence, total ** 2 / squares) * Math.sqrt(total);
}

function decide(found, noise) {
  if (!found.enough) return ["UNDECIDED", "too_few_replicates"];
  const limit = 1 + noise.floor;
  if (found.low > 1 && found.ratio > limit) return ["REGRESSION", "slower_than_floor"];
  if (found.high < 1 && found.ratio < 1 / limit) return ["IMPROVEMENT", "faster_than_floor"];
  const hidden = 1 + (found.ratio > limit ? 5 : 20) * noise.floor;
  if (found.low <= 1 && found.high > hidden) return ["UNDECIDED", "interval_too_wide"];
  return ["UNCHANGED", 1 / limit <= found.ratio && found.ratio <= limit ? "within_floor" : "within_noise"];
}

// One series: `a` and `b` are its values in the runs of each side, { status, times } with a code.
function compareValues(a, b, noise, rule) {
  const gravest = (side) => Math.max(...side.map((value) => value.status));
  const [was, is] = [gravest(a), gravest(b)];
  const said = { a_status: was, b_status: is, a_s: null, b_s: null, found: null };
  const verdict = (name, reason, more = {}) => ({ ...said, verdict: name, reason, ...more });
  if ([was, is].some((code) => rule.statuses[code] === "THROTTLED")) return verdict("INVALID", "throttled");
  if (rule.supported[was] !== rule.supported[is]) {
    return rule.supported[is] ? verdict("IMPROVEMENT", "status_recovered") : verdict("REGRESSION", "status_changed");
  }
  const timed = (side) => side.filter((value) => rule.timed[value.status] && value.first.length).map((value) => [...value.first, ...value.again]);
  const [first, second] = [timed(a), timed(b)];
  if (!first.length || !second.length) return verdict("UNCHANGED", "status_same");
  const found = estimateGroups(first, second, noise, rule);
  const [name, reason] = decide(found, noise);
  return verdict(name, reason, { found, a_s: median(first.flat()), b_s: median(second.flat()) });
}
