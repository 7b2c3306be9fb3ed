"""Vision classifiers from timm: building, opening with weights, and what they expect as input.

This is the only file that imports timm or torchvision. Weights always come through
`models.sources`; timm itself never reaches for the network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qtool.errors import MissingError, UsageError
from qtool.models import cifar, demoire_weights, registry, repair, sources
from qtool.models.data_config import DataConfig
from qtool.models.layout import AttentionSite, Layout, layout, unfuse_attention

timm = repair.import_repaired("timm")

__all__ = [
    "DEMO_ARGUMENTS",
    "AttentionSite",
    "DataConfig",
    "Layout",
    "OpenedModel",
    "build",
    "imagenet_wnids",
    "layout",
    "open_model",
    "outline",
    "resolve",
    "split_arguments",
    "unfuse_attention",
]

DEMO_ARGUMENTS: dict[str, Any] = {
    "img_size": 64,
    "patch_size": 8,
    "embed_dim": 128,
    "depth": 6,
    "num_heads": 4,
    "num_classes": 24,
}
DEMO_DATA = DataConfig((3, 64, 64), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0)
_BUILDING = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What timm raises for arguments that do not suit a network."""

_WEIGHT_NAMES = (registry.WEIGHTS_FILE, "pytorch_model.bin")


@dataclass
class OpenedModel:
    """A classifier ready for inference, and where it came from.

    Attributes:
        model: The network in evaluation mode, float32, without gradients.
        name: What the caller asked for.
        architecture: timm name with its tag if known, or "demo_vit"; goes into `build`.
        model_args: Further arguments of `build`, plain enough for JSON.
        data: Input size, normalisation and crop.
        weights_sha256: Digest of the weights file.
        weights_source: Alias of a bundled file, path, or hub repository of the weights.
        labels_kind: "imagenet" for the 1000 classes of ImageNet-1k, "demo" for the drawn
            pictures, else "".
    """

    model: nn.Module
    name: str
    architecture: str
    model_args: dict[str, Any]
    data: DataConfig
    weights_sha256: str
    weights_source: str
    labels_kind: str


@dataclass
class _Plan:
    """A model that has been found but not yet built; without `weights` they are timm's own."""

    architecture: str
    model_args: dict[str, Any]
    weights: Path | None
    source: str
    pretrained_cfg: dict[str, Any] | None = None
    data: DataConfig | None = None


def build(
    architecture: str, model_args: Mapping[str, Any], *, device: str | torch.device = "cpu"
) -> nn.Module:
    """Build a classifier with random weights.

    Args:
        architecture: timm name, with or without a tag, "demo_vit" or a name in `cifar.DEPTHS`.
        model_args: Arguments of timm's builder, such as `num_classes`.
        device: Where the parameters are made; "meta" makes none.

    Returns:
        The network, in evaluation mode.

    Raises:
        UsageError: timm has no such model, or an argument does not suit it.
    """
    try:
        with torch.device(device):
            if architecture == "demo_vit":
                kind = timm.models.vision_transformer.VisionTransformer
                model: nn.Module = kind(**{**DEMO_ARGUMENTS, **model_args})
            elif architecture in cifar.DEPTHS:
                model = cifar.build(architecture, **model_args)
            else:
                model = timm.create_model(architecture, pretrained=False, **model_args)
    except _BUILDING as error:
        raise UsageError(
            f"cannot build {architecture} with {dict(model_args)}: {_first_line(error)}",
            remedy="check the name and the arguments; `qtool models` lists what is known",
        ) from error
    return model.eval()


def resolve(name: str, *, weights: str | Path = "pretrained") -> str:
    """Find out which architecture `open_model` would build; reads no weights, opens no connection.

    Args:
        name: As for `open_model`.
        weights: As for `open_model`.

    Returns:
        The timm name with its tag, or "demo_vit"; `name` itself for a hub repository, whose
        architecture stands in a file of its own.

    Raises:
        UsageError: The name is unknown.
        MissingError: A file or folder that was named is absent, or timm has no such weights.
    """
    path = _named_weights(weights)
    return name if name.startswith(sources.HUB_PREFIXES) else _plan(name, path).architecture


