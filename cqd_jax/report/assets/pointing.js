/* The tooltip, for the mouse while it hovers, for fingers and keys while something has the focus; walking by keys. */

const tooltip = place("tooltip");
let anchor = null;

function showTooltip(element, contents) {
  anchor = element;
  tooltip.replaceChildren(...contents.flat(2));
  tooltip.hidden = false;
  placeTooltip();
}

function hideTooltip() {
  anchor = null;
  tooltip.hidden = true;
}

/* Beside its anchor, on the side with room, never over it and never beyond the window. */
function placeTooltip() {
  if (!anchor?.isConnected) return hideTooltip();
  const at = anchor.getBoundingClientRect(), own = tooltip.getBoundingClientRect();
  const width = document.documentElement.clientWidth, height = window.innerHeight, gap = 10;
  const right = at.right + gap + own.width < width, left = at.left - gap - own.width > 0;
  const below = at.bottom + gap + own.height < height;
  const x = right ? at.right + gap : left ? at.left - gap - own.width : (at.left + at.right - own.width) / 2;
  const y = right || left ? at.top - 20 : below ? at.bottom + gap : at.top - gap - own.height;
  tooltip.style.left = `${Math.max(8, Math.min(x, width - own.width - 8))}px`;
  tooltip.style.top = `${Math.max(8, Math.min(y, height - own.height - 8))}px`;
}

/* Elements below `root` that have a `data-tip` explain themselves by the contents `explain(element)`. */
function explains(root, explain) {
  const show = (event) => {
    const element = event.target.closest("[data-tip]");
    if (element) showTooltip(element, explain(element));
  };
  root.addEventListener("pointerover", (event) => event.pointerType === "mouse" && show(event));
  root.addEventListener("pointerout", (event) => event.pointerType === "mouse" && hideTooltip());
  root.addEventListener("focusin", show);
  root.addEventListener("focusout", hideTooltip);
}

document.addEventListener("keydown", (event) => event.key === "Escape" && hideTooltip());
document.addEventListener("scroll", placeTooltip, { passive: true, capture: true });

/* The one of the elements that is nearest in a direction, rather straight ahead than aside. */
function nearest(here, elements, [dx, dy]) {
  const middle = (element) => {
    const box = element.getBoundingClientRect();
    return [box.left + box.width / 2, box.top + box.height / 2];
  };
  const [x, y] = middle(here);
  let next = null, least = Infinity;
  for (const element of elements) {
    const [toX, toY] = middle(element);
    const along = (toX - x) * dx + (toY - y) * dy, aside = Math.abs((toX - x) * dy) + Math.abs((toY - y) * dx);
    if (along > 1 && along + 3 * aside < least) [next, least] = [element, along + 3 * aside];
  }
  return next;
}

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/* Arrow keys walk from element to element of a picture; Enter and the space bar click. */
function walks(root, selector) {
  root.addEventListener("keydown", (event) => {
    const here = event.target.closest(selector), click = event.key === "Enter" || event.key === " ";
    if (!here || !(click || ARROWS[event.key])) return;
    event.preventDefault();
    if (click) here.dispatchEvent(new MouseEvent("click", { bubbles: true }));
    else nearest(here, here.parentNode.querySelectorAll(selector), ARROWS[event.key])?.focus();
  });
}
