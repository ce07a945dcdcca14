// Of asv's own pages: leads from the graph that is looked at to the series it shows.
"use strict";

(() => {
  const anchor = document.querySelector("#nav-li-attnbench a");
  const home = anchor.getAttribute("href");
  const folder = home.replace("index.html", "");
  const plainText = anchor.textContent;

  function chosen() {
    const [name, query] = location.hash.slice(1).replace(/^\//, "").split("?");
    const params = new URLSearchParams(query || "");
    // asv writes a text as Python does, in quotes; several may be chosen, then it is no one series.
    const one = (axis) => { const values = params.getAll(`p-${axis}`); return values.length === 1 ? values[0].replace(/^'(.*)'$/, "$1") : ""; };
    const [workload, backend] = [one("workload"), one("backend")];
    if (!workload || !backend) return null;
    const parts = decodeURIComponent(name).split(".");
    const metric = parts[0] === "nightly" ? parts[2] : parts[parts.length - 1].replace(/^track_/, "");
    const [plainName, variant] = backend.split(":");
    return { backend: variant ? `${plainName} [${variant}]` : plainName, workload, metric };
  }

  function update() {
    const found = chosen();
    anchor.href = found ? `${folder}series.html#${new URLSearchParams(found)}`.replaceAll("+", "%20") : home;
    anchor.textContent = found ? "this series in attnbench" : plainText;
  }
  addEventListener("hashchange", update);
  update();
})();
