"""Roll out prompts at a running server."""

import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException, HTTPResponse, IncompleteRead
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from r3_adapter.errors import CaptureError, check_choice, show
from r3_adapter.rollout import Sample
from r3_adapter.sglang.moe_config import MoEConfig
from r3_adapter.sglang.samples import Prompts, Recomputed, checked_prompts, samples_of
from r3_adapter.sglang.sampling import SamplingParams, checked_all
from r3_adapter.sglang.shared import fetch_payload

MAX_REPLY = 1 << 34
"""Bytes of an answer at most."""
_MAX_ERROR = 1 << 16
_CHUNK = 1 << 20


def generate_over_http(
    url: str,
    prompts: Prompts,
    sampling_params: SamplingParams,
    moe: MoEConfig | None,
    *,
    native: bool = False,
    recomputed: Recomputed = "raise",
    timeout: float = 600,
    shared_memory: Path | None = None,
    proxy: str | None = None,
) -> list[Sample]:
    """Generate at a running server (one POST to /generate for all prompts); return a sample for each prompt.

    url: as in "http://127.0.0.1:30000".
    moe, recomputed: as in samples_of.
    shared_memory: the --routed-experts-dir of a server on this host; None if the routes come with the replies.
    proxy: URL of one to go through. The environment's (`http_proxy`) is never asked, and the loopback never goes
        through one.

    Raises:
        CaptureError: The server refuses or cannot be reached, or a reply cannot be used; a prompt or a sampling
            parameter is refused.
        TraceError: Malformed routes.
    """
    check_choice("recomputed", recomputed, Recomputed, CaptureError)
    body = {
        "return_logprob": True,
        "return_routed_experts": True,
        "input_ids": checked_prompts(prompts),
        "sampling_params": checked_all(sampling_params, len(prompts)),
    }
    replies = post_json(f"{checked_url(url)}/generate", body, timeout=timeout, proxy=proxy, place=url)
    place = f"{url} request"
    if shared_memory is not None and isinstance(replies, list):
        replies = [fetch_payload(reply, shared_memory, f"{place} {at}") for at, reply in enumerate(replies)]
    return samples_of(
        replies, prompts, moe, native=native, place=place, recomputed=recomputed, sampling_params=sampling_params
    )


def post_json(url: str, body: Mapping[str, Any], *, timeout: float, proxy: str | None = None, place: str) -> Any:
    """Post JSON; return the JSON that is answered.

    Raises:
        CaptureError: No answer, one that refuses or sends elsewhere, or one that is no JSON or too large.
    """
    return _answer(url, json.dumps(body).encode(), timeout, proxy, place)


def get_json(url: str, *, timeout: float, proxy: str | None = None, place: str) -> Any:
    """Get the JSON at a URL.

    Raises:
        CaptureError: As post_json.
    """
    return _answer(url, None, timeout, proxy, place)


def _answer(url: str, body: bytes | None, timeout: float, proxy: str | None, place: str) -> Any:
    proxies = {} if proxy is None or _is_loopback(url) else {"http": checked_url(proxy), "https": checked_url(proxy)}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies), _NoRedirects)
    request = urllib.request.Request(url, body, {} if body is None else {"Content-Type": "application/json"})
    try:
        until = time.monotonic() + timeout
        with opener.open(request, timeout=timeout) as answer:
            text = _read(answer, until)
    except urllib.error.HTTPError as error:
        said = error.read(_MAX_ERROR)[:500].decode(errors="replace")
        raise CaptureError(f"{place}: {error}: {said}") from error
    except urllib.error.URLError as error:
        raise CaptureError(f"{place}: cannot be reached: {error.reason}") from error
    except (OSError, ValueError, HTTPException) as error:
        raise CaptureError(f"{place}: {error}") from error
    if len(text) > MAX_REPLY:
        raise CaptureError(f"{place}: the answer has more than {MAX_REPLY} bytes")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CaptureError(f"{place}: the answer is no JSON: {type(error).__name__}: {str(error)[:200]}") from error


def checked_url(url: str) -> str:
    """Return a URL of a server without the slash at its end.

    Raises:
        CaptureError: It is not of http or https, or has no host.
    """
    if not isinstance(url, str):
        raise CaptureError(f"url {show(url)} is no text")
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or True)
    except ValueError:
        good = False
    if not good or any(character.isspace() or ord(character) < 32 for character in url):
        raise CaptureError(f"url {show(url)} is not http://HOST:PORT or https://HOST:PORT")
    return url.rstrip("/")


def _read(answer: HTTPResponse, until: float) -> bytes:
    """Read an answer, at most one byte beyond the limit; the deadline also holds for a server that sends slowly."""
    parts, size = [], 0
    while size <= MAX_REPLY and (part := answer.read1(_CHUNK)):
        parts.append(part)
        size += len(part)
        if time.monotonic() > until:
            raise TimeoutError("timed out")
    if size <= MAX_REPLY and answer.length:
        raise IncompleteRead(b"", answer.length)
    return b"".join(parts)


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        # Also what the system takes for an address, as 127.1.
        address = ip_address(socket.inet_aton(host)) if ":" not in host else ip_address(host)
    except (OSError, ValueError):
        return False
    address = getattr(address, "ipv4_mapped", None) or address
    # 0.0.0.0 is this host, too.
    return address.is_loopback or address.is_unspecified


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Redirects are refused: prompts go to the server that was named alone."""

    def redirect_request(self, *args: Any) -> None:
        return None
