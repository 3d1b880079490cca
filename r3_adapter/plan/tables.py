"""The tables of a plan."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.table import Table

from r3_adapter.errors import counted
from r3_adapter.plan.checks import Check
from r3_adapter.plan.loads import Loads
from r3_adapter.plan.plan import STARTS, Figures, Plan

Row = TypeVar("Row")


def print_plan(plan: Plan, console: Console) -> None:
    """Print what a plan says; what failed comes last."""
    model, moe, layout = plan.request.model, plan.request.model.moe, plan.request.layout
    console.print(
        f"[bold]{model.family}[/bold]: {moe.num_layers} layers, {len(moe.layer_ids)} of them MoE, "
        f"{moe.num_experts} experts, top-{moe.topk}, {model.num_parameters() / 1e9:.1f} B parameters",
        highlight=False,
    )
    console.print(f"{_where(plan)}\n", highlight=False)
    if plan.figures is not None:
        for table in _tables(plan, plan.figures):
            console.print(table)
            console.print()
    console.print(checks_table(plan.checks))
    for note in plan.notes:
        console.print(f"Note: {note}", highlight=False)
    failed = [check.name for check in plan.checks if not check.passed]
    if failed == [STARTS]:
        verdict = "[red]cannot be started[/red]: its sizes pass, but the trainer has no weights for this model"
    else:
        verdict = f"[red]does not fit[/red]: {'; '.join(failed)}" if failed else "[green]fits[/green]"
    console.print(f"tp {layout.tp}, pp {layout.pp}, dp {layout.dp}: {verdict}", highlight=False)


def checks_table(checks: list[Check]) -> Table:
    """Return the checks with their operands, one a row."""
    table = _table("Checks", "check", "")
    table.columns[1].justify = "left"
    table.add_column("operands")
    for check in checks:
        table.add_row(check.name, "ok" if check.passed else "NO", check.says, style="" if check.passed else "bold red")
    return table


def size(number: float) -> str:
    """Return a number of bytes in the unit that leaves it below 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:,.0f} {unit}" if unit == "B" else f"{number:,.1f} {unit}"
        number /= 1024
    return f"{number:,.1f} TiB"


def _where(plan: Plan) -> str:
    request, layout = plan.request, plan.request.layout
    engines, per_node, ranks = request.engines, request.machines.gpus_per_node, plan.request.layout.world_size
    batch = request.batch
    sizes = ", ".join(f"{name} {getattr(layout, name)}" for name in ("tp", "pp", "vpp", "cp", "ep", "etp", "dp"))
    pp = f", pp {engines.pp}" if engines.pp > 1 else ""
    return (
        f"trainer: {_gpus(ranks, per_node)}: {sizes}\n"
        f"rollout: {_gpus(engines.num_gpus, per_node)}: {engines.num} engines of tp {engines.tp}{pp}\n"
        f"step:    {batch.num_prompts:,} prompts x {batch.samples_per_prompt} samples of {batch.mean_prompt:,} + "
        f"{batch.mean_response:,} tokens, at most {batch.max_prompt:,} + {batch.max_response:,}"
    )


def _gpus(num: int, per_node: int) -> str:
    return f"{num} GPUs, {counted(-(-num // per_node), 'node')} of {per_node}"


def _tables(plan: Plan, found: Figures) -> Iterator[Table]:
    table = _table("Routes on their way", "form", "a token", "mean sample", "longest", "a step")
    for each in found.transports:
        sample = (size(each.mean_sample), size(each.max_sample))
        table.add_row(each.name, f"{each.token:,.1f} B", *sample, size(each.step))
    yield table
    columns = ("layers", "pulled", "read", "micro-batch", "longest", "in flight", "whole step")
    table = _table("Routes of a trainer's rank, by pipeline stage", "stage", *columns)
    table.caption = (
        f"pulled from the store once a rollout step, {size(found.node_pulled)} by the busiest node, and read: uint8 or "
        "uint16.\nThe rest: int16 on the GPU; a whole step is one of the optimizer."
    )
    for stage, layers, routes in _runs(plan, found, found.routes):
        table.add_row(stage, layers, *(size(number) for number in routes))
    yield table
    yield _capture_table(plan, found)
    yield _memory_table(plan, found)
    if plan.loads is not None:
        yield _loads_table(plan.loads)


