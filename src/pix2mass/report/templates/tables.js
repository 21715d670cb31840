"use strict";
// Sorting and filtering of tables of class "data"; docs/decisions says why there is no library. Without scripts the
// tables are complete, in the order of the page.
const wordsOf = (cell) => cell.textContent.trim().replace(/\s+/g, " ");
// Numbers are written with a true minus sign, and "0.68 ± 0.02" counts as its first part. A dash stands for none.
const numberOf = (cell) => parseFloat(cell.dataset.value ?? wordsOf(cell).replace("−", "-"));
const isKnown = (cell) => !["", "–"].includes(wordsOf(cell));

// Names sort as words, with the numbers inside them as numbers; the other columns as numbers if all of them are.
function orderOf(cells) {
  if (cells.every((cell) => cell.tagName === "TD" && !Number.isNaN(numberOf(cell)))) {
    return (a, b) => numberOf(a) - numberOf(b);
  }
  return (a, b) => wordsOf(a).localeCompare(wordsOf(b), "en", { numeric: true });
}

function makeSortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const falling = head.getAttribute("aria-sort") === "ascending";
      const cells = [...body.rows].map((row) => row.cells[column]);
      const known = cells.filter(isKnown);
      const order = orderOf(known);
      known.sort((a, b) => (falling ? order(b, a) : order(a, b)));
      body.append(...[...known, ...cells.filter((cell) => !isKnown(cell))].map((cell) => cell.parentElement));
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", falling ? "descending" : "ascending");
    });
  });
}

// "z>0.3" asks for a column by its short name, any other word for a row that holds it; all must hold.
function conditionOf(word, columns) {
  const [, name, sign, limit] = word.match(/^([^<>=]+)(<=|>=|<|>|=)([+-]?[\d.]+)$/) || [];
  const column = columns.indexOf((name || "").toLowerCase());
  if (column < 0) return (row) => [...row.cells].map(wordsOf).join(" ").toLowerCase().includes(word.toLowerCase());
  const holds = {
    "<": (a, b) => a < b, ">": (a, b) => a > b, "=": (a, b) => a === b, "<=": (a, b) => a <= b, ">=": (a, b) => a >= b,
  }[sign];
  return (row) => holds(numberOf(row.cells[column]), parseFloat(limit));
}

function makeFilterable(table) {
  const rows = [...table.tBodies[0].rows];
  const columns = [...table.tHead.rows[0].cells].map((head) => (head.dataset.name || wordsOf(head)).toLowerCase());
  const label = document.createElement("label");
  const input = document.createElement("input");
  const count = document.createElement("output");
  label.className = "filter";
  input.type = "search";
  input.placeholder = table.dataset.filter;
  input.setAttribute("autocomplete", "off");
  input.setAttribute("spellcheck", "false");
  label.append("Filter ", input, " ", count);
  const show = () => {
    const conditions = input.value.split(/\s+/).filter(Boolean).map((word) => conditionOf(word, columns));
    let shown = 0;
    for (const row of rows) {
      row.hidden = !conditions.every((holds) => holds(row));
      shown += row.hidden ? 0 : 1;
    }
    count.textContent = `${shown} of ${rows.length}`;
  };
  input.addEventListener("input", show);
  show();
  table.parentElement.before(label);
}

for (const table of document.querySelectorAll("table.data")) {
  if ("filter" in table.dataset) makeFilterable(table);
  makeSortable(table);
}
