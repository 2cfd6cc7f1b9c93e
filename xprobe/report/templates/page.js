"use strict";
(() => {
  const root = document.documentElement;
  const remembered = (value) => {
    try {
      if (value === undefined) return localStorage.getItem("xprobe-theme");
      localStorage.setItem("xprobe-theme", value);
    } catch { /* a page from the disk may have no storage */ }
    return null;
  };
  const theme = remembered();
  if (theme === "light" || theme === "dark") root.dataset.theme = theme;
  document.getElementById("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    remembered(root.dataset.theme);
  });

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      const numbers = head.classList.contains("number");
      const key = (row) => {
        const value = row.cells[column].dataset.sort;
        if (value === undefined) return null;
        return numbers ? Number(value) : value;
      };
      const rows = [...table.tBodies[0].rows].map((row) => [key(row), row]);
      rows.sort(([one], [other]) => {
        if (one === null || other === null) return (one === null) - (other === null);  // what is missing comes last
        const order = numbers ? one - other : one.localeCompare(other);
        return up ? order : -order;
      });
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      table.tBodies[0].append(...rows.map(([, row]) => row));
    }));
  }

  const charts = JSON.parse(document.getElementById("charts").textContent);
  const drawn = [...document.querySelectorAll("[data-chart]")].map((place) =>
    vegaEmbed(place, charts[place.dataset.chart], { renderer: "svg", actions: false, tooltip: { theme: "custom" } }));
  Promise.all(drawn).then(() => { root.dataset.drawn = String(drawn.length); });
})();
