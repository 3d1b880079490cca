"""SGLang can be imported in whatever order a script imports what it needs, with a GPU or without."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.engine

FIRST = (
    "from transformers import AutoTokenizer",
    "from transformers import AutoImageProcessor, AutoModelForCausalLM, CLIPImageProcessor; import transformers",
    "import torch, megatron.core; from r3_adapter.megatron import cpu; cpu.install()",
)


@pytest.mark.parametrize("first", FIRST)
def test_sglang_can_be_imported_after(first: str) -> None:
    pytest.importorskip("transformers")
    then = "from r3_adapter.sglang.cpu import enable_cpu; enable_cpu(); enable_cpu()"
    code = f"{first}\n{then}\nfrom sglang.srt.entrypoints.engine import Engine\nprint(Engine.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["Engine"]), done.stderr[-2000:]
