"""Ray: a cluster that runs already, or one on this machine that listens on loopback only."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from r3_adapter.errors import R3Error


@contextmanager
def cluster(address: str | None = None, *, num_cpus: int = 64, object_store_bytes: int = 512 << 20) -> Iterator[None]:
    """Connect to a cluster, or start one that ends with the context.

    address: of a cluster; None to start one here.
    num_cpus, object_store_bytes: of one that is started. Actors here say how many CPUs they want, and on a small
        machine they share: the number is only a limit on how many there can be.

    Raises:
        R3Error: Ray is connected to a cluster already, or does not stay on loopback.
    """
    import ray

    if ray.is_initialized():
        raise R3Error("Ray is connected already; start the loop in a process of its own")
    if address is None:
        _stay_on_loopback()
        # Its workers would give way to everything else on the machine, but here they are what it is for.
        os.environ.setdefault("RAY_worker_niceness", "0")
        ray.init(
            num_cpus=num_cpus,
            object_store_memory=object_store_bytes,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
        )
        found = ray.nodes()[0]["NodeManagerAddress"]
        if found != "127.0.0.1":
            ray.shutdown()
            raise R3Error(f"Ray listens at {found} != 127.0.0.1")
    else:
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    try:
        yield
    finally:
        ray.shutdown()


def _stay_on_loopback() -> None:
    """Ray replaces a loopback address by one that the network can reach, except where it takes itself to be alone.

    Source: ray@2.55.1: _private/ray_constants.py:ENABLE_RAY_CLUSTER, _private/services.py:get_node_ip_address
    """
    from ray._private import ray_constants

    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
