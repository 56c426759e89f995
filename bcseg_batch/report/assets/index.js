// The list of images: rows come in parts, in the order of doubt; one page of them is shown.
"use strict";

const setup = JSON.parse(document.getElementById("setup").textContent);
const at = Object.fromEntries(setup.columns.map((name, index) => [name, index]));
const parts = [];
let all = [];
let found = [];
let page = 0;
let order = "rank";
const byId = (id) => document.getElementById(id);

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children.filter((child) => child !== null));
  return made;
}

// What was asked for stands in the address, so that Back leads to the list as it was left.
const ASKED = ["search", "status", "flag", "group", "rows"];
const untouched = Object.fromEntries(ASKED.map((id) => [id, byId(id)?.value]));
let wantedPage = null;

function recall() {
  const asked = new URLSearchParams(location.hash.slice(1));
  for (const id of ASKED) if (byId(id) && asked.has(id)) byId(id).value = asked.get(id);
  order = asked.get("order") || order;
  wantedPage = Number(asked.get("page")) || null;
}

function remember() {
  if (wantedPage !== null) return; // not there yet
  const asked = new URLSearchParams();
  for (const id of ASKED) {
    if (byId(id) && byId(id).value !== untouched[id]) asked.set(id, byId(id).value);
  }
  if (order !== "rank") asked.set("order", order);
  if (page) asked.set("page", page);
  if (`${asked}` !== location.hash.slice(1)) location.replace(`#${asked}`);
}

function bcsegRows({ part, rows }) {
  parts[part] = rows;
  if (parts.filter(Boolean).length === setup.parts.length || part === 0) {
    all = parts.flat().filter(Boolean);
    all.forEach((row, rank) => {
      row.rank = rank;
      row.text = `${row[at.image]} ${row[at.error] || ""} ${row[at.group] || ""}`.toLowerCase();
    });
    find();
    if (wantedPage !== null && all.length === setup.count) {
      page = Math.min(wantedPage, Math.max(0, Math.ceil(found.length / Number(byId("rows").value)) - 1));
      wantedPage = null;
      show();
    }
  }
}

function loadPart(number) {
  if (number >= setup.parts.length) return;
  const script = element("script", { src: `data/${setup.parts[number]}` });
  script.onload = () => setTimeout(loadPart, 0, number + 1);
  script.onerror = () => {
    byId("told").textContent = "The report has been made anew meanwhile: reload this page.";
  };
  document.head.append(script);
}

// What the reader asks for ---------------------------------------------------------------------

const SHOWN = {
  "": () => true,
  doubted: (row) => row[at.status] !== "done" || row[at.flags].length > 0,
  failed: (row) => row[at.status] !== "done",
  flagged: (row) => row[at.flags].length > 0,
  good: (row) => row[at.status] === "done" && row[at.flags].length === 0,
};

function find() {
  const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const isShown = SHOWN[byId("status").value];
  const flag = byId("flag").value;
  const group = byId("group") ? byId("group").value : "";
  found = all.filter(
    (row) =>
      isShown(row) &&
      (!flag || row[at.flags].some(([name]) => name === flag)) &&
      (!group || group === (row[at.group] === null ? "-" : `=${row[at.group]}`)) &&
      words.every((word) => row.text.includes(word)),
  );
  sort();
}

function sort() {
  const isDescending = order.startsWith("-");
  const key = order.replace("-", "");
  const value = key === "rank" ? (row) => row.rank : (row) => row[at[key]];
  const collator = new Intl.Collator("en", { numeric: true });
  const compare = (a, b) => (typeof a === "string" ? collator.compare(a, b) : a - b);
  found.sort((one, other) => {
    const [a, b] = [value(one), value(other)];
    // What has no value comes last, whichever way.
    if (a === null || b === null) return (a === null) - (b === null) || one.rank - other.rank;
    return (isDescending ? compare(b, a) : compare(a, b)) || one.rank - other.rank;
  });
  for (const head of document.querySelectorAll("#list th[data-key]")) {
    head.removeAttribute("aria-sort");
    if (head.dataset.key === key) head.ariaSort = isDescending ? "descending" : "ascending";
  }
  byId("order").value = order;
  if (byId("order").value !== order) byId("order").value = "";
  page = 0;
  show();
}

