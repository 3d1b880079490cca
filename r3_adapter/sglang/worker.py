"""A rollout in a process of its own: `python -m r3_adapter.sglang.worker REQUEST.json FOLDER`.

REQUEST.json: {"settings": of EngineSettings.to_json, "input_ids": [[token id]], "sampling_params": one or a list}.
FOLDER: gets the samples, as r3_adapter.rollout.save_samples writes them.
FOLDER.progress: one byte for each sample that is done.
In the request, "replies": true lets FOLDER.replies.json get what SGLang said, and FOLDER nothing; "batch_size" is
that of Engine.replies, "recomputed" that of samples_of. "follow_ups", a list of turns for each prompt, makes
conversations of the prompts, with the same sampling_params for all.
"floor", {"input_ids": ..., "sampling_params": ...}, is asked first, of the engine as it is without its perturbation;
FOLDER.floor gets its samples.
"""

import base64
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from r3_adapter.processes import guarded
from r3_adapter.rollout import Sample, save_samples
from r3_adapter.sglang.conversation import converse
from r3_adapter.sglang.engine import Engine
from r3_adapter.sglang.settings import EngineSettings
from r3_adapter.signals import run_command


def main(argv: Sequence[str]) -> int:
    """Run a request; return the exit code."""
    path, folder = Path(argv[0]), Path(argv[1])
    request = json.loads(path.read_text(encoding="utf-8"))
    options = {"batch_size": request.get("batch_size")}
    settings, prompts = EngineSettings.from_json(request["settings"]), request["input_ids"]
    bar = Path(f"{folder}.progress")

    def progress(done: int, _: int) -> None:
        bar.write_bytes(b"." * done)

    with Engine(settings) as engine:
        if floor := request.get("floor"):
            engine.perturb(False)
            save_samples(Path(f"{folder}.floor"), _samples(engine, {**request, **floor}, **options))
            engine.perturb(True)
        if request.get("follow_ups"):
            turns = zip(prompts, request["follow_ups"], strict=True)
            found = [converse(engine, prompt, request["sampling_params"], then) for prompt, then in turns]
            save_samples(folder, [sample for samples in found for sample in samples])
            return 0
        if request.get("replies"):
            replies = engine.replies(prompts, request["sampling_params"], progress=progress, **options)
            text = json.dumps(replies, default=lambda payload: base64.b64encode(payload).decode())
            Path(f"{folder}.replies.json").write_text(text, encoding="utf-8")
            return 0
        samples = _samples(engine, request, progress=progress, **options)
    save_samples(folder, samples)
    return 0


def _samples(engine: Engine, request: Mapping[str, Any], **options: Any) -> list[Sample]:
    return engine.generate(
        request["input_ids"], request["sampling_params"], recomputed=request.get("recomputed", "raise"), **options
    )


if __name__ == "__main__":
    with guarded():
        sys.exit(run_command("rollout", lambda: main(sys.argv[1:])))