def outline(name: str, *, weights: str | Path) -> tuple[nn.Module, tuple[int, int, int]] | None:
    """Build the network that `open_model` would open, without memory for its weights.

    Args:
        name: As for `open_model`.
        weights: As for `open_model`.

    Returns:
        The network on the "meta" device and its input size (3, H, W); None for a hub repository.
    """
    if name.startswith(sources.HUB_PREFIXES):
        return None
    plan = _plan(name, _named_weights(weights))
    network = build(plan.architecture, plan.model_args, device="meta")
    return network, (plan.data or _usual_data(plan.architecture, network)).input_size


def open_model(
    name: str,
    *,
    weights: str | Path = "pretrained",
    offline: bool = False,
    device: str | torch.device = "cpu",
) -> OpenedModel:
    """Open a classifier with its weights.

    Args:
        name: Alias or timm name with or without tag, either with arguments of timm's builder behind
            it (`mobilenetv2,act_layer=relu`), path of a .safetensors file, `hf-hub:OWNER/NAME` or
            `local-dir:FOLDER`.
        weights: "pretrained" for the weights that belong to the name, or a file of weights.
        offline: Take weights from disk only; no socket is opened.
        device: Where the model goes.

    Returns:
        The model in evaluation mode, float32, without gradients.

    Raises:
        UsageError: The name is unknown, or the weights do not fit the model.
        MissingError: The weights are not on this machine and cannot be fetched.
    """
    path = _named_weights(weights)
    if name.startswith(sources.HUB_PREFIXES):
        plan = _plan_hub(name.partition(":")[2], path, offline)
    else:
        plan = _plan(name, path)
    path = plan.weights or _fetch(plan, offline)
    model = _load(plan, path)
    model.to(device=device, dtype=torch.float32).requires_grad_(False).eval()
    classes = int(getattr(model, "num_classes", 0))
    demo = plan.architecture == "demo_vit"
    if not demo:
        plan.model_args.setdefault("num_classes", classes)
    data = plan.data or _usual_data(plan.architecture, model)
    return OpenedModel(
        model=model,
        name=name,
        architecture=plan.architecture,
        model_args=plan.model_args,
        data=data,
        weights_sha256=sources.sha256(path),
        weights_source=plan.source,
        labels_kind="demo" if demo else "imagenet" if classes == 1000 else "",
    )


def imagenet_wnids() -> list[str]:
    """Return the WordNet identifiers of the 1000 ImageNet classes, in label order."""
    names: list[str] = timm.data.ImageNetInfo().label_names()
    return names


def _named_weights(weights: str | Path) -> Path | None:
    """Return the file of weights that was named, None for those that belong to the model."""
    if str(weights) == "pretrained":
        return None
    path = Path(weights)
    if not path.is_file():
        raise MissingError(
            f"there is no weights file {path}", remedy="check the path given with --weights"
        )
    return path


def _plan(name: str, weights: Path | None) -> _Plan:
    """Find out on this machine what `name` means and where its weights lie."""
    if name.startswith(sources.FOLDER_PREFIX):
        return _plan_folder(Path(name.partition(":")[2]), weights, name)
    if name.endswith(".safetensors"):
        return _plan_file(Path(name), weights)
    name, arguments = split_arguments(name)
    spec = registry.find(name)
    if spec is not None and spec.bundled:
        path = weights or sources.bundled(spec.bundled)
        plan = _plan_metadata(path, spec.architecture, arguments)
        plan.source = str(weights) if weights else f"bundled {spec.bundled}"
        return plan
    is_own = spec is None and name in cifar.DEPTHS
    architecture = spec.architecture if spec is not None else name if is_own else _timm_name(name)
    if is_own and weights is None:
        return _Plan(name, arguments, None, "")
    if weights is not None:
        return _plan_metadata(weights, architecture, arguments)
    return _Plan(architecture, arguments, None, f"hf-hub:{_repository(architecture)}")


def split_arguments(text: str) -> tuple[str, dict[str, Any]]:
    """Read `NAME,KEY=VALUE,...`: a name and arguments of timm's builder, values as in JSON.

    What is no JSON is taken as text, so that `act_layer=relu` needs no quotes.
    """
    name, *pairs = text.split(",")
    arguments: dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = (part.strip() for part in pair.partition("="))
        if not separator or not key.isidentifier():
            raise UsageError(
                f"{pair!r} after the model's name is not KEY=VALUE",
                remedy="for example mobilenetv2_100,act_layer=relu",
            )
        try:
            arguments[key] = json.loads(value)
        except ValueError:
            arguments[key] = value
    return name.strip(), arguments


