"""How much each layer's rounding costs the model's answers, from images without labels.

A second-order estimate: with g the gradient of the log-likelihood of a class drawn from the model's
own answer, the squared projection of a layer's output error on g estimates the divergence that the
error causes (its Gauss-Newton form with the Fisher matrix). Only one backward pass is needed, and
every layer is judged at every width within one forward pass per width.

References: HAWQ-V2 (arXiv 1911.03852) for second-order sensitivity; FIMA-Q (arXiv 2506.11543) for
the Fisher matrix of a block's output.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtool.errors import Progress
from qtool.methods.spdfq.reconstruction import choose_ranges, simulate
from qtool.models.vision import Layout
from qtool.quant.convolution import fold_norms
from qtool.quant.plan import LayerPlan
from qtool.quant.simulation import SimulatedLayer

SAMPLE = 16
"""Images that a layer is judged on."""


def _answer_gradients(
    model: nn.Module, names: Sequence[str], images: Tensor, *, seed: int
) -> dict[str, Tensor]:
    """Gradient of the log-likelihood of one class drawn per image, at the output of each layer."""
    outputs: dict[str, Tensor] = {}
    with ExitStack() as stack, torch.enable_grad():
        for name in names:

            def keep(_: nn.Module, __: object, output: Tensor, name: str = name) -> Tensor:
                outputs[name] = output
                return output.clone()  # activations may write over it

            handle = model.get_submodule(name).register_forward_hook(keep)
            stack.callback(handle.remove)
        # A leaf that needs a gradient makes every output part of the graph, weights left frozen.
        logits = model(images.clone().requires_grad_(True))
        likelihood = F.log_softmax(logits.float(), dim=1)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(likelihood.detach().exp().cpu(), 1, generator=generator)
        chosen = likelihood.gather(1, drawn.to(likelihood.device)).sum()
        gradients = torch.autograd.grad(chosen, list(outputs.values()))
    return dict(zip(outputs, gradients, strict=True))


def _projected(error: Tensor, gradient: Tensor, *, channels: int) -> float:
    """Squared projection of each token's error on its gradient, summed over tokens, per image."""
    return float((error * gradient).sum(dim=channels).square().sum()) / len(error)


def layer_losses(
    model: nn.Module,
    layout: Layout,
    plans_at: Callable[[int], Mapping[str, LayerPlan]],
    images: Tensor,
    *,
    widths: Sequence[int],
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, dict[int, float]]:
    """Estimate what quantizing each layer alone costs, at every width.

    Args:
        model: The float model, in evaluation mode.
        layout: Its attentions and units.
        plans_at: Plans of all layers at a width, with the same names at every width.
        images: (N, 3, H, W), normalised; the first 16 are used.
        widths: Bit-widths to judge.
        seed: Of the classes drawn.
        progress: Told about every width.

    Returns:
        Per layer and width, an estimate of the divergence in squared nats; never rising with the
        width.
    """
    sample = images[:SAMPLE]
    plans = plans_at(widths[0])
    names = list(plans)
    norms = [(name, plan.norm) for name, plan in plans.items() if plan.norm]
    folded = fold_norms(copy.deepcopy(model), norms)
    gradients = _answer_gradients(folded, names, sample, seed=seed)
    losses: dict[str, dict[int, float]] = {name: {} for name in names}
    for index, bits in enumerate(sorted(widths)):
        simulated = simulate(copy.deepcopy(folded), plans_at(bits), layout.attentions)
        simulated.requires_grad_(False)
        choose_ranges(simulated, sample, layout)
        for name, loss in _losses_of(simulated, plans, sample, gradients).items():
            before = losses[name].values()
            losses[name][bits] = min(loss, *before) if before else loss
        if progress is not None:
            progress("sensitivity", index + 1, len(widths), f"{bits} bits")
    return losses


@torch.no_grad()
def _losses_of(
    simulated: nn.Module,
    plans: Mapping[str, LayerPlan],
    images: Tensor,
    gradients: Mapping[str, Tensor],
) -> dict[str, float]:
    """Quantize one layer after the other, each on the input it gets from the float layers."""
    losses: dict[str, float] = {}
    busy: list[str] = []
    with ExitStack() as stack:
        for name, gradient in gradients.items():
            module = simulated.get_submodule(name)
            own = module if isinstance(module, SimulatedLayer) else module.products

            def compare(
                module: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                output: Tensor,
                own: Any = own,  # noqa: ANN401 - a simulated layer, known by its switch
                name: str = name,
                gradient: Tensor = gradient,
            ) -> None:
                if busy:
                    return
                busy.append(name)
                own.enabled = True
                error = module(*args, **kwargs) - output
                channels = 1 if plans[name].kind == "conv" else -1
                losses[name] = _projected(error, gradient, channels=channels)
                own.enabled = False
                busy.clear()

            handle = module.register_forward_hook(compare, with_kwargs=True)
            stack.callback(handle.remove)
        simulated(images)
    return losses


def multiply_adds(
    model: nn.Module, plans: Mapping[str, LayerPlan], image: Tensor
) -> dict[str, int]:
    """Multiply-adds of each planned layer for one image; of attention, those of its two products.

    Args:
        model: The float model.
        plans: Plans by module name.
        image: (1, 3, H, W).
    """
    counts: dict[str, int] = {}
    with ExitStack() as stack, torch.no_grad():
        for name, plan in plans.items():

            def count(
                module: nn.Module,
                args: tuple[Tensor, ...],
                output: Tensor,
                name: str = name,
                plan: LayerPlan = plan,
            ) -> None:
                if plan.kind == "attention":
                    tokens = args[0].shape[-2]
                    counts[name] = 2 * tokens * args[0].numel()
                else:
                    weight = module.get_parameter("weight")
                    counts[name] = output.numel() * weight[0].numel()

            handle = model.get_submodule(name).register_forward_hook(count)
            stack.callback(handle.remove)
        model(image)
    return counts
