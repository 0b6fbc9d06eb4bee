// What tests/recipes/test_site.py wants to know of a page. `measure(window)` returns
// - `wide`: what is wider than the window, beyond what can be scrolled in a box of its own
// - `scrolled`: boxes that have to be scrolled sideways
// - `cut`: texts that end in an ellipsis, since they do not fit
// - `found`: titles that the search box of the theme finds, on a page with a question (`?q=...`)
// - `pictures`: of each picture its address, its own width and the width that it is shown with
// - `faint`: for each colour scheme, texts whose contrast with what is behind them is below 4.5

const SCHEMES = ["default", "slate"]; // of the theme of the documentation: light and dark

function numbers(colour) { // [red, green, blue, alpha], from 0 to 255, alpha from 0 to 1
  const values = colour.match(/-?[\d.]+(e-?\d+)?/g).map(Number);
  const scale = colour.startsWith("color(") ? 255 : 1;
  return [...values.slice(0, 3).map(value => value * scale), values[3] ?? 1];
}

function over(front, back) { // the colour of something translucent in front of an opaque colour
  return front.slice(0, 3).map((value, index) => value * front[3] + back[index] * (1 - front[3]));
}

function luminance(colour) { // https://www.w3.org/TR/WCAG22/#dfn-relative-luminance
  const [red, green, blue] = colour.map(value => value / 255)
    .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
}

function contrast(one, other) {
  const [light, dark] = [luminance(one), luminance(other)].sort((a, b) => b - a);
  return (light + 0.05) / (dark + 0.05);
}

function behind(element, view, known) { // the colour behind the text of an element, and how opaque the text is
  if (!element) return [[255, 255, 255], 1];
  if (!known.has(element)) {
    const [back, opacity] = behind(element.parentElement, view, known);
    const style = view.getComputedStyle(element);
    known.set(element, [over(numbers(style.backgroundColor), back), opacity * Number(style.opacity)]);
  }
  return known.get(element);
}

function texts(view) { // elements that show text of their own
  const walker = view.document.createTreeWalker(view.document.body, NodeFilter.SHOW_TEXT);
  const found = new Set();
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const box = element.getBoundingClientRect();
    const shown = element.checkVisibility({opacityProperty: true, visibilityProperty: true});
    if (walker.currentNode.data.trim() && shown && box.width > 1 && box.height > 1) found.add(element);
  }
  return [...found];
}

function faint(view) {
  const found = {}, known = new Map();
  for (const element of texts(view)) {
    const [back, opacity] = behind(element, view, known);
    const [red, green, blue, alpha] = numbers(view.getComputedStyle(element).color);
    const value = contrast(over([red, green, blue, alpha * opacity], back), back);
    if (value < 4.5) found[`${name(element)} ${value.toFixed(2)}`] ??= element.textContent.trim().slice(0, 40);
  }
  return found;
}

function name(element) {
  const classes = [...element.classList].map(value => "." + value).join("");
  const parent = element.parentElement;
  return (parent ? parent.tagName.toLowerCase() + [...parent.classList].map(value => "." + value).join("") + " > " : "")
    + element.tagName.toLowerCase() + classes;
}

function scrolls(element, view) {
  return ["auto", "scroll", "hidden", "clip"].includes(view.getComputedStyle(element).overflowX);
}

function wide(view) { // elements that reach over the right edge of the window, and are in no box that scrolls or hides them
  const width = view.document.documentElement.clientWidth;
  if (view.document.scrollingElement.scrollWidth <= width) return [];
  return [...view.document.body.querySelectorAll("*")].filter(element => {
    const box = element.getBoundingClientRect();
    if (box.right <= width + 1 || !box.width || !element.checkVisibility()) return false;
    for (let one = element.parentElement; one && one !== view.document.body; one = one.parentElement)
      if (scrolls(one, view)) return false;
    return true;
  }).map(name).slice(0, 5).concat(`page: ${view.document.scrollingElement.scrollWidth}`);
}

async function found(view) { // the search runs in a worker
  const titles = () => [...view.document.querySelectorAll(".md-search-result__link")]
    .map(link => link.querySelector("h1, h2").textContent.trim());
  for (let tries = 0; tries < 200 && !titles().length; tries++) await new Promise(resolve => setTimeout(resolve, 50));
  return titles();
}

async function measure(view) {
  await view.document.fonts.ready;
  if (view.location.search) return {found: await found(view)};
  const all = [...view.document.body.querySelectorAll("*")].filter(element => element.checkVisibility());
  const beyond = all.filter(element => element.scrollWidth > element.clientWidth + 1 && element.clientWidth > 0);
  const style = element => view.getComputedStyle(element);
  const result = {
    wide: wide(view),
    scrolled: beyond.filter(element => ["auto", "scroll"].includes(style(element).overflowX))
      .map(element => `${name(element)}: ${element.textContent.trim().slice(0, 40)}`),
    cut: beyond.filter(element => style(element).textOverflow === "ellipsis" && !element.closest("header"))
      .map(element => element.textContent.trim()),
    pictures: [...view.document.images].filter(image => image.checkVisibility())
      .map(image => [image.getAttribute("src"), image.naturalWidth, image.clientWidth]),
    faint: {},
  };
  view.document.head.append(Object.assign(view.document.createElement("style"), {textContent: "* {transition: none !important}"}));
  for (const scheme of SCHEMES) {
    view.document.body.setAttribute("data-md-color-scheme", scheme);
    result.faint[scheme] = faint(view);
  }
  return result;
}