def _timm_name(name: str) -> str:
    """Return the timm name with its tag filled in; raise for a name that timm does not know."""
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        near = registry.suggestions(name, more=(*cifar.DEPTHS, *timm.list_models()))
        also = f"did you mean {', '.join(near)}? " if near else ""
        if "/" in name:
            also = f"write hf-hub:{name} for a hub repository, local-dir:{name} for a folder; "
        raise UsageError(
            f"there is no model called {name!r}", remedy=f"{also}`qtool models` lists what is known"
        )
    if not tag:
        configured = timm.get_pretrained_cfg(base)
        found = configured.tag if configured is not None else ""
        return f"{base}.{found}" if found else base
    tags = timm.list_pretrained(f"{base}.*")
    if name not in tags:
        raise UsageError(
            f"timm has no weights tagged {tag!r} for {base}",
            remedy=f"known: {', '.join(tags) or 'none'}",
        )
    return name


def _repository(architecture: str) -> str:
    """Return the hub repository of timm's own weights."""
    configured = timm.get_pretrained_cfg(architecture)
    if configured is None or not configured.hf_hub_id:
        raise MissingError(
            f"timm offers no weights for {architecture} on the hub",
            remedy=f"pass a file: {architecture} --weights FILE",
        )
    return str(configured.hf_hub_id)


def _fetch(plan: _Plan, offline: bool) -> Path:
    """Get timm's own weights for a plan that names no file."""
    architecture = plan.architecture
    if architecture in cifar.DEPTHS:
        raise MissingError(
            f"{architecture}, a network for CIFAR, comes without weights",
            remedy=f"pass a file: {architecture} --weights FILE",
        )
    configured, spec = timm.get_pretrained_cfg(architecture), registry.find(architecture)
    if spec is None:
        with torch.device("meta"):
            shell = timm.create_model(architecture)
        parameters = sum(parameter.numel() for parameter in shell.parameters())
        size = registry.size_text(parameters * 4)
    else:
        size = spec.size
    licence = spec.licence if spec else configured.license or "licence not stated"
    names = (configured.hf_hub_filename,) if configured.hf_hub_filename else _WEIGHT_NAMES
    note = f"about {size}, {licence}"
    return sources.fetch(_repository(architecture), names, offline=offline, note=note)


def _plan_file(path: Path, weights: Path | None) -> _Plan:
    """Plan a model given as a bare weights file: by its metadata, else by its file name."""
    if not path.is_file():
        raise MissingError(f"there is no file {path}", remedy="check the path")
    metadata = sources.read_metadata(path)
    if "qtool.format" in metadata:
        raise _quantized(path)
    if demoire_weights.METADATA_KEY in metadata:
        raise UsageError(
            f"{path} holds a network that restores pictures, not a classifier",
            remedy=f"run it with `qtool demoire --weights {path}`",
        )
    architecture = metadata.get("architecture", "")
    if not architecture:
        spec = registry.find(path.stem)
        if spec is not None:
            architecture = spec.architecture
        elif timm.is_model(path.stem.partition(".")[0]):
            architecture = _timm_name(path.stem)
        else:
            raise UsageError(
                f"neither the metadata nor the name of {path.name} says which model it is for",
                remedy=f"name the model: MODEL --weights {path}; or store `architecture` and, as "
                "JSON, `model_args` in the metadata of the file",
            )
    return _plan_metadata(weights or path, architecture)


def _quantized(name: object) -> UsageError:
    return UsageError(
        f"{name} is a quantized checkpoint, not the weights of a float model",
        remedy="evaluate it with `qtool eval`, or name the float model it was made from",
    )


def _plan_metadata(path: Path, architecture: str, given: Mapping[str, Any] | None = None) -> _Plan:
    """Plan a weights file whose metadata may hold `model_args` and `data` as JSON.

    Arguments `given` by name go before those of the file.
    """
    metadata = sources.read_metadata(path) if path.suffix == ".safetensors" else {}
    arguments = sources.read_json(metadata.get("model_args", "{}"), origin=f"model_args of {path}")
    if not arguments and architecture != "demo_vit":
        arguments = _classes_of(path, architecture)
    arguments |= given or {}
    data = metadata.get("data")
    return _Plan(
        architecture,
        arguments,
        path,
        str(path),
        data=DataConfig.from_dict(sources.read_json(data, origin=f"data of {path}"))
        if data
        else None,
    )


