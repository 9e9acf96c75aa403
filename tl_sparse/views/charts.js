"use strict";
(() => {
  const data = JSON.parse(document.getElementById("tls-data").textContent);
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  // A chart has the page's colours, whatever its template says.
  const inks = () => {
    const style = getComputedStyle(document.documentElement);
    const of = (name) => style.getPropertyValue(name).trim();
    return { ink: of("--ink"), soft: of("--soft"), line: of("--line") };
  };
  const coloured = (layout) => {
    const { ink, soft, line } = inks();
    const result = { ...layout, paper_bgcolor: "transparent", plot_bgcolor: "transparent" };
    result.font = { ...layout.font, color: ink };
    result.modebar = { bgcolor: "transparent", color: soft };
    for (const name of Object.keys(layout).filter((key) => /^[xy]axis/.test(key)))
      result[name] = { ...layout[name], gridcolor: line, zerolinecolor: line };
    return result;
  };
  const draw = () => {
    for (const place of document.querySelectorAll(".chart")) {
      const figure = data.charts[Number(place.dataset.chart)];
      Plotly.react(place, figure.data, coloured(figure.layout), { responsive: true, displaylogo: false });
    }
  };
  scheme.addEventListener("change", draw);
  draw();
})();
