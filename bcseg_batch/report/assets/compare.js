// Before and after: a slider sets how far from the left the composite begins.
"use strict";

document.addEventListener("input", (event) => {
  if (event.target.type !== "range") return;
  const widget = event.target.closest(".compare") || document.querySelector(".compare.large");
  widget.style.setProperty("--at", `${event.target.value}%`);
});
