"""What a result depends on beside its options: versions that are installed, and the driver of the GPU."""

import subprocess
from importlib.metadata import PackageNotFoundError, version


def version_of(distribution: str) -> str | None:
    """Return the installed version of a distribution; None where it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def gpu_driver() -> str:
    """Return the version of NVIDIA's driver.

    Raises:
        OSError, subprocess.SubprocessError: There is no nvidia-smi, or it does not say.
    """
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split("\n")[0]
