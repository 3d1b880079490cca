"""How an engine is started: arguments, environment, perturbation."""

import os
from types import SimpleNamespace
from typing import Any

import pytest

from r3_adapter.errors import CaptureError
from r3_adapter.sglang import cpu, plugin
from r3_adapter.sglang.engine import Engine, rollout_in_subprocess
from r3_adapter.sglang.perturb import VARIABLE, Perturbation
from r3_adapter.sglang.settings import EngineSettings

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_settings_survive_their_file() -> None:
    for settings in (
        EngineSettings("model"),
        EngineSettings("model", shared_memory=True, perturb=Perturbation(3, 0.2), extra={"page_size": 1}),
    ):
        assert EngineSettings.from_json(settings.to_json()) == settings
    for text in ("", "[]", "{}", '{"perturb": null, "model": 1}'):
        with pytest.raises(CaptureError, match="cannot be read"):
            EngineSettings.from_json(text)


def test_engine_arguments() -> None:
    settings = EngineSettings("model", extra={"page_size": 1, "random_seed": 5})
    without, with_gpu = settings.engine_arguments(gpu=False), settings.engine_arguments(gpu=True)
    assert (without["device"], without["disable_cuda_graph"], without["disable_overlap_schedule"]) == (
        "cpu",
        True,
        True,
    )
    assert not with_gpu["disable_overlap_schedule"]
    assert not {"device", "attention_backend", "disable_cuda_graph"} & with_gpu.keys()
    assert (with_gpu["page_size"], with_gpu["random_seed"], with_gpu["disable_radix_cache"]) == (1, 5, True)
    assert with_gpu["routed_experts_format"] == "safetensors"
    flat = EngineSettings("model", routed_experts_format="flat", perturb=Perturbation(0, 0.5))
    # A released SGLang has no such argument; a CUDA graph would repeat one random draw.
    assert "routed_experts_format" not in flat.engine_arguments(gpu=True)
    assert "disable_cuda_graph" not in flat.engine_arguments(gpu=True)
    exact = EngineSettings("model", routed_experts_format="exact-flat")
    assert exact.engine_arguments(gpu=True)["routed_experts_format"] == "exact-flat"
    assert [each.is_flat for each in (settings, flat, exact)] == [False, True, True]


def test_on_a_cpu_other_processes_may_take_memory_while_an_engine_starts() -> None:
    # SGLang refuses to start where more of the memory than this has gone since it began to load the weights.
    for settings, fraction in (
        (EngineSettings("model"), 0.1),
        (EngineSettings("model", max_total_tokens=64), 0.9),
        (EngineSettings("model", extra={"max_total_tokens": 64}), 0.9),
        (EngineSettings("model", max_total_tokens=64, extra={"mem_fraction_static": 0.3}), 0.3),
    ):
        assert settings.engine_arguments(gpu=False)["mem_fraction_static"] == fraction
    assert "mem_fraction_static" not in EngineSettings("model", max_total_tokens=64).engine_arguments(gpu=True)


def test_the_defaults_are_the_engines_own() -> None:
    arguments = EngineSettings("model").engine_arguments(gpu=True)
    assert (arguments["max_total_tokens"], arguments["max_running_requests"]) == (None, None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"perturb": "0.2"}, "perturb '0.2' is no Perturbation; Perturbation.parse reads 'SEED:FRACTION'"),
        (
            {"shared_memory": True, "routed_experts_format": "exact-flat"},
            "shared_memory with routed_experts_format 'exact-flat': only 'safetensors' has it",
        ),
        ({"model_path": None}, "model_path None is no path of a folder"),
        ({"extra": 5}, "extra 5 is no mapping of SGLang's arguments"),
        ({"tp_size": 0}, "tp_size (0) < 1"),
        ({"pp_size": None}, "pp_size (None) is not a whole number"),
        ({"max_total_tokens": "8"}, "max_total_tokens ('8') is not a whole number"),
        ({"radix_cache": "no"}, "radix_cache 'no' is neither True nor False"),
        ({"weight_version": 3}, "weight_version 3 is no word"),
        ({"random_seed": 1.5}, "random_seed (1.5) is not a whole number"),
    ],
)
def test_settings_of_another_kind_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(CaptureError) as refused:
        EngineSettings(**{"model_path": "model", **values})
    assert str(refused.value) == message


def test_a_name_of_a_hub_is_no_folder() -> None:
    with pytest.raises(CaptureError) as refused:
        Engine(EngineSettings("Qwen/Qwen3-30B-A3B"))
    assert str(refused.value) == (
        "model_path 'Qwen/Qwen3-30B-A3B' is no folder; download a model of the hub first (`hf download`), "
        "and name its folder"
    )


def test_a_rollout_is_checked_before_its_process_starts() -> None:
    settings = EngineSettings("model")
    for options, message in (
        ({"batch_size": 0}, r"batch_size \(0\) < 1"),
        ({"follow_ups": [[[1]], [[2]]]}, "follow-ups of 2 prompts != 1 prompts"),
        ({"sampling_params": {"regex": "a"}}, "regex 'a' changes"),
        ({"prompts": [[-1]]}, "prompt 0: token id -1"),
        ({"settings": "model"}, "settings 'model' is not an EngineSettings"),
    ):
        given: Any = {"settings": settings, "prompts": [[1]], "sampling_params": {}, **options}
        with pytest.raises(CaptureError, match=message):
            rollout_in_subprocess(**given)


def test_a_malformed_perturbation_stops_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "has_gpu", lambda: True)
    monkeypatch.setenv(VARIABLE, "all")
    with pytest.raises(SystemExit, match="R3_PERTURB='all'"):
        plugin.register()


def test_a_plugin_that_would_not_be_loaded_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_PLUGINS", raising=False)
    monkeypatch.setattr(plugin, "entry_points", lambda **_: [])
    with pytest.raises(CaptureError, match="no entry point r3_adapter"):
        plugin.check_installed()
    monkeypatch.setattr(plugin, "entry_points", lambda **_: ["found"])
    plugin.check_installed()
    monkeypatch.setenv("SGLANG_PLUGINS", "other, another")
    with pytest.raises(CaptureError, match=r"\(other, another\) leaves out r3_adapter"):
        plugin.check_installed()


def test_with_a_gpu_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "has_gpu", lambda: True)
    before = dict(os.environ)
    assert cpu.cpu_environment() == {}
    cpu.enable_cpu()
    assert dict(os.environ) == before


def test_stand_ins_are_for_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = {"sgl_kernel"}
    finder = SimpleNamespace(find_spec=lambda name: None if name in missing else object())
    monkeypatch.setattr(cpu, "PathFinder", finder)
    monkeypatch.setattr(cpu, "has_gpu", lambda: False)
    monkeypatch.setenv("PYTHONPATH", "mine")
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1")
    environment = cpu.cpu_environment()
    assert environment["PYTHONPATH"] == os.pathsep.join([str(cpu.STUBS / "for_sgl_kernel"), "mine"])
    assert environment["SGLANG_CPU_OMP_THREADS_BIND"] == "0|1"
    assert environment["SGLANG_USE_CPU_ENGINE"] == "1"
