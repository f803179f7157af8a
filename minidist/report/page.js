// Unpack the trace, show the sections, and keep the colours as one wants them.

const THEMES = ["auto", "light", "dark"];

function colours(timeline) {
  const button = document.getElementById("theme");
  let theme = 0;
  const redraw = () => {
    timeline.recolour();
    timeline.draw();
  };
  button.addEventListener("click", () => {
    theme = (theme + 1) % THEMES.length;
    document.documentElement.style.colorScheme = theme ? THEMES[theme] : "";
    button.textContent = `Colours: ${THEMES[theme]}`;
    button.setAttribute("aria-label", `Colours: ${theme ? THEMES[theme] : "as the system's"}`);
    redraw();
  });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
}

async function open() {
  const packed = document.getElementById("data");
  const data = await unpacked(packed.textContent);
  packed.remove(); // it is not needed twice
  if (data.ranks.length > 12) {
    document.body.classList.add("many");
    for (const list of document.querySelectorAll("#breakdown .bars, #memory .bars")) {
      decorate(list, { tabindex: 0, role: "region", "aria-label": "A row for each rank" }); // to be scrolled by keys
    }
  }
  const sections = [
    showFacts,
    showNumbers,
    showCurves,
    showBreakdown,
    showLabels,
    showLayers,
    showTraffic,
    showMemory,
    showPipeline,
    showStaleness,
  ];
  for (const show of sections) show(data);
  colours(new Timeline(data));
  document.getElementById("loading").hidden = true;
  document.documentElement.dataset.ready = Math.round(performance.now()); // milliseconds since the page was asked for
}

open().catch((error) => {
  document.getElementById("loading").textContent = `This page could not be drawn: ${error.message}`;
  throw error;
});