// What is shown --------------------------------------------------------------------------------

const number = (value) => (value === null ? "–" : value.toLocaleString("en"));
const percent = (value) => (value === null ? "–" : `${(100 * value).toFixed(1)} %`);

function show() {
  const perPage = Number(byId("rows").value);
  const pages = Math.max(1, Math.ceil(found.length / perPage));
  const rows = found.slice(page * perPage, (page + 1) * perPage);
  document.querySelector("#list tbody").replaceChildren(...rows.map(tableRow));
  const loading = all.length < setup.count ? `; ${number(all.length)} read so far` : "";
  byId("told").textContent = `${number(found.length)} of ${number(setup.count)} images${loading}`;
  byId("page").textContent = `page ${number(page + 1)} of ${number(pages)}`;
  byId("previous").disabled = page === 0;
  byId("next").disabled = page + 1 >= pages;
  remember();
}

function turn(step) {
  page += step;
  show();
  byId("images").focus();
}

function tableRow(row) {
  const name = row[at.image];
  const pageUrl = `images/${row[at.key]}.html`;
  const doubts = row[at.flags].map(([flag, sentence]) =>
    element("span", { className: "flag", title: sentence }, flag),
  );
  const error = row[at.error] && element("p", { className: "error" }, row[at.error]);
  const group = row[at.group] && element("p", { className: "links" }, `group ${row[at.group]}`);
  return element(
    "tr",
    {},
    element("td", {}, pictures(row)),
    element("th", { scope: "row" }, element("a", { href: pageUrl }, name), group, links(row)),
    ...["cells", "red", "white", "platelets"].map((key) => element("td", {}, number(row[at[key]]))),
    element("td", {}, percent(row[at.foreground])),
    element("td", {}, percent(row[at.confidence])),
    element("td", {}, ...doubts, error),
    element("td", {}, row[at.seconds] === null ? "–" : `${row[at.seconds].toFixed(2)} s`),
    element("td", {}, row[at.finished] ? row[at.finished].replace("T", " ").slice(0, 16) : "–"),
  );
}

function links(row) {
  const line = element("p", { className: "links" });
  for (const [key, word] of [["before", "photograph"], ["after", "composite"]]) {
    if (row[at[key]] !== null) line.append(element("a", { href: `../${row[at[key]]}` }, word), " ");
  }
  return line;
}

function pictures(row) {
  const name = row[at.image];
  const has = row[at.thumbnails];
  if (!has) return element("div", { className: "compare none" }, "no picture");
  const image = (which, alt, className) =>
    element("img", {
      src: `thumbnails/${row[at.key]}-${which}.jpg`,
      alt: `${alt} of ${name}`,
      loading: "lazy",
      className,
    });
  const stack = element("div", { className: "pictures" });
  if (has.includes("b")) stack.append(image("b", "photograph", ""));
  if (has.includes("a")) stack.append(image("a", "composite", has === "ba" ? "after" : ""));
  const widget = element("div", { className: "compare" }, stack);
  if (has === "ba") {
    widget.append(
      element("input", { type: "range", min: 0, max: 100, value: 50, ariaLabel: `Photograph or composite of ${name}` }),
    );
  }
  return widget;
}

// Wiring ---------------------------------------------------------------------------------------

if (setup.count) {
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("search").addEventListener("input", find);
  for (const id of ["status", "flag", "group"]) byId(id)?.addEventListener("change", find);
  byId("order").addEventListener("change", () => {
    order = byId("order").value || order;
    sort();
  });
  byId("rows").addEventListener("change", () => {
    page = 0;
    show();
  });
  for (const head of document.querySelectorAll("#list th[data-key]")) {
    head.firstElementChild.addEventListener("click", () => {
      const key = head.dataset.key;
      order = order === key ? `-${key}` : key;
      sort();
    });
  }
  byId("previous").addEventListener("click", () => turn(-1));
  byId("next").addEventListener("click", () => turn(1));
  recall();
  loadPart(0);
}
