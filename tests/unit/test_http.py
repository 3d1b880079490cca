"""Prompts go to the server that was named, and its answers are bounded."""

from typing import Any

import pytest

from r3_adapter.errors import CaptureError
from r3_adapter.sglang import http
from r3_adapter.sglang.engine import generate_over_http
from r3_adapter.sglang.moe_config import MoEConfig

MOE = MoEConfig(num_experts=8, topk=2, layer_ids=(1, 3), num_layers=4)


def test_no_proxy_of_the_environment_is_asked(monkeypatch: pytest.MonkeyPatch, answers: Any) -> None:
    with answers(b"[]") as (proxy, by_proxy), answers(b"[null]") as (url, asked):
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, proxy)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        # The loopback goes through no proxy, not even through one that is named.
        names = ("127.0.0.1", "localhost", "127.1", "0.0.0.0", "[::ffff:127.0.0.1]")
        for host in [url.replace("127.0.0.1", name) for name in names]:
            for named in (None, proxy):
                with pytest.raises(CaptureError, match="not a reply: None"):
                    generate_over_http(host, [[1]], {}, MOE, proxy=named)
        assert (by_proxy, [path for path, _ in asked]) == ([], ["/generate"] * 2 * len(names))
        with pytest.raises(CaptureError, match=r"0 replies != 1 prompts"):
            generate_over_http("http://engine.invalid:1", [[1]], {}, MOE, proxy=proxy)
        assert [path for path, _ in by_proxy] == ["http://engine.invalid:1/generate"]
        with pytest.raises(CaptureError, match=r"http://engine.invalid:1: "):
            generate_over_http("http://engine.invalid:1", [[1]], {}, MOE)
        assert len(by_proxy) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(status: int, answers: Any) -> None:
    with (
        answers(b"[]") as (other, asked),
        answers(b"", status, Location=f"{other}/generate") as (url, _),
        pytest.raises(CaptureError, match=f"{url}: HTTP Error {status}"),
    ):
        generate_over_http(url, [[1]], {}, MOE)
    assert asked == []


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:30000",
        "localhost",
        "file:///etc/passwd",
        "ftp://host/",
        "http://",
        "",
        "http://a b",
        "http://h:x",
        None,
        5,
    ],
)
def test_what_is_no_url_of_a_server_is_refused(url: Any) -> None:
    with pytest.raises(CaptureError, match=r"^url .* (is not http://HOST:PORT or https://HOST:PORT|is no text)$"):
        generate_over_http(url, [[1]], {}, MOE)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[" * 100_000, b"9" * 5000, b"\xff", b"null", b"5", b'{"error": {}}', b"[5]"]
)
def test_an_answer_that_is_no_list_of_replies_is_refused(text: bytes, answers: Any) -> None:
    with answers(text) as (url, _), pytest.raises(CaptureError, match=url):
        generate_over_http(url, [[1]], {}, MOE)


def test_an_answer_is_bounded(monkeypatch: pytest.MonkeyPatch, answers: Any) -> None:
    monkeypatch.setattr(http, "MAX_REPLY", 100)
    with answers(b" " * 101 + b"[]") as (url, _), pytest.raises(CaptureError, match="more than 100 bytes"):
        generate_over_http(url, [[1]], {}, MOE)


def test_an_answer_that_comes_too_slowly_is_late(answers: Any) -> None:
    with answers(b" " * 20, pause=0.1) as (url, _), pytest.raises(CaptureError, match=f"^{url}: timed out$"):
        http.post_json(url, {}, timeout=0.5, place=url)


def test_half_an_answer_is_none(answers: Any) -> None:
    headers = {"Content-Length": "10"}
    with answers(b"[]", **headers) as (url, _), pytest.raises(CaptureError, match="IncompleteRead"):
        http.post_json(url, {}, timeout=60, place=url)


@pytest.mark.parametrize("prompt", [[], [-1], [2**31], [True], [1.0], ["a"], "abc", None, {"a": 1}])
def test_what_is_no_prompt_is_not_sent(prompt: Any, answers: Any) -> None:
    with answers(b"[]") as (url, asked), pytest.raises(CaptureError, match="prompt 0: "):
        generate_over_http(url, [prompt], {}, MOE)
    assert asked == []
