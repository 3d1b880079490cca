"use strict";
(async () => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const axis = { gridcolor: "#edf0f3", linecolor: "#b8c1cc", zerolinecolor: "#dfe4ea", automargin: true, tickfont: { size: 11 } };
  const title = { font: { size: 11, color: "#5b6675" }, standoff: 6 };
  const base = {
    font: { family: "system-ui, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif", size: 12, color: "#1c2430" },
    margin: { l: 8, r: 10, t: 8, b: 8 }, paper_bgcolor: "#fff", plot_bgcolor: "#fff",
    showlegend: false, hovermode: "x unified", hoverlabel: { bgcolor: "#fff", font: { size: 11 } },
    legend: { orientation: "h", traceorder: "normal", x: 0, y: 1.02, yanchor: "bottom", font: { size: 11 }, itemclick: false, itemdoubleclick: false },
  };
  const config = { responsive: true, displayModeBar: false };
  const named = (own) => ({ ...axis, ...own, title: { ...title, ...own.title } });
  const shown = (chart) => ({ ...base, ...chart.layout, xaxis: named(chart.layout.xaxis), yaxis: named(chart.layout.yaxis) });

  await Promise.all(Object.entries(charts).map(([id, chart]) => Plotly.newPlot(id, chart.traces, shown(chart), config)));
  document.body.dataset.drawn = Object.keys(charts).length;

  for (const button of document.querySelectorAll("nav button")) {
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", on);
      for (const [id, chart] of Object.entries(charts)) {
        const own = chart.traces.flatMap((trace, at) => (trace.meta === Number(button.dataset.variant) ? [at] : []));
        if (own.length) Plotly.restyle(id, { visible: on }, own);
      }
    });
  }
})();