def _classes_of(path: Path, architecture: str) -> dict[str, Any]:
    """Read the number of classes off the head in a file, for fine-tuned weights."""
    if architecture in cifar.DEPTHS:
        rows = sources.rows(path, f"{cifar.HEAD}.weight") if path.suffix == ".safetensors" else None
        return {} if rows is None else {"num_classes": rows}
    configured = timm.get_pretrained_cfg(architecture)
    head = configured.classifier if configured is not None else None
    if path.suffix != ".safetensors" or not isinstance(head, str | tuple | list):
        return {}
    rows = sources.rows(path, f"{head if isinstance(head, str) else head[0]}.weight")
    return {} if rows in (None, configured.num_classes) else {"num_classes": rows}


def _plan_hub(repository: str, weights: Path | None, offline: bool) -> _Plan:
    config = sources.fetch_config(repository, offline=offline)
    path = weights or sources.fetch(repository, _WEIGHT_NAMES, offline=offline)
    plan = _plan_config(config, path, f"hf-hub:{repository}")
    plan.source = str(weights) if weights else f"hf-hub:{repository}"
    return plan


def _plan_folder(folder: Path, weights: Path | None, name: str) -> _Plan:
    config = folder / registry.CONFIG_FILE
    if not config.is_file():
        raise MissingError(
            f"there is no config.json in {folder}",
            remedy="local-dir: needs a folder with config.json and model.safetensors",
        )
    found = [folder / file for file in _WEIGHT_NAMES if (folder / file).is_file()]
    found += sorted(folder.glob("*.safetensors"))
    if weights is None and not found:
        raise MissingError(
            f"there are no weights in {folder}",
            remedy="put model.safetensors there, or pass --weights FILE",
        )
    plan = _plan_config(config, weights or found[0], name)
    plan.source = str(weights) if weights else name
    return plan


def _plan_config(config: Path, weights: Path, name: str) -> _Plan:
    """Plan a model described by the config.json of a timm repository."""
    values = sources.read_config(config)
    if sources.is_quantized(values):
        raise _quantized(name)
    pretrained = dict(values.get("pretrained_cfg") or values)
    architecture = values.get("architecture")
    if not isinstance(architecture, str) or not timm.is_model(architecture.partition(".")[0]):
        raise UsageError(
            f"{config} names no architecture that timm knows ({architecture!r})",
            remedy="only repositories of timm models can be opened",
        )
    arguments = dict(values.get("model_args") or {})
    arguments.setdefault("num_classes", values.get("num_classes", pretrained.get("num_classes")))
    if pretrained.get("fixed_input_size") and pretrained.get("input_size"):
        arguments.setdefault("img_size", pretrained["input_size"][-1])
    arguments = {key: value for key, value in arguments.items() if value is not None}
    return _Plan(architecture, arguments, weights, str(weights), pretrained_cfg=pretrained)


def _load(plan: _Plan, weights: Path) -> nn.Module:
    """Build the planned model and fill it with weights."""
    try:
        if plan.architecture == "demo_vit" or plan.architecture in cifar.DEPTHS:
            model = build(plan.architecture, plan.model_args)
            model.load_state_dict(timm.models.load_state_dict(str(weights)))
            return model
        overlay = {
            "file": str(weights),
            "source": "",
            "custom_load": weights.suffix == ".npz",
        }
        classes = plan.model_args.get("num_classes")
        if classes is not None:
            # timm drops the head without a word when its own idea of the classes differs
            overlay["num_classes"] = classes
        loaded: nn.Module = timm.create_model(
            plan.architecture,
            pretrained=True,
            pretrained_cfg=plan.pretrained_cfg,
            pretrained_cfg_overlay=overlay,
            **plan.model_args,
        )
        return loaded
    except Exception as error:  # timm, torch and safetensors raise whatever they met
        raise UsageError(
            f"the weights {weights} do not fit {plan.architecture}: {_first_line(error)}",
            remedy="check that the file belongs to this model, and that it is whole",
        ) from error


def _usual_data(architecture: str, model: nn.Module) -> DataConfig:
    """What the architecture's own weights take, at the size that this network was built for."""
    if architecture in cifar.DEPTHS:
        return cifar.DATA
    demo = architecture == "demo_vit"
    usual = DEMO_DATA if demo else DataConfig.from_dict(timm.data.resolve_model_data_config(model))
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return replace(usual, input_size=(usual.input_size[0], *size)) if size else usual


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else type(error).__name__
