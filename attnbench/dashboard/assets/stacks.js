// What differs between the software and machines of two runs.
"use strict";

function packagesOf(run) {
  const versions = {};
  for (const entry of data().runs.stacks[run.stack] || []) {
    const [name, version] = entry.split("==");
    versions[name] = version || "";
  }
  const facts = { driver: run.driver, cuda: run.facts.cuda_version, container: run.facts.container_digest };
  for (const [name, value] of Object.entries(facts)) if (value) versions[name] = value;
  return versions;
}

// Of the machine only what both runs know of: an older file may lack a fact.
const MACHINE = { hostname: "host", device_uuid: "device", compute_capability: "capability", clocks: "clocks" };

function runChange(before, after) {
  const old = packagesOf(before);
  const now = packagesOf(after);
  const changed = unique([...Object.keys(old), ...Object.keys(now)]).sort()
    .filter((name) => old[name] !== now[name])
    .map((name) => (name in old && name in now ? `${name} ${old[name]} → ${now[name]}` : name in now ? `+ ${name} ${now[name]}` : `− ${name} ${old[name]}`));
  for (const [fact, name] of Object.entries(MACHINE)) {
    if (before.facts[fact] && after.facts[fact] && before.facts[fact] !== after.facts[fact]) {
      changed.push(`${name} ${before.facts[fact]} → ${after.facts[fact]}`);
    }
  }
  if (!changed.length && before.stack !== after.stack) changed.push(`stack ${before.stack.slice(0, 7)} → ${after.stack.slice(0, 7)}`);
  return changed;
}
