// Tables and figures that are wider than the page scroll, with keys too.
const widths = new ResizeObserver((entries) => {
  for (const { target } of entries) target.tabIndex = target.scrollWidth > target.clientWidth ? 0 : -1;
});
document$.subscribe(() => {
  const boxes = ".md-typeset__scrollwrap, .md-typeset p:has(> img)";
  for (const box of document.querySelectorAll(boxes)) widths.observe(box);
});
