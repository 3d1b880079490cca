"""Checkpoints for the self-test, with random weights: of a family of transformers, or of a real checkpoint's shape."""

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from r3_adapter.errors import R3Error, check_choice, check_whole
from r3_adapter.flag_values import whole
from r3_adapter.proof.families import COMMON, DEFAULT, ENGINE_ON_CPU, FAMILIES, KERNELS, NOT_ON_CPU
from r3_adapter.proof.shrink import cut, small
from r3_adapter.proof.tiny import DType, TinyModel, qwen3_moe_config, write_checkpoint
from r3_adapter.sglang.cpu import has_gpu
from r3_adapter.sglang.meta_model import meta_model, quiet
from r3_adapter.sglang.moe_config import MoEConfig, read_config


def families() -> list[str]:
    """Return the names of families that the self-test has a model of."""
    return [DEFAULT, *FAMILIES]


Rollout = Literal["auto", "sglang", "transformers"]


@dataclass(frozen=True)
class Model:
    """What the self-test is about.

    name, num_layers, real_sizes, real_weights: as write_model takes them.
    rollout: which engine generates: SGLang, or Hugging Face's model with our record of its routes. "auto" is SGLang
        where it runs the family on this machine.

    Raises:
        R3Error: a rollout that is not known.
    """

    name: str = DEFAULT
    num_layers: int | None = None
    real_sizes: bool = False
    real_weights: bool = False
    rollout: Rollout = "auto"

    def __post_init__(self) -> None:
        check_choice("rollout", self.rollout, Rollout)

    @property
    def family(self) -> str:
        """The model_type of the configuration."""
        return self.name if self.name in families() else str(self.config()["model_type"])

    @property
    def engine(self) -> Rollout:
        """Which engine generates on this machine."""
        if self.rollout != "auto":
            return self.rollout
        return "sglang" if has_gpu() or self.family in ENGINE_ON_CPU else "transformers"

    def config(self) -> dict[str, Any]:
        """Return the configuration of what is written.

        Raises:
            R3Error: As write_model.
        """
        if self.name == DEFAULT:
            shape = TinyModel() if self.num_layers is None else TinyModel(num_layers=self.num_layers)
            return dict(qwen3_moe_config(shape, "float32").to_dict())
        real_sizes = self.real_sizes or self.real_weights
        return model_config(self.name, num_layers=self.num_layers, real_sizes=real_sizes)

    def write_config(self, folder: Path) -> None:
        """Write config.json alone."""
        fields = self.config()
        with _built(fields) as (_, made):
            made.save_pretrained(folder)

    def write(self, folder: Path, *, dtype: str, seed: int) -> None:
        """Write the checkpoint; see write_model."""
        options = {name: getattr(self, name) for name in ("num_layers", "real_sizes", "real_weights")}
        write_model(self.name, folder, dtype=dtype, seed=seed, **options)

    def about(self) -> dict[str, Any]:
        """Return what a verdict says of the model."""
        return {"model": {**asdict(self), "family": self.family, "rollout": self.engine}}

    def check(self) -> None:
        """Refuse what this installation cannot train, before anything is started.

        Raises:
            R3Error: says what is missing.
        """
        family = self.family
        if has_gpu():
            for package in KERNELS.get(family, ()):
                if find_spec(package) is None:
                    raise R3Error(f"{family}: its layers take kernels of {package} on a GPU, which is not installed")
        elif family in NOT_ON_CPU:
            raise R3Error(f"{family}: Megatron does not train it without a GPU: {NOT_ON_CPU[family]}")
        if family != DEFAULT and find_spec("megatron.bridge") is None:
            raise R3Error(
                f"{family}: its weights come to Megatron by megatron-bridge, which is not installed; it needs "
                "Python 3.12 and megatron-core 0.19.2 (docs/install.md)"
            )


TINY = Model()
"""The model of the quickstart."""


def add_model_arguments(parser: Any) -> None:
    """Add the flags that model_of reads, to a parser or a group of one."""
    text = f"family ({', '.join(families())}), or a checkpoint's folder, of which config.json is enough"
    parser.add_argument("--model", default=DEFAULT, metavar="FAMILY|PATH", help=text)
    text = "number of layers; default: all of a family, of a checkpoint the fewest with two MoE layers"
    parser.add_argument("--layers", type=whole(1), metavar="N", help=text)
    text = "keep the widths of the checkpoint, which are made narrow otherwise"
    parser.add_argument("--real-sizes", action="store_true", help=text)
    text = "take the checkpoint's own weights of these layers, in place of random ones"
    parser.add_argument("--real-weights", action="store_true", help=text)
    text = "what generates; auto: SGLang where it runs the family on this machine, else transformers"
    parser.add_argument("--rollout", choices=get_args(Rollout), default="auto", help=text)


