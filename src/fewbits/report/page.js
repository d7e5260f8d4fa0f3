// Sorting by the buttons in the heads of a table; the pinned rows stand in a body of their own.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[table.tBodies.length - 1];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((other) => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (row) => {
      const value = row.cells[column].dataset.value;
      if (value !== undefined) return Number(value);
      return head.classList.contains("text") ? row.cells[column].textContent : null;
    };
    const compare = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === null || y === null) return (x === null) - (y === null); // unknown ones last, always
      const order = typeof x === "number" ? x - y : x.localeCompare(y, "en", { numeric: true });
      return down ? -order : order;
    };
    body.append(...[...body.rows].sort(compare));
  }));
}
// On paper what is folded cannot be unfolded.
const paper = matchMedia("print");
paper.addEventListener("change", () => {
  for (const details of document.querySelectorAll("details:not(.long)")) {
    if (paper.matches && !details.open) {
      details.dataset.unfolded = "";
      details.open = true;
    } else if (!paper.matches && "unfolded" in details.dataset) {
      delete details.dataset.unfolded;
      details.open = false;
    }
  }
});
