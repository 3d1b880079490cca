"""What programs may count on: these names, from these modules, and what is given by name to a framework or a launcher.

All else may change in any release. A change of one of these is named in CHANGELOG.md, and until 1.0 may come with any
minor release.
"""

from collections.abc import Mapping
from types import MappingProxyType

NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "r3_adapter": ("__version__",),
        # Routes, and the samples that they belong to.
        "r3_adapter.trace": ("ModelId", "RoutingTrace", "concatenate"),
        "r3_adapter.rollout": ("Sample", "SampleFolder", "load_samples", "sample_folders", "save_samples", "unrouted"),
        "r3_adapter.codec": ("decode", "decode_all", "encode", "encode_all"),
        "r3_adapter.errors": (
            "CaptureError",
            "LayoutError",
            "PatchError",
            "R3Error",
            "ReplayError",
            "TraceError",
            "UnknownModelError",
        ),
        # From an engine to traces.
        "r3_adapter.sglang.settings": ("EngineSettings",),
        "r3_adapter.sglang.engine": ("Engine", "rollout_in_subprocess"),
        "r3_adapter.sglang.http": ("generate_over_http",),
        "r3_adapter.sglang.capture": ("computations_from_reply", "trace_from_native_reply", "trace_from_reply"),
        "r3_adapter.sglang.openai": ("sample_of_openai",),
        "r3_adapter.sglang.computation": ("Computation", "join_turns"),
        "r3_adapter.sglang.moe_config": ("MoEConfig",),
        "r3_adapter.vllm": ("trace_from_npy",),
        "r3_adapter.hash_layers": ("HashTables",),
        # From traces to a trainer.
        "r3_adapter.layout": ("Packing", "ParallelLayout", "RankCoords"),
        "r3_adapter.repack": ("RankRoutes", "collect", "repack"),
        "r3_adapter.megatron.replay": ("ReplayBatch", "StepInput", "check_dispatch", "prepare", "prepare_step"),
        "r3_adapter.megatron.attach": ("Attached", "attach"),
        "r3_adapter.megatron.pretraining": ("prepared",),
        "r3_adapter.megatron.monitor": ("RouterMonitor",),
        "r3_adapter.megatron.reach": ("routed_live",),
        "r3_adapter.metrics": ("Gap", "gap"),
        # Even loads.
        "r3_adapter.balance.budgets": ("Budgets",),
        "r3_adapter.balance.loads": ("count_traces",),
        "r3_adapter.balance.schedule": ("schedule",),
        "r3_adapter.balance.table": ("Table",),
        # This project's own trainer and loop, for scripts and tests.
        "r3_adapter.megatron.policy_trainer.options": ("TrainerOptions",),
        "r3_adapter.megatron.policy_trainer.build": ("build_model", "initialize"),
        "r3_adapter.megatron.batches": ("micro_batches",),
        "r3_adapter.rl.tasks": ("Dataset", "Task"),
        "r3_adapter.runs.log": ("Run", "RunLog"),
        "r3_adapter.proof.tiny": ("ENGINE", "TinyModel", "write_checkpoint"),
        # Flags, for parsers of others.
        "r3_adapter.arguments": ("add_r3_arguments", "add_r3_offline_arguments"),
    }
)
"""Names by module."""

ENTRIES: tuple[str, ...] = (
    "r3_adapter.frameworks.slime.init",
    "r3_adapter.frameworks.slime.generate",
    "r3_adapter.frameworks.slime.convert",
    "r3_adapter.frameworks.slime.convert_packed",
    "r3_adapter.frameworks.slime.flags",
    "r3_adapter.frameworks.verl.plugin",
    "r3_adapter.frameworks.verl.flags",
    "r3_adapter.frameworks.megatron_rl",
)
"""What a user names in a flag, in a variable of the environment or behind `python -m`."""
