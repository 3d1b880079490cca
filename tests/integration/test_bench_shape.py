"""`r3 bench replay --shape` measures all parts on this machine, and replay computes what live routing does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.megatron]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "r3_adapter.cli", "bench", "replay", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_all_parts_of_a_tiny_shape(tmp_path: Path) -> None:
    sizes = ("--layers", "2", "--tokens", "64", "--router-tokens", "32", "128", "--pairs", "2")
    done = run("--shape", "tiny", *sizes, "--json", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "figures.json").read_text())
    assert json.loads(done.stdout) == found
    assert {"hardware", "versions", "router 32", "router 128", "layer", "step"} <= found.keys()
    assert found["left_out"].keys() == {"live_fused"}
    for part in ("router 32", "router 128", "layer", "step"):
        copied = {"replay_copied", "replay_live_rows_copied"} if part.startswith("router") else set()
        assert found[part].keys() == copied | {
            *("live", "live_again", "native", "replay", "replay_unplanned", "replay_live_rows")
        }
        for ways in found[part].values():
            assert ways["with_launches_us"] > 0
            assert ways["launches"] > 0
            assert (ways["host_us"] is not None) == part.startswith("router")
        assert found[part]["live"]["over_live"]["median"] == 1
    # Where all rows are given, no top-k is computed.
    assert "aten::topk" in found["router 128"]["live"]["longest"]
    assert "aten::topk" not in found["router 128"]["replay"]["longest"]
    answers = found["answers"]
    assert [what for what, same in answers.items() if same is False] == []
    # float32: the bits of live routing in all parts.
    assert {answers[f"{part} replay: relative to live"] for part in ("layer", "step")} == {0.0}
    for way in ("replay", "replay_copied"):
        assert {answers[f"router 128 {way}: {what}"] for what in ("probs", "gradient")} == {0.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "cuda"), "--device cuda needs --shape"),
        (("--device", "cuda", "--shape", "tiny"), "device 'cuda' != cpu, which this machine has"),
        (("--shape", "tiny", "--tokens", "5000"), "5000 tokens are no whole number of samples of 4096"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments, "--pairs", "2", "--parts", "layer")
    assert done.returncode == 2, done.stdout
    assert message in done.stderr
