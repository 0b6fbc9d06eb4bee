const slider = document.getElementById("slider"), at = document.getElementById("at"), play = document.getElementById("play");
const box = document.getElementById("text"), last = Number(slider.max);
// Tokens and masks, each from one step on until another.
const parts = [...document.querySelectorAll("[data-a], [data-b]")].map(part => [
  part, Number(part.dataset.a || 0), part.dataset.b ? Number(part.dataset.b) : Infinity, part.className.includes("m"),
]);
let timer = null;

function show(step) {
  slider.value = step;
  at.textContent = `step ${step} of ${last}`;
  document.documentElement.style.setProperty("--now", last ? step / last : 1);
  for (const [part, first, end, masked] of parts) {
    const hidden = step < first || step >= end;
    if (part.hidden !== hidden) part.hidden = hidden;
    part.classList.toggle(masked ? "x" : "u", step > 0 && step === first);
  }
}

function go(step) {
  show(Math.max(0, Math.min(last, step)));
  const news = box.querySelector(".u:not([hidden]), .x:not([hidden])");
  if (news && (news.offsetTop < box.scrollTop || news.offsetTop > box.scrollTop + box.clientHeight - 24))
    box.scrollTop = news.offsetTop - box.clientHeight / 2;
}

function stop() {
  clearInterval(timer);
  timer = null;
  play.textContent = "▶";
  play.setAttribute("aria-label", "play");
}

function toggle() {
  if (timer !== null) return stop();
  if (Number(slider.value) >= last) go(0);
  play.textContent = "⏸";
  play.setAttribute("aria-label", "pause");
  timer = setInterval(() => {
    go(Number(slider.value) + 1);
    if (Number(slider.value) >= last) stop();
  }, Math.max(40, Math.min(500, 12000 / Math.max(last, 1))));
}

function leap(step) {
  stop();
  go(step);
}

play.addEventListener("click", toggle);
document.getElementById("back").addEventListener("click", () => leap(Number(slider.value) - 1));
document.getElementById("next").addEventListener("click", () => leap(Number(slider.value) + 1));
slider.addEventListener("input", () => leap(Number(slider.value)));
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("button, summary") && event.key === " ") return;
  const now = Number(slider.value);
  const action = {
    " ": toggle, ArrowLeft: () => leap(now - 1), ArrowRight: () => leap(now + 1), Home: () => leap(0), End: () => leap(last),
  }[event.key];
  if (action) {
    event.preventDefault();
    action();
  }
});
document.getElementById("steps").addEventListener("click", event => {
  const bar = event.target.closest("td.bar");
  if (bar) leap(Math.ceil((event.clientX - bar.getBoundingClientRect().left) / bar.clientWidth * last));
});
// Paper shows what is folded.
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  folded.forEach(one => one.open = true);
});
addEventListener("afterprint", () => folded.forEach(one => one.open = false));
if (innerWidth < 640) document.querySelectorAll("article details").forEach(one => one.open = false);
show(last);
