"""The rollout's side: ask verl's SGLang server for routes, read them from its reply, and seal them.

verl 0.9 asks for them too, but then reads the reply's base64 as a tensor, or imports a module that SGLang has dropped
since 0.5.12. So verl's own option is switched off for its server, and this plug-in changes its request and reads its
reply.
"""

import functools
import inspect
import weakref
from collections.abc import AsyncIterator
from types import ModuleType
from typing import Any

import numpy as np

from r3_adapter.errors import CaptureError, ReplayError
from r3_adapter.frameworks.verl.sealed import seal
from r3_adapter.sglang.moe_config import MoEConfig
from r3_adapter.sglang.reply import output_ids_of, payload_of, was_aborted

FORMAT = "exact-flat"
"""The only form of the patched engine that verl's arrays can hold; it ends a request that it would be wrong about."""

_MOE: "weakref.WeakKeyDictionary[Any, MoEConfig]" = weakref.WeakKeyDictionary()


def change_server(module: ModuleType) -> None:
    """Let SGLangHttpServer.generate return sealed rows.

    Raises:
        ReplayError: The class is not as it was read.

    Source: verl/workers/rollout/sglang_rollout/async_sglang_server.py@0.9.1:SGLangHttpServer.generate
    """
    server = getattr(module, "SGLangHttpServer", None)
    generate = getattr(server, "generate", None)
    if not inspect.iscoroutinefunction(generate) or "prompt_ids" not in inspect.signature(generate).parameters:
        raise ReplayError(
            f"{module.__name__}: no SGLangHttpServer.generate(prompt_ids, ...): this version of verl is not supported"
        )
    signature = inspect.signature(generate)

    @functools.wraps(generate)
    async def sealing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.config.enable_rollout_routing_replay:
            return await generate(self, *args, **kwargs)
        check_engine(self)
        given, step = signature.bind(self, *args, **kwargs).arguments, self.global_steps
        prompt_ids, place = list(given["prompt_ids"]), f"request {given['request_id']}"
        asked = _Asked(self)
        output = await generate(asked, *args, **kwargs)
        output.routed_experts = sealed_rows(asked.reply, prompt_ids, output.token_ids, step, moe_of(self), place)
        return output

    server.generate = sealing  # type: ignore[union-attr]


def check_engine(server: Any) -> None:
    """Refuse an engine whose rows may be another token's, and a server of which two engines compute a request.

    Raises:
        CaptureError: Names the flag.
    """
    if (role := getattr(server, "_disaggregation_role", "null")) != "null":
        raise CaptureError(f"disaggregation role {role!r} != 'null': each of two engines has a part of the routes")
    found = getattr(server.tokenizer_manager.server_args, "routed_experts_format", None)
    if found != FORMAT:
        raise CaptureError(
            f"routed_experts_format ({found!r}) != {FORMAT!r}: patch SGLang (`r3 patch apply sglang`) and give "
            f"+actor_rollout_ref.rollout.engine_kwargs.sglang.routed_experts_format={FORMAT}"
        )


def moe_of(server: Any) -> MoEConfig:
    """Return what the server's model is, read once."""
    if server not in _MOE:
        _MOE[server] = MoEConfig.from_config(server.model_config.hf_config.to_dict(), place="hf_config")
    return _MOE[server]


def sealed_rows(
    reply: Any, prompt_ids: list[int], output_ids: list[int], step: int | None, moe: MoEConfig, place: str
) -> Any:
    """Return [S - 1, L + P, K] int16, or None of a request that was aborted before it had routes.

    reply: the engine's, with routes in the form FORMAT.
    output_ids: what verl has made of it; empty where it takes none of the output.

    Raises:
        CaptureError: No routes, those of other tokens, or bytes that do not fit.
    """
    if not output_ids:
        return None
    if was_aborted(reply, place) and reply["meta_info"].get("routed_experts") is None:
        return None
    if (found := output_ids_of(reply, place)) != list(output_ids):
        raise CaptureError(f"{place}: verl has {len(output_ids)} output tokens, not the reply's {len(found)}")
    payload = payload_of(reply, place)
    tokens = [*prompt_ids, *output_ids]
    shape = (len(tokens) - 1, moe.num_layers, moe.topk)
    if len(payload) != 4 * np.prod(shape):
        raise CaptureError(
            f"{place}: payload of {len(payload)} bytes != {4 * np.prod(shape)} of int32 {list(shape)} "
            "(tokens - 1, decoder layers, topk)"
        )
    return seal(np.frombuffer(payload, "<i4").reshape(shape), tokens[:-1], step, moe, place)


class _Stand:
    """A proxy of an object: attributes that are not defined here are that object's."""

    def __init__(self, stands_for: Any) -> None:
        object.__setattr__(self, "_stands_for", stands_for)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stands_for, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._stands_for, name, value)


class _Config(_Stand):
    """A rollout's configuration by which verl does not read routes."""

    enable_rollout_routing_replay = False


class _Asked(_Stand):
    """A server during one request. reply: what the engine has answered."""

    reply: Any

    def __init__(self, server: Any) -> None:
        super().__init__(server)
        object.__setattr__(self, "reply", None)

    @property
    def config(self) -> Any:
        return _Config(self._stands_for.config)

    @property
    def tokenizer_manager(self) -> Any:
        return _Asking(self._stands_for.tokenizer_manager, self)


class _Asking(_Stand):
    """A tokenizer manager that asks for routes and keeps the reply."""

    def __init__(self, manager: Any, asked: _Asked) -> None:
        super().__init__(manager)
        object.__setattr__(self, "_asked", asked)

    async def generate_request(self, request: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        request.return_routed_experts = True
        async for reply in self._stands_for.generate_request(request, *args, **kwargs):
            object.__setattr__(self._asked, "reply", reply)
            yield reply