def model_of(args: argparse.Namespace) -> Model:
    """Return the model that the flags of add_model_arguments say."""
    return Model(args.model, args.layers, args.real_sizes, args.real_weights, args.rollout)


def write_model(
    model: str,
    folder: Path,
    *,
    dtype: str,
    seed: int,
    num_layers: int | None = None,
    real_sizes: bool = False,
    real_weights: bool = False,
) -> None:
    """Write config.json and model.safetensors as Hugging Face has them; no tokenizer, prompts are token ids.

    model: a name of families(), or the folder of a checkpoint, of which config.json is enough. Of such a one the first
        layers are taken, with random weights.
    num_layers: how many layers; None for those of the family, or as few as have two MoE layers among them.
    real_sizes: keep the widths of the checkpoint; else they are small. Layers, experts and groups stay as they were.
    real_weights: take the checkpoint's own weights of these layers, in their real sizes.

    Raises:
        R3Error: Neither a family nor a checkpoint, a number of layers that leaves no MoE layer, weights that are not
            there, or a configuration that transformers cannot build.
    """
    check_choice("dtype", dtype, DType)
    if model == DEFAULT:
        shape = TinyModel() if num_layers is None else TinyModel(num_layers=check_whole("num_layers", num_layers, 1))
        write_checkpoint(folder, dtype=dtype, seed=seed, shape=shape)  # type: ignore[arg-type]
        return
    config = model_config(model, num_layers=num_layers, real_sizes=real_sizes or real_weights)
    if real_weights and model in FAMILIES:
        raise R3Error(f"model {model!r} is a family, which has no weights of its own")
    made = _read(config, Path(model), dtype) if real_weights else _draw(config, dtype, seed)
    made.save_pretrained(folder)


def model_config(model: str, *, num_layers: int | None = None, real_sizes: bool = False) -> dict[str, Any]:
    """Return the configuration that write_model writes of a model that is not DEFAULT; the arguments are its own.

    Raises:
        R3Error: As there.
    """
    if model in FAMILIES:
        fields = {"model_type": model, **COMMON, **FAMILIES[model]}
        return fields if num_layers is None else cut(fields, num_layers)
    path = Path(model)
    if not path.is_dir():
        raise R3Error(f"model {model!r} is neither one of {', '.join(families())} nor a checkpoint's folder")
    config = _completed(read_config(path / "config.json"), str(path))
    if not real_sizes:
        config = small(config)
    layer_ids = MoEConfig.from_config(config, place=str(path)).layer_ids
    if num_layers is None:
        num_layers = layer_ids[min(1, len(layer_ids) - 1)] + 1
    found = cut(config, num_layers)
    if layer_ids[0] >= num_layers:
        raise R3Error(f"{path}: num_layers ({num_layers}) <= {layer_ids[0]}, its first MoE layer")
    return found


def _completed(config: dict[str, Any], place: str) -> dict[str, Any]:
    """Return a configuration, of a multimodal model its text part, with all that has a default."""
    found = meta_model(config, place).config.to_dict()
    return {name: value for name, value in found.items() if name != "transformers_version"}


def _draw(config: dict[str, Any], dtype: str, seed: int) -> Any:
    """Return a model of transformers with random weights."""
    import torch

    with torch.random.fork_rng(devices=[]), _built(config) as (classes, made):
        torch.manual_seed(seed)
        model = classes.from_config(made, dtype=torch.float32)
        _spread(model)
    return model.to(getattr(torch, dtype))


def _read(config: dict[str, Any], folder: Path, dtype: str) -> Any:
    """Return a model of transformers with a checkpoint's weights of its first layers.

    Raises:
        R3Error: A weight that the model has and the checkpoint has not.
    """
    import torch

    with _built(config) as (classes, made):
        model, found = classes.from_pretrained(
            folder, config=made, dtype=getattr(torch, dtype), output_loading_info=True
        )
    if missing := sorted(found["missing_keys"]):
        raise R3Error(f"{folder}: {len(missing)} weights of its first layers are missing: {missing[0]!r}, ...")
    return model


@contextlib.contextmanager
def _built(config: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Give transformers' class of causal models and its configuration, without its remarks.

    Raises:
        R3Error: It cannot build the model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    fields = dict(config)
    family = fields.pop("model_type", None)
    try:
        with quiet():
            yield AutoModelForCausalLM, AutoConfig.for_model(family, **fields)
    # A configuration that its family cannot use fails in as many ways as there are families.
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        raise R3Error(f"{family}: transformers cannot build it: {type(error).__name__}: {said}") from error


def _spread(model: Any) -> None:
    """Move what begins as a constant, biases and the weights of norms, so that a tensor that is lost shows."""
    import torch

    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point() and tensor.numel() > 1 and tensor.min() == tensor.max():
                tensor.add_(0.1 * torch.randn(tensor.shape))
