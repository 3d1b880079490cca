"""The experiment on collapse as data: what DESIGN.md says in words, and its two rules."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from r3_adapter.megatron.policy_trainer.learning_rate import LearningRate
from r3_adapter.megatron.policy_trainer.options import TrainerOptions
from r3_adapter.megatron.policy_trainer.trainer import PolicyOptions, Replay
from r3_adapter.megatron.replay import Staleness
from r3_adapter.proof.tiny import DType, TinyModel
from r3_adapter.ray.rounded import RolloutWeights
from r3_adapter.rl.losses import Objective
from r3_adapter.rl.tasks import VOCABULARY

SEEDS, SEARCH_SEED = (0, 1, 2), 100
STEPS, SEARCH_STEPS, LONG, WARMUP_STEPS = 300, 150, 900, 50
BATCH_SIZE, SAMPLES_PER_PROMPT = 8, 8
UNCLIPPED = 1e9
ENOUGH, MOST_SUPERVISED, SUPERVISED_LR = 0.5, 400, 2e-3
LEAST_ROWS, LEAST_TOKENS = 0.1, 0.5
BASE_SHAPE = "16x32"
"""The others are measured last: see what has changed in DESIGN.md."""
LEARNING_RATES = (1e-3, 3e-3, 3e-4)


def _shape(num_layers: int, num_experts: int) -> TinyModel:
    return TinyModel(num_layers, num_experts, 4, 64, VOCABULARY, 128, initializer_range=0.1)


SHAPES = {
    f"{layers}x{experts}": _shape(layers, experts) for layers, experts in ((16, 32), (24, 32), (16, 64), (24, 64))
}


def dense(shape: TinyModel) -> TinyModel:
    """Return the control: one expert as wide as the four that a token of the other model uses."""
    return replace(shape, num_experts=1, topk=1, expert_size=4 * shape.hidden_size // 2)


@dataclass(frozen=True)
class Precision:
    """How trainer and engine compute; router_fp32: of a bfloat16 trainer."""

    trainer: DType
    weights: RolloutWeights
    router_fp32: bool = True

    @property
    def trainer_options(self) -> TrainerOptions:
        given = {} if self.router_fp32 else {"moe_router_dtype": None}
        return TrainerOptions(qkv_format="thd", micro_batch_size=64, megatron_arguments=given)


PRECISIONS = {
    "bf16": Precision("bfloat16", "as-trained"),
    "bf16-router-bf16": Precision("bfloat16", "as-trained", router_fp32=False),
    "fp32-bf16": Precision("float32", "as-trained"),
    "bf16-fp8": Precision("bfloat16", "fp8-rounded"),
    "bf16-fp8-router-bf16": Precision("bfloat16", "fp8-rounded", router_fp32=False),
    "fp32-fp8": Precision("float32", "fp8-rounded"),
}
"""In the order of the rule; the shapes come before the router's dtype."""
FAMILIES = (("bf16", "bf16-router-bf16"), ("fp32-bf16",), ("bf16-fp8", "bf16-fp8-router-bf16"), ("fp32-fp8",))


@dataclass(frozen=True)
class Regime:
    """What makes mismatch matter, beside the base; precision: in place of the base's."""

    lr: float
    num_steps: int = 1
    lag: int = 0
    task: str = "running"
    search_steps: int = SEARCH_STEPS
    warmup_steps: int = 0
    precision: str | None = None

    def base(self, usual: tuple[str, str]) -> tuple[str, str]:
        """Return the base with this regime's precision."""
        return usual[0], self.precision or usual[1]

    @property
    def table_steps(self) -> int:
        """Return how long the table's runs are: no shorter than the search's."""
        return max(STEPS, self.search_steps)


ADDED = (
    Regime(1e-4),
    Regime(1e-4, num_steps=4),
    Regime(1e-4, lag=2),
    Regime(1e-4, search_steps=LONG),
    Regime(3e-4, search_steps=LONG),
    Regime(1e-3, search_steps=STEPS, warmup_steps=WARMUP_STEPS),
    Regime(6e-4, search_steps=STEPS, warmup_steps=WARMUP_STEPS),
    Regime(3e-4, search_steps=LONG, precision="bf16"),
    Regime(1e-4, num_steps=4, search_steps=LONG),
    Regime(2e-4, num_steps=4, search_steps=LONG),
    Regime(1e-4, num_steps=4, search_steps=2 * LONG),
)
"""Rows of the search that were added after others were seen: see what has changed in DESIGN.md."""
SEARCH = (
    *(Regime(lr) for lr in LEARNING_RATES),
    *(Regime(lr, num_steps=4) for lr in LEARNING_RATES),
    *(Regime(lr, lag=2) for lr in LEARNING_RATES),
    *(Regime(lr, task="running-24") for lr in LEARNING_RATES),
    *ADDED,
)
LEFT = (4, 5, 6, 7, 8, 9, 10, 11, 12, 19, 20, 22, 23)
"""Numbers of the rows among which no regime is chosen; they are run, or run to their end, after the table."""