def _memory_table(plan: Plan, found: Figures) -> Table:
    offload, names = plan.request.cpu_offload, ["weights", "gradients", "optimizer"]
    names += ["reference"] if plan.request.reference else []
    table = _table("Model states of a trainer's rank, by pipeline stage", "stage", "layers", "parameters", *names)
    table.add_column("on the GPU", justify="right")
    table.caption = "Activations come on top." + (" The optimizer's states are on the host." if offload else "")
    for stage, layers, memory in _runs(plan, found, found.memory):
        parts = [size(getattr(memory, name)) for name in names]
        parameters = f"{sum(memory.parameters) / 1e9:.2f} B"
        table.add_row(stage, layers, parameters, *parts, size(memory.on_device(cpu_offload=offload)))
    return table


def _capture_table(plan: Plan, found: Figures) -> Table:
    engines, engine = plan.request.engines, found.engine
    table = _table("Route buffers of an engine", "", "SGLang's own", "patched")
    for name, field in (
        ("on each GPU", "device"),
        ("on the host, the rank that sends", "host_rank"),
        ("on the host, all ranks", "host"),
    ):
        table.add_row(name, size(getattr(found.native, field)), size(getattr(found.patched, field)))
    table.caption = (
        f"{engine.num_slots:,} KV slots in a pool. On each GPU: weights {size(engine.weights)}, KV {size(engine.pool)} "
        f"({size(engine.token)} a slot).\nA weight update: {size(found.weights)} to one engine, "
        f"{size(found.weights * engines.num)} to all {engines.num}."
    )
    return table


def _loads_table(loads: Loads) -> Table:
    table = _table(f"Loads of {counted(loads.num_ranks, 'expert-parallel rank')}", "", "live", "planned")
    both = (loads.live, loads.planned)
    table.add_row("exchanges of counts of a rank, an optimizer step", *(f"{number:,}" for number in loads.exchanges))
    table.add_row("waits of the host for them", *(f"{number:,}" for number in loads.waits))
    table.add_row("fullest rank's load over the mean", *(f"{each.ratio:.3f}" for each in both))
    table.add_row("p50 / p95 / worst", *(f"{each.p50:.2f} / {each.p95:.2f} / {each.worst:.2f}" for each in both))
    table.add_row("most tokens that a rank receives in a layer", *(f"{each.peak_tokens:,}" for each in both))
    table.add_row("activations of its experts, one layer", *(size(number) for number in loads.layer_bytes))
    table.add_row("moe_expert_rank_capacity_factor needed", *(f"{each.worst:.2f}" for each in both))
    table.add_row("time of a step, as far as loads make it", "1", f"{loads.step_ratio:.3f}")
    low, high = loads.wait_seconds
    table.caption = (
        f"Routes: {loads.source}, {counted(loads.num_samples, 'sample')}, {counted(loads.num_layers, 'MoE layer')}; "
        "micro-steps of "
        f"{loads.max_tokens:,} tokens of an expert group, {loads.micro_steps:,} a rank. Live: in the order of arrival, "
        "experts as they are; planned: placed by the step before, packed. Assumed: "
        f"{loads.expert_share:.0%} of a step's time grows with the ratio (--expert-share); ranks have equally many "
        f"tokens; an exchange and its wait take 0.06 to 0.15 ms, {low:.2g} to {high:.2g} s a live step: not in "
        "the last row."
    )
    return table


def _runs(plan: Plan, found: Figures, rows: Sequence[Row]) -> Iterator[tuple[str, str, Row]]:
    """Yield stages with their layers, those that are next to each other and alike as one."""
    with_experts = set(plan.request.model.moe.layer_ids)
    counts = [[layer in with_experts for chunk in stage for layer in chunk] for stage in found.stages]
    begin = 0
    for stage in range(len(rows)):
        own = (sum(counts[stage]), len(counts[stage]), rows[stage])
        if stage + 1 < len(rows) and own == (sum(counts[stage + 1]), len(counts[stage + 1]), rows[stage + 1]):
            continue
        name = f"{begin}" if begin == stage else f"{begin} to {stage}"
        yield name, f"{own[1]}" if own[0] == own[1] else f"{own[1]}, {own[0]} MoE", rows[stage]
        begin = stage + 1


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left", title_style="bold", min_width=90)
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left")
    return table
