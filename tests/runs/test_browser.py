"""Chromium draws the page from disk, without an error, and lets no script in."""

import json
import re
import shutil
import subprocess

import pytest

from r3_adapter.runs.log import Run
from r3_adapter.runs.page import page

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ("gpu", "quic", "background-networking", "component-update", "sync", "extensions", "default-apps")
FLAGS = ["--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{part}" for part in QUIET)]
FLAGS += ["--virtual-time-budget=30000", "--enable-logging=stderr", "--dump-dom"]
CLICK = """<script>
const wait = setInterval(() => {
  if (!document.body.dataset.drawn) return;
  clearInterval(wait);
  document.querySelector("nav button").click();
}, 50);
</script></body>"""

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH: the page is not drawn in a browser")


def draw(html, folder, size="1400,1000"):
    """Return the page as the browser has it after its scripts, and what its console says."""
    path = folder / "page.html"
    path.write_text(html, encoding="utf-8")
    command = [BROWSER, *FLAGS, f"--window-size={size}", f"--user-data-dir={folder / 'profile'}", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=80, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def html(synthetic):
    return page([Run.load(found) for found in sorted(synthetic.iterdir())])


@pytest.mark.parametrize("size", ["1400,1000", "800,1000"])
def test_all_plots_are_drawn(html, tmp_path, size):
    dom, console = draw(html, tmp_path, size)
    assert console == []
    plots = html.count('class="plot"')
    assert plots == 20 and f'data-drawn="{plots}"' in dom
    assert len(re.findall(r'class="plot js-plotly-plot"', dom)) == plots
    # 13 line plots of 4 variants, a mean line each, all with a path that goes somewhere
    assert len(re.findall(r'class="js-line" d="M[^"]{100,}', dom)) >= 13
    assert len(re.findall(r'<g class="hm"><image', dom)) == 4
    assert len(re.findall(r'class="pattern_filled"|class="[^"]*pattern', dom)) >= 1


def test_a_click_hides_a_variant_in_every_plot(html, tmp_path):
    blocks = json.loads(re.search(r'id="charts">(.*?)</script>', html)[1])
    traces = [trace for chart in blocks.values() for trace in chart["traces"] if trace.get("mode") == "lines"]
    left = sum(trace["meta"] != 0 for trace in traces)
    dom, console = draw(re.sub(r"<meta http-equiv[^>]*>", "", html).replace("</body>", CLICK), tmp_path)
    assert console == []
    assert dom.count('aria-pressed="false" data-variant="0"') == 1
    assert dom.count('class="js-line"') == left < len(traces)


def test_the_policy_holds_even_where_escaping_would_fail(html, tmp_path):
    markup = "<img src=x onerror='document.body.dataset.owned=1'><script>document.body.dataset.owned=1</script>"
    dom, console = draw(html.replace("<main>", f"<main>{markup}"), tmp_path)
    assert "data-drawn=" in dom and "data-owned=" not in dom
    assert any("Content Security Policy" in line for line in console)
