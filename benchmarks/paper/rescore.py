"""Score a rollout with the engine that made it, in one go: python rescore.py SETTINGS SAMPLES OUT.npy.

SETTINGS: of EngineSettings.to_json. OUT: [tokens] float32, the log-probabilities of all responses one after the other,
as Engine.rescore finds them.
"""

import sys
from pathlib import Path

import numpy as np

from r3_adapter.rollout import load_samples
from r3_adapter.sglang.engine import Engine
from r3_adapter.sglang.settings import EngineSettings

if __name__ == "__main__":
    settings, samples, out = sys.argv[1:]
    with Engine(EngineSettings.from_json(settings)) as engine:
        found = engine.rescore(load_samples(Path(samples)))
    np.save(out, np.concatenate(found))
