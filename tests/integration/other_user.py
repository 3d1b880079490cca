"""What another user of this host can reach of a run: python other_user.py PORT FOLDER...; needs root, to be another.

Prints what could be reached, a line each.
"""

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from r3_adapter.ray.cluster import _stay_on_loopback

_stay_on_loopback()
from ray._raylet import AuthenticationTokenLoader, Config, GcsClient  # noqa: E402

NOBODY = 65534


def main(argv: Sequence[str]) -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    for folder in map(Path, argv[1:]):
        with contextlib.suppress(OSError):
            print("read", folder, os.listdir(folder))
    sys.stdout.flush()
    # Ray may end the process here.
    for token in (None, "0" * 64):
        if token:
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
            AuthenticationTokenLoader.instance().reset_cache()
            Config.initialize("")
        try:
            keys = GcsClient(address=f"127.0.0.1:{argv[0]}").internal_kv_keys(b"", namespace=b"fun")
            print("functions of", argv[0], keys, flush=True)
        except Exception as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
