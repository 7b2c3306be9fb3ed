"""Checkpoints back into models that run on the integer engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from qtool.api import branch_model
from qtool.api.nested_model import choose_bits, install
from qtool.errors import CheckpointError, UsageError
from qtool.io import checkpoint
from qtool.models import convolutional, demoire, demoire_weights, sources, vision
from qtool.quant import graphs
from qtool.quant.attention import ATTENTION_CLASSES
from qtool.quant.convolution import without_norm
from qtool.quant.fusion import fuse
from qtool.quant.layers import Geometry, IntegerProducts, QuantConv2d, QuantLinear
from qtool.quant.plan import replace_module
from qtool.quant.widths import Request


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    bits: Request | None = None,
    offline: bool = False,
) -> nn.Module:
    """Load a checkpoint as a module that computes with integers.

    Args:
        path: File or folder written by `qtool quantize`, or `hf-hub:OWNER/NAME` of such a folder.
        device: Where the model goes.
        bits: Bit-width to run at, for example 4 or "w4a4"; for a switchable checkpoint also a
            mapping of globs over layer names to widths. None takes the active ones of the file.
        offline: Look for hub repositories in the local cache only; no socket is opened.

    Returns:
        The model in evaluation mode, (B, 3, H, W) to (B, classes), or to a tuple of pictures if it
        restores; its attribute `qtool_config` is the checkpoint's header. A switchable one can be
        switched: `model.set_bits(4)`, `with qtool.bits(4):`, `model(x, bits=4)`.

    Raises:
        CheckpointError: The file is absent, damaged, foreign, hostile or of a newer format.
        MissingError: The repository is not cached and cannot be fetched.
        UsageError: The file cannot run at `bits`.
    """
    header, tensors = checkpoint.read(sources.checkpoint_file(path, offline=offline))
    if header.engine == "fixed" and bits is not None:
        _require_width(header, bits, path)
    model = restore(header, tensors, origin=str(path), fused=True)
    if header.engine != "fixed":
        choose_bits(model, header, bits, path=str(path))
    model.qtool_config = header  # type: ignore[assignment]
    model = model.to(device).eval()
    if torch.device(device).type == "cuda" and header.engine == "fixed" and _attends(header):
        graphs.replay(model)
    return model


def _attends(header: checkpoint.Header) -> bool:
    """Whether a model is a transformer, most of whose time on a GPU goes into starting kernels."""
    return any(layer.kind == "attention" for layer in header.layers.values())


def _require_width(header: checkpoint.Header, bits: Request, path: str | Path) -> None:
    """Refuse a width that a file with one width per layer does not have.

    Raises:
        UsageError: It does not have it.
    """
    found = {*header.bits, *(name[1] for name in header.bits if name[1] == name[3:])}
    if isinstance(bits, Mapping) or str(bits) not in found:
        raise UsageError(
            f"{path} cannot run at {bits}",
            remedy=f"it holds {', '.join(header.bits)}; --bits any makes a switchable file",
        )


def restore(
    header: checkpoint.Header, tensors: dict[str, Tensor], *, origin: str, fused: bool = False
) -> nn.Module:
    """Build the architecture of a header around its tensors.

    Args:
        header: What the file says of the model.
        tensors: What it holds.
        origin: Name of the file, for errors.
        fused: Let layers hand codes to one another (`qtool.quant.fusion`).

    Raises:
        CheckpointError: Header and tensors do not describe one model.
    """
    tensors = _as_computed(header, tensors)
    try:
        if header.engine == "branches":
            return branch_model.restore(header, tensors).requires_grad_(False).eval()
        model = _built(header, device="meta")
        layout = None if header.task == "restoration" else vision.layout(model)
        kinds = {site.name: site.kind for site in layout.attentions} if layout else {}
        if header.engine == "nested":
            tensors = install(model, header, tensors, kinds)
        else:
            for name, layer in header.layers.items():
                replace_module(model, name, _module(model, name, layer, tensors, kinds))
                if norm := str(layer.options.get("norm") or ""):
                    replace_module(model, norm, without_norm(model.get_submodule(norm)))
        model.load_state_dict(tensors, strict=True, assign=True)
        _fill_derived_buffers(model, header)
        if fused and layout is not None:
            chains = convolutional.chains(model)
            fuse(model, norms=layout.norms, gelus=layout.gelus, chains=list(chains))
    except (UsageError, RuntimeError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(
            f"{origin} does not fit the architecture it names ({header.architecture}): {reason}",
            remedy="quantize the model again; the file was changed or written by another version",
        ) from error
    return model.requires_grad_(False).eval()


def _built(header: checkpoint.Header, *, device: str) -> nn.Module:
    """The float architecture of a header, with random weights.

    Raises:
        UsageError: There is no such architecture, or it does not take these arguments.
    """
    if header.task == "classification":
        return vision.build(header.architecture, header.model_args, device=device)
    if not demoire_weights.are_harmless(header.model_args):
        raise UsageError(f"no network has the arguments {header.model_args}")
    with torch.device(device):
        return demoire.build(header.architecture, header.model_args)


def _as_computed(header: checkpoint.Header, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in the types and shapes that the modules compute with."""
    owners = {*header.layers, *(f"{name}.products" for name in header.layers)}
    computed = {}
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        if tensor.is_floating_point() or leaf == "bias":
            tensor = tensor.float()
        elif leaf.endswith("_zero_point"):
            tensor = tensor.int()
        computed[name] = tensor.reshape(1) if owner in owners and not tensor.ndim else tensor
    return computed


def _module(
    model: nn.Module,
    name: str,
    layer: checkpoint.LayerBits,
    tensors: dict[str, Tensor],
    kinds: Mapping[str, str],
) -> nn.Module:
    """The integer module that takes the place of a float one."""
    source = model.get_submodule(name)
    if layer.kind == "attention":
        products = IntegerProducts(
            bits=layer.input_bits or 0,
            quantizer=str(layer.options.get("quantizer", "uniform")),
            probabilities=str(layer.options.get("probabilities", "log2")),
            device="meta",
        )
        return ATTENTION_CLASSES[kinds[name]](source, products)
    kind = QuantLinear if layer.kind == "linear" else QuantConv2d
    shape = tuple(tensors[f"{name}.weight_shape"].tolist())
    expected = tuple(source.get_parameter("weight").shape)
    if shape != expected:
        raise ValueError(f"{name} has weights of shape {shape}, not {expected}")
    module = kind(
        shape,
        weight_bits=layer.weight_bits or 0,
        input_bits=layer.input_bits or 0,
        bias=f"{name}.bias" in tensors,
        table=layer.options.get("quantizer") == "table",
        device="meta",
    )
    if isinstance(module, QuantConv2d):
        if not isinstance(source, nn.Conv2d):
            raise TypeError(f"{name} is no convolution")
        module.geometry = Geometry.of(source)
    return module


def _fill_derived_buffers(model: nn.Module, header: checkpoint.Header) -> None:
    """Recompute what no checkpoint stores: index tables and masks that follow from the shape."""
    if not any(buffer.is_meta for buffer in model.buffers()):
        return
    donor = dict(_built(header, device="cpu").named_buffers())
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner).register_buffer(leaf, donor[name], persistent=False)
