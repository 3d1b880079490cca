"use strict";
(async () => {
  const textOf = (id) => document.getElementById(id).textContent;
  const packed = Uint8Array.from(atob(textOf("bokeh")), (byte) => byte.charCodeAt(0));
  const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(unpacked).text();
  document.head.append(script);

  const charts = Object.entries(JSON.parse(textOf("charts")));
  const plots = await Promise.all(charts.map(async ([id, item]) => (await Bokeh.embed.embed_item(item, id)).roots[0].model));
  const hovers = plots.flatMap((plot) => plot.toolbar.tools).filter((tool) => tool.tags.length).map((tool) => [tool, tool.tooltips]);
  document.body.dataset.drawn = plots.length;

  const hidden = new Set();
  for (const button of document.querySelectorAll("nav button")) {
    button.addEventListener("click", () => {
      const variant = Number(button.dataset.variant), on = hidden.delete(variant);
      if (!on) hidden.add(variant);
      button.setAttribute("aria-pressed", on);
      for (const renderer of plots.flatMap((plot) => plot.renderers)) {
        if (renderer.tags[0] === variant) renderer.visible = on;
      }
      // The first line of what is shown beside a point is its place; the others are those of the tool's variants.
      for (const [tool, lines] of hovers) tool.tooltips = lines.filter((_, at) => at === 0 || !hidden.has(tool.tags[0][at - 1]));
    });
  }

  const tables = [...document.querySelectorAll(".scroll")];
  const mark = (table) => table.toggleAttribute("data-more", table.scrollWidth - table.clientWidth - table.scrollLeft > 2);
  for (const table of tables) table.addEventListener("scroll", () => mark(table), { passive: true });
  new ResizeObserver(() => tables.forEach(mark)).observe(document.body);
  document.addEventListener("toggle", () => tables.forEach(mark), true);
})();
