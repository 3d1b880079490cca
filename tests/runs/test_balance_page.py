"""The page of `r3 balance` says what the figures say, and is drawn on a narrow screen."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from r3_adapter.balance.charts import load_maps, rank_bars
from r3_adapter.balance.compare import WAYS, compare
from r3_adapter.balance.page import page
from r3_adapter.balance.simulate import World, simulate

SPEC = importlib.util.spec_from_file_location("test_browser", Path(__file__).with_name("test_browser.py"))
browser = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(browser)

SMALL = {"num_experts": 16, "topk": 4, "num_layers": 3, "num_prompts": 8, "samples_per_prompt": 8, "mean_tokens": 300}


@pytest.fixture(scope="module")
def found():
    return compare(simulate(World("strong", **SMALL, drift=0.1), 3, 0), 4, 1500)


@pytest.fixture(scope="module")
def html(found):
    return page(found, "simulated <b>strong</b> & more")


def test_the_page_has_the_figures_and_lets_no_markup_in(found, html):
    assert "simulated &lt;b&gt;strong&lt;/b&gt; &amp; more" in html
    for name, way in found.ways.items():
        assert WAYS[name] in html
        assert f"{way.figures.ratio:.3f}" in html
    as_is, placed = load_maps(found)
    # Each map has each layer's experts once, the second in the order of their slots.
    assert np.array_equal(placed.said["expert"], found.shown.placed)
    assert np.array_equal(np.sort(as_is.said["of the mean"], axis=1), np.sort(placed.said["of the mean"], axis=1))
    before, after = (np.array(over) for over in next(rank_bars(found)).groups.values())
    last = found.ways["arrival"]
    own = slice(-len(found.shown.arrived), None)
    assert before.max() == pytest.approx((last.fullest[own] / last.mean[own]).max(), abs=1e-3)
    assert after.mean() == pytest.approx(1, abs=1e-3)


@pytest.mark.skipif(browser.BROWSER is None, reason="no chromium on PATH: the page is not drawn in a browser")
def test_all_plots_are_drawn(html, tmp_path):
    dom, console = browser.draw(html, tmp_path, "500,1000")
    assert console == []
    plots = html.count('class="plot"')
    assert plots == 8
    assert f'data-drawn="{plots}" data-blank="0"' in dom
