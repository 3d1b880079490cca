"""Every field of Megatron's configurations is classified, once."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from r3_adapter.errors import ReplayError
from r3_adapter.megatron.checks import check_config
from r3_adapter.megatron.config_fields import (
    ALLOWED,
    CONDITIONAL,
    KNOWN,
    REFUSED,
    RELEASES,
    SELECTS,
    TESTED,
    fields_of,
    refused_options,
    unknown_options,
)

ROOT = Path(__file__).parents[2]
CLASSES = ({*REFUSED}, {*CONDITIONAL}, TESTED, {*ALLOWED})

# Megatron needs help to be imported without a GPU, which changes torch: so in a process of its own.
FIELDS = """
from dataclasses import fields
from r3_adapter.megatron import cpu
cpu.install()
from megatron.core import __version__
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
kinds = (ModelParallelConfig, TransformerConfig, MLATransformerConfig)
print(__version__.split("+")[0], *sorted({field.name for kind in kinds for field in fields(kind)}))
"""


@pytest.mark.megatron
def test_every_field_of_the_pin_is_in_one_class() -> None:
    release, *found = (
        subprocess.run([sys.executable, "-W", "ignore", "-c", FIELDS], capture_output=True, text=True, check=True)
        .stdout.splitlines()[-1]
        .split()
    )
    assert release in RELEASES
    assert sorted(set(found) - KNOWN) == [], "read what these do to rows, tokens, experts and routers; then classify"
    assert set(found) == fields_of(release)


def test_releases_differ_by_the_fields_that_came_and_went() -> None:
    sizes = {release: len(fields_of(release)) for release in RELEASES}
    assert sizes == {"0.16.1": 258, "0.18.0": 295, "0.18.2": 295, "0.19.0": 323, "0.19.1": 323, "0.19.2": 323}
    assert "moe_extended_tp" in fields_of("0.16.1") - fields_of("0.18.0")
    assert "moe_router_force_biased" in fields_of("0.18.0") - fields_of("0.16.1")
    assert "gtp_weight_remat_size" in fields_of("0.19.0") - fields_of("0.18.2")


def test_an_option_of_an_unknown_release_is_refused_unless_it_is_at_its_default() -> None:
    class Config:
        """Stands for one of a release that is not pinned: a field of Megatron's more, and some of a framework."""

        num_moe_experts: int = 8
        moe_router_telepathy: bool = False
        moe_router_friends: list[str] = field(default_factory=list)

    Config.__module__ = "megatron.core.transformer.transformer_config"
    megatrons = dataclass(Config)

    @dataclass
    class Provider(megatrons):  # type: ignore[misc, valid-type]
        frameworks_own: int = 1

    assert list(unknown_options(Provider(frameworks_own=2))) == []
    assert list(unknown_options(Provider(moe_router_telepathy=True))) == [("moe_router_telepathy", True)]
    assert list(unknown_options(megatrons(moe_router_friends=["a"]))) == [("moe_router_friends", ["a"])]
    with pytest.raises(ReplayError, match=r"layer 3: moe_router_telepathy \(True\) is an option of none .* 0\.19\.2"):
        check_config(Provider(moe_router_telepathy=True), 3)


def test_no_field_is_in_two_classes() -> None:
    assert sum(map(len, CLASSES)) == len(set.union(*map(set, CLASSES)))


def test_what_is_said_to_be_tested_is_named_by_tests_or_what_they_build() -> None:
    files = [*(ROOT / "tests").rglob("*.py"), ROOT / "r3_adapter/megatron/policy_trainer/build.py"]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files if path != Path(__file__))
    assert [name for name in sorted(TESTED) if name not in text] == []


@pytest.mark.parametrize("name", REFUSED)
def test_refused_options_are_refused_and_their_defaults_are_not(name: str) -> None:
    allowed, why = REFUSED[name]
    for value in allowed:
        assert list(refused_options({name: value})) == []
    other = {bool: True, int: 2, str: "another", type(None): 1.0}[type(allowed[0])]
    ((found, value, _, reason),) = refused_options({name: other})
    assert (found, value, reason) == (name, other, why)


def test_conditions() -> None:
    assert list(refused_options({})) == []
    vpp = {"virtual_pipeline_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "batch_p2p_comm": True}
    ((name, _, wanted, _),) = refused_options(vpp)
    assert (name, wanted) == ("batch_p2p_comm", "False with pp 2 and vpp 2")
    for change in ({"pipeline_model_parallel_size": 4}, {"batch_p2p_comm": False}):
        assert list(refused_options({**vpp, **change})) == []
    assert list(refused_options({**vpp, "virtual_pipeline_model_parallel_size": None})) == []
    tp = {"tensor_model_parallel_size": 2, "sequence_parallel": False}
    ((name, _, wanted, _),) = refused_options(tp)
    assert (name, wanted) == ("sequence_parallel", "True with tp 2")
    assert list(refused_options({**tp, "sequence_parallel": True})) == []
    assert SELECTS == ("sinkhorn", "quantile_balancing")


def test_another_form_of_a_value_is_not_another_value() -> None:
    ((_, found, wanted, _),) = refused_options({"hybrid_context_parallel": 1})
    assert (found, wanted) == (1, "False")
    ((_, found, wanted, _),) = refused_options({"transformer_impl": "inference_optimized"})
    assert (found, wanted) == ("inference_optimized", "'transformer_engine' or 'local'")
    ((_, found, wanted, _),) = refused_options({"moe_expert_capacity_factor": 1.0})
    assert (found, wanted) == (1.0, "None")
