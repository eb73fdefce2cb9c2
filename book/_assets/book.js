// Let widgets live beside the theme's scripts with no kernel and no network, and give their controls names.

// The theme's Font Awesome would replace icons as they appear; the Play widget looks its own up and fails without them.
window.FontAwesomeConfig = { observeMutations: false };

// Search results show summaries that are fetched page by page, which browsers refuse on file:// pages.
if (location.protocol === "file:") {
  DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
}

// Sliders and Play buttons come without a name and with an index in place of the preset.
function nameControls() {
  for (const slider of document.querySelectorAll(".jupyter-widgets .noUi-handle")) {
    const widget = slider.closest(".jupyter-widgets");
    const set = (name, text) => slider.getAttribute(name) === text || slider.setAttribute(name, text);
    set("aria-label", widget.querySelector(".widget-label")?.textContent.trim() || "frame");
    const readout = widget.querySelector(".widget-readout");
    const caption = widget.parentElement.querySelector("figcaption"); // it names the preset that is shown
    if (caption ?? readout) set("aria-valuetext", (caption ?? readout).textContent.trim());
    if (readout) {
      // It repeats the value and would be one more stop for the Tab key, editable to no purpose.
      readout.removeAttribute("contenteditable");
      readout.setAttribute("aria-hidden", "true");
    }
  }
  for (const icon of document.querySelectorAll(".widget-play button > i")) {
    const button = icon.parentElement;
    const name = ["play", "pause", "stop", "repeat"].find((word) => icon.classList.contains(`fa-${word}`)) ?? "play";
    if (button.getAttribute("aria-label") !== name) button.setAttribute("aria-label", name);
  }
}

// The theme names two buttons by something else than the words on them. "interactive" is just before Font Awesome runs.
document.addEventListener("readystatechange", () => {
  if (document.readyState !== "interactive") return;
  for (const button of document.querySelectorAll(".search-button-field")) button.removeAttribute("aria-label");
  for (const icon of document.querySelectorAll(".theme-switch-button i")) icon.removeAttribute("title");
});

// An equation too wide for the page scrolls; the keyboard must reach it to scroll it. Fonts may still move a few pixels.
function reachEquations() {
  for (const equation of document.querySelectorAll("div.math > mjx-container")) {
    const wide = equation.firstElementChild.getBoundingClientRect().width > equation.clientWidth - 16;
    if (wide) equation.tabIndex = 0;
    else equation.removeAttribute("tabindex");
  }
}

document.addEventListener("DOMContentLoaded", () => {
  if (window.MathJax) {
    window.MathJax.startup.promise.then(() => document.fonts.ready).then(reachEquations);
    window.addEventListener("resize", reachEquations);
    // The widget manager speaks MathJax 2.
    let queue = window.MathJax.startup.promise;
    window.MathJax.Hub = {
      Queue: ([, , element]) => (queue = queue.then(() => window.MathJax.typesetPromise([element]))),
    };
  }
  const watch = { childList: true, subtree: true, characterData: true };
  const outputs = new MutationObserver(nameControls);
  for (const output of document.querySelectorAll(".cell_output")) outputs.observe(output, watch);
});
