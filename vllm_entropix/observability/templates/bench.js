"use strict";
// Draws the charts of a study; their data and axes are in the page's JSON.
(() => {
  const charts = JSON.parse(document.getElementById("data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const draw = () => {
    const style = getComputedStyle(document.documentElement);
    const [text, line] = ["--text", "--line"].map((name) => style.getPropertyValue(name).trim());
    const axis = { gridcolor: line, zerolinecolor: line, automargin: true };
    charts.forEach(({ data, layout }, index) => {
      const whole = {
        ...layout,
        xaxis: { ...axis, ...layout.xaxis },
        yaxis: { ...axis, ...layout.yaxis },
        font: { color: text },
        paper_bgcolor: "rgba(0,0,0,0)",
        plot_bgcolor: "rgba(0,0,0,0)",
        margin: { t: 16, r: 16, b: 48, l: 48 },
      };
      Plotly.react(`chart-${index}`, data, whole, { displaylogo: false, responsive: true });
    });
  };
  draw();
  dark.addEventListener("change", draw);
  document.documentElement.dataset.ready = "";
})();
