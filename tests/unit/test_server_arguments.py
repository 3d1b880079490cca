"""Every argument of the pinned SGLangs is allowed, tested or refused; the guard in the engine refuses what it can."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from r3_adapter.errors import CaptureError
from r3_adapter.sglang.releases import RELEASES, installed_release
from r3_adapter.sglang.server_argument_names import ALLOWED, TESTED
from r3_adapter.sglang.server_arguments import REFUSED, check_server_arguments, known_arguments
from r3_adapter.sglang.settings import EngineSettings

ROOT = Path(__file__).parents[2]

_SCRIPT = """
import json, sys
from r3_adapter.sglang.cpu import enable_cpu
enable_cpu()
import dataclasses
import msgspec
from sglang.srt.server_args import ServerArgs
asked = json.load(sys.stdin)
kind = dataclasses if dataclasses.is_dataclass(ServerArgs) else msgspec.structs
defaults = {field.name: field.default for field in kind.fields(ServerArgs)}
if asked:
    from sglang.srt.state_capturer import engine_settings
    from sglang.srt.state_capturer import routed_experts_guard as guard

def refusals(changes):
    settings = {**dict.fromkeys(engine_settings._NOT_IN_ALL), **defaults, **changes}
    guard.setting = settings.__getitem__
    guard.is_moe_input_scattered = lambda: False
    names = [name for name in vars(guard) if name.endswith("_refusals") and name != "_model_refusals"]
    found = [pair for name in names for pair in getattr(guard, name)()]
    return [reason for refused, reason in found if refused]

answers = {name: refusals({name: value}) for name, value in asked.items()}
print(json.dumps({"fields": list(defaults), "none": refusals({}) if asked else None, "answers": answers}))
"""

VALUES = {"attn_cp_size": 2, "dcp_size": 2, "disaggregation_mode": "prefill", "speculative_algorithm": "EAGLE"}
VALUES |= {"radix_cache_backend": "mine"}
OF_MODULES = {"moe_runner_backend", "moe_a2a_backend"}
"""What the guard asks a model's modules and backends for."""


def _value(name):
    """Return a value that is refused."""
    refusal = REFUSED[name]
    if refusal.refused is not None:
        return refusal.refused[0]
    candidates = (VALUES.get(name), True, 3, "x")
    return next(each for each in candidates if refusal.refuses(each))


@pytest.fixture(scope="module")
def sglang():
    found = importlib.util.find_spec("sglang")
    if not found:
        pytest.skip("needs sglang")
    guard = Path(found.submodule_search_locations[0], "srt/state_capturer/routed_experts_guard.py")
    names = (known_arguments(installed_release()) & REFUSED.keys()) - OF_MODULES if guard.exists() else ()
    asked = {name: _value(name) for name in names if REFUSED[name].by == "guard"}
    command = [sys.executable, "-W", "ignore", "-c", _SCRIPT]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"guard": guard}


def test_every_argument_of_the_installed_release_is_in_one_class(sglang):
    fields, known = set(sglang["fields"]), known_arguments(installed_release())
    assert len(fields) == len(sglang["fields"])
    assert fields - known == set(), "read what these do to rows, and put them into server_argument_names.py or REFUSED"
    of_patches = set() if sglang["guard"].exists() else {"routed_experts_dir", "routed_experts_format"}
    assert known - fields == of_patches, "releases.py does not say that these were added or removed"
    assert len(ALLOWED) + len(TESTED) + len(REFUSED) == len(known_arguments())


def test_the_tables_are_of_the_pins():
    pins = [path.stem.removeprefix("sglang-") for path in ROOT.glob("launch/pins/sglang-*.txt")]
    folders = {path.parent.name for path in ROOT.glob("patches/sglang/*/series")}
    assert pins and {*pins, *folders} <= set(RELEASES)
    if installed_release() is None:
        pytest.skip("needs sglang")
    assert installed_release() in RELEASES


@pytest.mark.parametrize("release", RELEASES)
def test_an_argument_of_another_release_is_refused_by_the_name_of_that_one(release):
    missing = known_arguments() - known_arguments(release)
    assert missing
    for name in missing:
        with pytest.raises(CaptureError) as raised:
            check_server_arguments({name: None}, release)
        start = f"SGLang's argument {name!r} is no argument of SGLang {release}; "
        having = str(raised.value).removeprefix(start).removesuffix(" it").rsplit(" ", 1)[0].split(" and ")
        assert having == [each for each in RELEASES if name in known_arguments(each)]
        assert having and release not in having
        # A release whose arguments nobody has read decides itself.
        check_server_arguments({name: None}, "0.0.1")


def test_the_guard_refuses_what_the_table_says_it_does(sglang):
    if sglang["none"] is None:
        pytest.skip("needs the patched sglang")
    assert sglang["none"] == []
    for name, reasons in sglang["answers"].items():
        assert len(reasons) == 1, f"{name}: {reasons}"
        assert name in reasons[0] or "context parallelism" in reasons[0], f"{name}: {reasons}"
    backends = (sglang["guard"].parents[1] / "layers/moe/utils.py").read_text()
    assert [name for name in REFUSED["moe_runner_backend"].refused if f'"{name}"' not in backends] == []


def test_what_only_the_adapter_refuses_says_why():
    for name, refusal in REFUSED.items():
        assert bool(refusal.beside) == (refusal.by == "adapter"), name


def test_what_is_called_tested_is_used_by_a_test():
    files = [*ROOT.glob("tests/**/*.py"), ROOT / "r3_adapter/sglang/settings.py"]
    text = "".join(path.read_text() for path in files if path != Path(__file__))
    assert [name for name in TESTED if f'"{name}"' not in text] == []


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_names_both_operands(name):
    value, release = _value(name), next(each for each in RELEASES if name in known_arguments(each))
    with pytest.raises(CaptureError) as raised:
        check_server_arguments({"dtype": "float32", name: value}, release)
    assert str(raised.value).startswith(f"SGLang's {name} {value!r} != ")
    assert str(raised.value).endswith(REFUSED[name].reason)
    for each in (None, *REFUSED[name].allowed):
        check_server_arguments({name: each}, release)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"enable_unified_memory": True},
            "SGLang's enable_unified_memory True != False or None: rows are written at kernel",
        ),
        ({"dllm_algorithm": "LowConfidence"}, "SGLang's dllm_algorithm 'LowConfidence' != None: a diffusion model"),
        ({"moe_runner_backend": "flashinfer_mxfp4"}, "another than 'triton_kernel' or"),
        (
            {"json_model_override_args": '{"num_hidden_layers": 2}'},
            "would not be that of the checkpoint's configuration",
        ),
        ({"no_such_flag": 1}, "SGLang's argument 'no_such_flag' is no argument of SGLang 0.5.20"),
        ({"max_total_token": 1}, "did you mean 'max_total_tokens'?"),
        ({"tensor_parallel_size": 2}, "'tensor_parallel_size' is no argument of SGLang"),
        ({"enable_lmcache": "false"}, "'false' != False or None"),
    ],
)
def test_messages(arguments, message):
    with pytest.raises(CaptureError) as raised:
        check_server_arguments(arguments, "0.5.20")
    assert message in str(raised.value)


@pytest.mark.parametrize("gpu", [False, True])
def test_an_engines_own_arguments_are_allowed(gpu):
    settings = EngineSettings("/models/m", extra={"page_size": 16, "mem_fraction_static": 0.5})
    check_server_arguments(settings.engine_arguments(gpu=gpu))
