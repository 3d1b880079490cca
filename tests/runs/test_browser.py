"""Chromium draws the page from disk, without an error, and lets no script in."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest

from r3_adapter.runs.log import Run
from r3_adapter.runs.page import page
from r3_adapter.runs.plots import COLORS

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ("gpu", "quic", "background-networking", "component-update", "sync", "extensions", "default-apps")
FLAGS = ["--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{part}" for part in QUIET)]
FLAGS += ["--virtual-time-budget=30000", "--enable-logging=stderr", "--dump-dom"]
QUIET_LINES = re.compile(r"\[bokeh [\d.]+\]\s.*document idle|Canvas2D: Multiple readback")
LOOK = """
const below = (each) => [each, ...(each.shadowRoot ? all(each.shadowRoot) : [])];
const all = (root) => [...root.querySelectorAll("*")].flatMap(below);
const value = (color, part) => parseInt(color.slice(1 + 2 * part, 3 + 2 * part), 16);
const near = (data, at, color) => [0, 1, 2].every((part) => Math.abs(data[at + part] - value(color, part)) < 16);
const inks = (plot) => {
  const found = {};
  for (const canvas of all(plot).filter((each) => each.tagName === "CANVAS" && each.width && each.height)) {
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    for (let at = 0; at < data.length; at += 4) {
      if (data[at + 3] < 200) continue;
      found.any = (found.any ?? 0) + 1;
      for (const color of COLORS) if (near(data, at, color)) found[color] = (found[color] ?? 0) + 1;
    }
  }
  return found;
};
const plots = [...document.querySelectorAll(".plot")];
const report = () => {
  const inked = plots.map(inks);
  document.body.dataset.blank = inked.filter((found) => (found.any ?? 0) < 200).length;
  document.body.dataset.inks = COLORS.map((color) => inked.filter((found) => (found[color] ?? 0) > 4).length);
  document.body.dataset.wide = document.documentElement.scrollWidth;
  const table = document.querySelector(".scroll");
  document.body.dataset.faded = getComputedStyle(table).maskImage !== "none";
  document.body.dataset.said = getComputedStyle(document.querySelector(".more")).display !== "none";
  return document.body.dataset.blank === "0";
};
let clicks = CLICKS, seen = 0;
const wait = setInterval(() => {
  if (!document.body.dataset.drawn || !report()) return;
  if (clicks) { clicks -= 1; document.querySelector("nav button").click(); return; }
  if (++seen > 3) clearInterval(wait);
}, 200);
"""

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH: the page is not drawn in a browser")


def draw(html, folder, size="1400,1000", clicks=0):
    """Return the page as the browser has it after its scripts, and what its console says.

    The body says how many plots have nothing on them, and in how many each of COLORS is seen, after so many clicks on
    the first button; the page's policy lets the script that looks run, and no other.
    """
    look = LOOK.replace("CLICKS", str(clicks)).replace("COLORS", json.dumps(COLORS))
    digest = base64.b64encode(hashlib.sha256(look.encode()).digest()).decode()
    html = html.replace("script-src ", f"script-src 'sha256-{digest}' ").replace(
        "</body>", f"<script>{look}</script></body>"
    )
    path = folder / "page.html"
    path.write_text(html, encoding="utf-8")
    command = [BROWSER, *FLAGS, f"--window-size={size}", f"--user-data-dir={folder / 'profile'}", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=80, check=True)
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line and not QUIET_LINES.search(line)]
    return done.stdout, said


def told(dom, name):
    return re.search(rf'data-{name}="([^"]*)"', dom)[1]


@pytest.fixture(scope="module")
def html(synthetic):
    return page([Run.load(found) for found in sorted(synthetic.iterdir())])


@pytest.mark.parametrize("size", ["1400,1000", "500,1000"])
def test_all_plots_are_drawn(html, tmp_path, size):
    dom, console = draw(html, tmp_path, size)
    assert console == []
    plots = html.count('class="plot"')
    assert plots == 20 and told(dom, "drawn") == str(plots) and told(dom, "blank") == "0"
    # The last of 4 variants lies above the others in each of 13 line plots, and is seen in no other plot.
    first, *_, last = [int(count) for count in told(dom, "inks").split(",")][:4]
    assert last == 13 and first > 5
    # Nothing but a table is wider than the window, and one that is says so.
    width = int(size.split(",")[0])
    assert int(told(dom, "wide")) <= width
    assert {told(dom, "faded"), told(dom, "said")} == {"true" if width == 500 else "false"}


def test_a_click_hides_a_variant_in_every_plot(html, tmp_path):
    dom, console = draw(html, tmp_path, clicks=1)
    assert console == []
    assert dom.count('aria-pressed="false" data-variant="0"') == 1
    assert told(dom, "inks").split(",")[0] == "0"


def test_no_name_becomes_markup_or_a_formula_and_the_policy_holds_where_escaping_would_fail(synthetic, tmp_path):
    markup = "<img src=x onerror='document.body.dataset.owned=1'><script>document.body.dataset.owned=1</script>"
    found = Run.load(synthetic / "r3-seed1")
    runs = [replace(found, config={**found.config, "name": name, "flags": {"n": name}}) for name in ("$$x$$", markup)]
    # Bokeh draws a text between dollars as a formula, but not one that says that it is plain.
    assert '"name":"PlainText"' in page(runs) and '"text":"$$x$$"' in page(runs)
    dom, console = draw(page(runs), tmp_path)
    assert console == [] and told(dom, "blank") == "0" and "data-owned=" not in dom
    dom, console = draw(page(runs).replace("<main>", f"<main>{markup}"), tmp_path)
    assert "data-drawn=" in dom and "data-owned=" not in dom
    assert any("Content Security Policy" in line for line in console)
