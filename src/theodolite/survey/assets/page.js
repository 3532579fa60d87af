"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const plots = [...document.querySelectorAll("[data-figure]")];
  const inks = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a8a8a"];
  const drawn = new Map();

  const ink = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  const theme = () => {
    const axis = { gridcolor: ink("--grid"), linecolor: ink("--line"), zerolinecolor: ink("--line"), tickcolor: ink("--line"), automargin: true };
    return {
      layout: {
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", colorway: inks,
        font: { family: ink("--sans"), size: 13, color: ink("--ink") },
        xaxis: axis, yaxis: axis, hoverlabel: { font: { family: ink("--sans") } },
        colorscale: { sequential: "Viridis" },
      },
    };
  };

  // the inks of the figures, as bright on a dark ground as they are strong on a light one
  const bright = { "#0072b2": "#56b4e9", "rgba(0,114,178": "rgba(86,180,233", "#666666": "#a8a8a8", "#d55e00": "#ff8c42" };
  const shown = (figure) => {
    if (!matchMedia("(prefers-color-scheme: dark)").matches) return figure;
    let text = JSON.stringify(figure);
    for (const [ink, other] of Object.entries(bright)) text = text.replaceAll(ink, other);
    return JSON.parse(text);
  };

  const draw = async (plot) => {
    const figure = shown(figures[plot.dataset.figure]);
    const layout = { ...figure.layout, template: theme(), autosize: true };
    try {
      await Plotly.react(plot, figure.data, layout, { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"] });
      drawn.set(plot, true);
      plot.dataset.drawn = "yes";
    } catch (error) {
      plot.classList.add("failed");
      plot.textContent = "This figure could not be drawn; its numbers stand below.";
    }
  };

  const nearby = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) {
        nearby.unobserve(entry.target);
        draw(entry.target);
      }
    }
  }, { rootMargin: "600px" });
  for (const plot of plots) {
    const height = figures[plot.dataset.figure].layout.height;
    if (height) plot.style.height = `${height}px`;
    nearby.observe(plot);
  }

  const again = () => { for (const plot of drawn.keys()) draw(plot); };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details")) details.open = true;
    for (const plot of plots) draw(plot);
  });

  for (const button of document.querySelectorAll("button[data-copy]")) {
    button.addEventListener("click", async () => {
      const source = document.getElementById(button.dataset.copy);
      try {
        await navigator.clipboard.writeText(source.textContent);
        button.textContent = "copied";
      } catch {
        getSelection().selectAllChildren(source);
        button.textContent = "selected";
      }
    });
  }
})();
