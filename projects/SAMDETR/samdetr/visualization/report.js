"use strict";
// The page is complete without this: it sorts tables, shows the curves of one class, filters and enlarges images.

function sortBy(header, column) {
  const text = header.classList.contains("text");
  const [first, second] = text ? ["ascending", "descending"] : ["descending", "ascending"];
  const order = header.getAttribute("aria-sort") === first ? second : first;
  for (const other of header.parentNode.children) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", order);
  const body = header.closest("table").tBodies[0];
  const valueOf = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const compare = (a, b) => {
    const [x, y] = [valueOf(a), valueOf(b)];
    if (x === "" || y === "") return (x === "") - (y === ""); // without a value: last
    return (order === "ascending" ? 1 : -1) * (text ? x.localeCompare(y, undefined, { numeric: true }) : x - y);
  };
  body.append(...[...body.rows].sort(compare));
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((header, column) => {
    if (header.classList.contains("unsorted")) return;
    const button = document.createElement("button");
    button.append(...header.childNodes);
    button.addEventListener("click", () => sortBy(header, column));
    header.append(button);
  });
}

const chart = document.querySelector(".chart");
for (const row of document.querySelectorAll(".choosable tbody tr, .choosable tfoot tr")) {
  const button = document.createElement("button");
  button.append(...row.cells[0].childNodes);
  row.cells[0].append(button);
  row.addEventListener("click", () => {
    chart.querySelector("b").textContent = row.cells[0].textContent;
    chart.querySelector(".plot svg").innerHTML = row.querySelector("svg").innerHTML;
  });
}

for (const part of document.querySelectorAll(".scripted")) part.hidden = false;

const filters = document.querySelector(".filters");
if (filters) {
  const [label, kind] = filters.querySelectorAll("select");
  const [score, truth] = filters.querySelectorAll("input");
  const images = [...document.querySelectorAll(".image")];
  const apply = () => {
    const filtered = label.value || kind.value || Number(score.value) > Number(score.min);
    for (const image of images) {
      let fitting = 0;
      for (const box of image.querySelectorAll(".box")) {
        const fits =
          (!label.value || box.dataset.classes.split(" ").includes(label.value)) &&
          (!kind.value || box.dataset.kind === kind.value) &&
          (!box.dataset.score || Number(box.dataset.score) >= Number(score.value));
        box.hidden = !fits;
        fitting += fits;
      }
      image.hidden = filtered && !fitting;
    }
    for (const group of document.querySelectorAll(".group")) group.hidden = !group.querySelector(".image:not([hidden])");
    filters.querySelector("output").textContent = Number(score.value).toFixed(2);
    const shown = images.filter((image) => !image.hidden).length;
    filters.querySelector("[role=status]").textContent = `${shown} of ${images.length} images`;
    document.body.classList.toggle("without-truth", !truth.checked);
  };
  filters.addEventListener("input", apply);
  apply();
  for (const image of images) {
    image.querySelector(".picture").addEventListener("click", () => image.classList.toggle("large"));
  }
}