@dataclass(frozen=True)
class Variant:
    """A way to train."""

    replay: Replay = "off"
    estimator: Literal["grpo", "gspo"] = "grpo"
    tis_clip: float | None = None
    dense: bool = False
    staleness: Staleness = "keep"
    lag: int | None = None

    @property
    def objective(self) -> Objective:
        low, high = (3e-4, 4e-4) if self.estimator == "gspo" else (0.2, 0.2)
        return Objective(self.estimator, eps_clip=low, eps_clip_high=high, tis_clip=self.tis_clip)


VARIANTS = {
    "GRPO": Variant(),
    "GRPO+R3": Variant("r3"),
    "dense": Variant(dense=True),
    "GRPO+TIS": Variant(tis_clip=2.0),
    "GSPO": Variant(estimator="gspo"),
    "GRPO+R2": Variant("r2"),
    "GSPO+R3": Variant("r3", estimator="gspo"),
}
HURTS = {
    f"{name}-lag{lag}": replace(variant, lag=lag)
    for lag in (1, 2)
    for name, variant in {
        "GRPO": Variant(),
        "GRPO+R3-keep": Variant("r3"),
        "GRPO+R3-live": Variant("r3", staleness="live"),
    }.items()
}


@dataclass(frozen=True)
class Cell:
    """A run: base is a shape's and a precision's name."""

    name: str
    seed: int
    base: tuple[str, str]
    regime: Regime
    variant: Variant
    num_rollouts: int

    @property
    def lag(self) -> int:
        return self.regime.lag if self.variant.lag is None else self.variant.lag

    @property
    def policy(self) -> PolicyOptions:
        """Return how it is trained. Without a lag no row may be of other weights."""
        staleness = self.variant.staleness if self.variant.replay == "r3" and self.lag else "refuse"
        return PolicyOptions(
            objective=self.variant.objective,
            replay=self.variant.replay,
            staleness=staleness,
            num_steps=self.regime.num_steps,
            lr=LearningRate(self.regime.lr, warmup_iters=self.regime.warmup_steps),
            clip_grad=UNCLIPPED,
            trainer=PRECISIONS[self.base[1]].trainer_options,
        )


def base_of(stage0: Mapping[str, Any]) -> tuple[tuple[str, str] | None, list[tuple[str, str]]]:
    """Return the base by the rule as it was changed, or None and what must be measured first, in order.

    stage0: by shape and precision, figures with routers_that_differ and tokens_that_differ.
    """
    order = [(BASE_SHAPE, name) for family in FAMILIES for name in family]
    for place, (shape, name) in enumerate(order):
        found = stage0.get(shape, {}).get(name)
        if found is None:
            return None, order[place:]
        if found["routers_that_differ"] >= LEAST_ROWS and found["tokens_that_differ"] > LEAST_TOKENS:
            return (shape, name), []
    return max(order, key=lambda each: float(stage0[each[0]][each[1]]["routers_that_differ"])), []


def search_cells(base: tuple[str, str]) -> list[tuple[Cell, Cell]]:
    """Return the pairs of the search, GRPO and GRPO + R3, in order."""
    return [
        (_search(base, number, "GRPO", regime), _search(base, number, "GRPO+R3", regime))
        for number, regime in enumerate(SEARCH, start=1)
    ]


def _search(base: tuple[str, str], number: int, name: str, regime: Regime) -> Cell:
    return Cell(f"search-{number}:{name}", SEARCH_SEED, regime.base(base), regime, VARIANTS[name], regime.search_steps)


def beside(regime: Regime) -> dict[str, Regime]:
    """Return the regime and those beside it, in the table's order."""
    rates = {"regime": regime.lr, "milder": regime.lr / 3, "harsher": regime.lr * 3}
    return {place: replace(regime, lr=float(f"{lr:.2g}")) for place, lr in rates.items()}


def table_cells(base: tuple[str, str], regime: Regime) -> list[Cell]:
    """Return the table's cells, and then those where R3 may hurt, in order."""
    table = [
        Cell(f"{place}:{name}", seed, each.base(base), each, variant, each.table_steps)
        for place, each in beside(regime).items()
        for name, variant in VARIANTS.items()
        for seed in SEEDS
    ]
    hurts = [
        Cell(f"regime:{name}", seed, regime.base(base), regime, variant, regime.table_steps)
        for name, variant in HURTS.items()
        for seed in SEEDS
    ]
    return [*table, *hurts]


def cells_named(names: Sequence[Cell], name: str, seed: int) -> list[Cell]:
    """Return the cells of a name and a seed: one, or none."""
    return [cell for cell in names if cell.name == name and cell.seed == seed]
