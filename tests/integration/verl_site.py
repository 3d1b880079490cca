"""An environment with verl: a folder of its own in front of the tests' environment, whose engines it shares."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# With --no-deps: what its imports need and the tests' environment has not; so torch stays as it is.
REQUIREMENTS = (
    *("verl==0.9.1", "tensordict==0.10.0", "peft==0.21.2", "accelerate==1.15.0", "datasets==5.2.0"),
    *("pyarrow==26.0.1", "pandas==3.1.1", "multiprocess==0.70.19", "xxhash==4.1.0", "hydra-core==1.3.8"),
    *("omegaconf==2.4.0", "antlr4-python3-runtime==4.9.3", "codetiming==1.4.0", "cloudpickle==3.1.3"),
    *("cachetools==8.0.2", "pyvers==0.2.3"),
)
_NO_REGISTRY = ("NewConnectionError", "Failed to establish a new connection", "NameResolutionError")


def verl_site() -> Path:
    """Return the folder, made once for an environment; skip where there is no registry to make it from."""
    folder, made = Path(sys.prefix, "verl-site"), "\n".join(sorted(REQUIREMENTS))
    mark = folder / "requirements.txt"
    with Path(sys.prefix, "verl-site.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if mark.is_file() and mark.read_text(encoding="utf-8") == made:
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run(
            [*pip, "--target", str(folder), *REQUIREMENTS], capture_output=True, text=True, timeout=600, check=False
        )
        if done.returncode:
            if any(text in done.stderr for text in _NO_REGISTRY):
                pytest.skip("no registry here to install verl from")
            pytest.fail(done.stderr[-2000:])
        mark.write_text(made, encoding="utf-8")
    return folder


def verl_environment(*folders: Path) -> dict[str, str]:
    """Return the variables with which a process has verl and the plug-in; more folders come first."""
    path = [*map(str, folders), str(verl_site()), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "PYTHONPATH": os.pathsep.join(path),
        "VERL_USE_EXTERNAL_MODULES": "r3_adapter.frameworks.verl.plugin",
        "OMP_NUM_THREADS": "1",
    }
