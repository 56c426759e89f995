// The page of an image: outlines, each with the measurements of its cells, and its neighbours.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const column = Object.fromEntries(data.columns.map((name, index) => [name, index]));
const traces = document.getElementById("traces");
const about = document.getElementById("about");

const label = (cell) => `Cell ${cell[column.label]}`;
const kind = (cell) => (cell[column.kind] || "cell").replace("_", " ");

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

// Outlines -------------------------------------------------------------------------------------

function drawOutlines() {
  data.outlines.forEach(([d, numbers], index) => {
    const cells = numbers.map((number) => data.cells[number]);
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    const kinds = new Set(cells.map((cell) => cell[column.kind]));
    path.setAttribute("d", d);
    path.setAttribute("role", "img");
    path.setAttribute("tabindex", index === 0 ? 0 : -1);
    path.setAttribute("aria-label", words(cells));
    path.setAttribute("class", kinds.size ? [...kinds].join(" ") : "other");
    path.addEventListener("pointerenter", () => tell(path, cells));
    path.addEventListener("pointerleave", hush);
    path.addEventListener("focus", () => tell(path, cells));
    path.addEventListener("blur", hush);
    traces.append(path);
  });
  traces.addEventListener("keydown", walk);
}

function words(cells) {
  if (!cells.length) return "Area without a cell in the table";
  return cells.map((cell) => `${label(cell)}: ${kind(cell)}, area ${cell[column.area]} px`).join("; ");
}

function tell(path, cells) {
  about.replaceChildren();
  if (!cells.length) about.append(element("strong", words(cells)));
  for (const cell of cells.slice(0, 3)) {
    about.append(element("strong", `${label(cell)}: ${kind(cell)}`));
    const list = element("dl");
    data.columns.forEach((name, index) => {
      if (["label", "kind"].includes(name) || cell[index] === "") return;
      list.append(element("dt", name), element("dd", cell[index]));
    });
    about.append(list);
  }
  if (cells.length > 3) about.append(element("strong", `and ${cells.length - 3} more that touch`));
  about.hidden = false;
  const [frame, box] = [traces.getBoundingClientRect(), path.getBoundingClientRect()];
  const isLeft = (box.left + box.right) / 2 < (frame.left + frame.right) / 2;
  const top = Math.min(box.top - frame.top, frame.height - about.offsetHeight);
  about.style.left = isLeft ? `${box.right - frame.left + 8}px` : "auto";
  about.style.right = isLeft ? "auto" : `${frame.right - box.left + 8}px`;
  about.style.top = `${Math.max(0, top)}px`;
}

function hush() {
  about.hidden = true;
}

// One stop for the Tab key; the arrow keys go on from there.
function walk(event) {
  const paths = [...traces.children].filter((path) => !path.hasAttribute("hidden"));
  const here = paths.indexOf(event.target);
  const there = {
    ArrowRight: here + 1,
    ArrowDown: here + 1,
    ArrowLeft: here - 1,
    ArrowUp: here - 1,
    Home: 0,
    End: paths.length - 1,
  }[event.key];
  if (event.key === "Escape") hush();
  if (there === undefined || !paths[there]) return;
  event.preventDefault();
  for (const path of traces.children) path.setAttribute("tabindex", -1);
  paths[there].setAttribute("tabindex", 0);
  paths[there].focus();
}

function switchOutlines() {
  const isOn = document.getElementById("outlines").checked;
  const kinds = [...document.querySelectorAll("[data-kind]")].filter((box) => box.checked);
  traces.toggleAttribute("hidden", !isOn);
  for (const path of traces.children) {
    path.toggleAttribute("hidden", !kinds.some((box) => path.classList.contains(box.dataset.kind)));
    path.setAttribute("tabindex", -1);
  }
  [...traces.children].find((path) => !path.hasAttribute("hidden"))?.setAttribute("tabindex", 0);
  hush();
}

if (traces) {
  drawOutlines();
  for (const box of document.querySelectorAll("[data-kind]")) {
    box.closest("label").hidden = !traces.querySelector(`.${box.dataset.kind}`);
  }
  for (const box of document.querySelectorAll(".switches input")) {
    box.addEventListener("change", switchOutlines);
  }
}

// The table of cells, when it is opened ----------------------------------------------------------

document.getElementById("cells")?.addEventListener("toggle", (event) => {
  const place = event.target.querySelector(".scroll");
  if (place.firstChild) return;
  const table = element("table");
  const heads = table.createTHead().insertRow();
  for (const name of data.columns) {
    const head = element("th", name);
    head.scope = "col";
    heads.append(head);
  }
  const body = table.createTBody();
  const more = element("button");
  more.type = "button";
  // A browser draws some hundred rows at once, and freezes over some ten thousand.
  const add = () => {
    const shown = body.rows.length;
    for (const cell of data.cells.slice(shown, shown + 200)) {
      const row = body.insertRow();
      for (const value of cell) row.append(element("td", value));
    }
    const left = data.cells.length - body.rows.length;
    more.textContent = `${Math.min(200, left)} more of ${left}`;
    more.hidden = left === 0;
  };
  more.addEventListener("click", add);
  add();
  place.append(table, more);
});

// Neighbours -------------------------------------------------------------------------------------

// Called by data/order.js.
function bcsegOrder(keys) {
  const here = keys.indexOf(document.querySelector("main").dataset.key);
  for (const [id, there] of [["previous", here - 1], ["next", here + 1]]) {
    if (here < 0 || !keys[there]) continue;
    const link = document.getElementById(id);
    link.href = `${keys[there]}.html`;
    link.hidden = false;
  }
  if (here >= 0) {
    const [place, count] = [here + 1, keys.length].map((value) => value.toLocaleString("en"));
    document.getElementById("place").textContent = `${place} of ${count}, most doubtful first`;
  }
}
