// Tables that are sorted by a click on a heading: numbers by value, nothing last.

function compare(a, b) {
  if (a === null || b === null) return (a === null) - (b === null);
  return typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
}

/** Sorts rows by a key, largest first where `down`; what has none stays last either way. */
function sorted(rows, key, down) {
  return rows
    .map((row) => [key(row), row])
    .sort(([a], [b]) => (a === null || b === null ? compare(a, b) : (down ? -1 : 1) * compare(a, b)))
    .map(([, row]) => row);
}

/** Marks the heading that was clicked, and says whether its order now goes down. */
function turn(heading, startsDown) {
  const before = heading.getAttribute("aria-sort");
  const down = before ? before === "ascending" : startsDown;
  for (const other of heading.parentElement.children) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", down ? "descending" : "ascending");
  return down;
}

function cellValue(row, i) {
  const cell = row.cells[i];
  if (cell.dataset.v === undefined) return cell.textContent;
  return cell.dataset.v === "" ? null : Number(cell.dataset.v);
}

function makeSortable(table) {
  [...table.tHead.rows[0].cells].forEach((heading, i) => {
    heading.firstElementChild.addEventListener("click", () => {
      const body = table.tBodies[0];
      const isNumber = body.rows.length > 0 && body.rows[0].cells[i].dataset.v !== undefined;
      const down = turn(heading, isNumber);
      body.append(...sorted([...body.rows], (row) => cellValue(row, i), down));
    });
  });
}

for (const table of document.querySelectorAll("table.sortable")) makeSortable(table);
