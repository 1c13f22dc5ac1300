"""An output layer that grows with the classes, and a network whose smallest weights are pruned on the way.

    grow_head(network.head, optimizer)                  # one more unit; the old ones do not notice
    imprint(network.head, unit, h)                      # give it the mean direction of its first images
    masks = prune_smallest(network.encoder, 0.8)        # zero the smallest 80 % of the weights
    apply_masks(network.encoder, masks)                 # after every optimizer step: momentum revives what was pruned once

Sources: Qi, Brown & Lowe 2018, "Low-Shot Learning with Imprinted Weights" (arXiv 1712.07136); Zhu & Gupta 2017, "To Prune,
or Not to Prune" (arXiv 1710.01878).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def grow_head(head: nn.Linear, optimizer: torch.optim.Optimizer | None, count: int = 1) -> None:
    """Add `count` units to a linear layer, in place, in the middle of training.

    The larger parameter takes the place of the old one in the same parameter group, and the old rows keep their values
    and their optimizer state (momentum, second moments), so that their next update is what it would have been. A new row
    has a random direction, the mean length of the old rows, and a state of zeros. Raises ValueError for count < 1, and for
    an optimizer whose state is not one value a weight (Adafactor, LBFGS).
    """
    if count < 1:
        raise ValueError(f"a head grows by at least one unit, not {count}")
    units = head.out_features
    for name, old in list(head.named_parameters(recurse=False)):
        rows = old.new_zeros(count, *old.shape[1:])
        if old.ndim > 1:
            length = old.norm(dim=1).mean() if units else 1.0
            rows = F.normalize(torch.randn_like(rows), dim=1) * length
        new = nn.Parameter(torch.cat([old, rows]), requires_grad=old.requires_grad)
        setattr(head, name, new)
        if optimizer is not None:
            swap_parameter(optimizer, old, new)
    head.out_features = units + count


def swap_parameter(optimizer: torch.optim.Optimizer, old: Tensor, new: Tensor) -> None:
    """Put `new`, which has more rows, in the place of `old`: same group, old rows' state kept, new rows' state zero."""
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    state = optimizer.state.pop(old, None)
    if state is None:
        return
    for key, value in state.items():
        if torch.is_tensor(value) and value.shape == old.shape:
            state[key] = torch.cat([value, value.new_zeros(len(new) - len(old), *value.shape[1:])])
        elif torch.is_tensor(value) and value.numel() > 1:
            raise ValueError(f"cannot grow the state '{key}' of {type(optimizer).__name__}; use SGD, Adam, AdamW or RMSprop")
    optimizer.state[new] = state


@torch.no_grad()
def imprint(head: nn.Linear, unit: int, h: Tensor) -> None:
    """Point a unit at the mean direction of embeddings h [n,D] of its class, so that it can be predicted at once.

    The row becomes normalize(mean(normalize(h))), with the mean length of the other rows. Its optimizer state is left alone.
    """
    direction = F.normalize(F.normalize(h.float(), dim=1).mean(0), dim=0)
    others = torch.arange(len(head.weight), device=head.weight.device) != unit
    length = head.weight[others].norm(dim=1).mean() if others.any() else 1.0
    head.weight[unit] = (direction * length).to(head.weight.dtype)


def prunable(model: nn.Module) -> dict[str, Tensor]:
    """The weights that may be pruned, by name: those of linear and convolutional layers and the inputs of attention.

    Not biases, norms, layer scales, class tokens and position embeddings, of which some are small without being useless.
    """
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            weights[f"{name}.weight".removeprefix(".")] = module.weight
        elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            weights[f"{name}.in_proj_weight".removeprefix(".")] = module.in_proj_weight
    return weights


@torch.no_grad()
def prune_smallest(model: nn.Module, sparsity: float) -> dict[str, Tensor]:
    """Zero the fraction `sparsity` (0..1) of all prunable weights that is smallest in magnitude, over all layers together.

    Returns masks {parameter name: bool, True = kept} for `apply_masks`. Weights that are zero already are the first to
    go, so a rising sparsity only ever adds to what is pruned. Raises ValueError outside 0..1.
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity must be in 0..1, not {sparsity}")
    weights = prunable(model)
    if not weights:
        return {}
    size = torch.cat([w.abs().flatten() for w in weights.values()])
    kept = torch.ones(len(size), dtype=torch.bool, device=size.device)
    kept[size.topk(round(sparsity * len(size)), largest=False, sorted=False).indices] = False
    parts = kept.split([w.numel() for w in weights.values()])
    masks = {name: part.view_as(w) for (name, w), part in zip(weights.items(), parts, strict=True)}
    apply_masks(model, masks)
    return masks


@torch.no_grad()
def apply_masks(model: nn.Module, masks: dict[str, Tensor]) -> None:
    """Zero the weights that the masks do not keep."""
    for name, mask in masks.items():
        model.get_parameter(name).mul_(mask)


def sparsity_of(model: nn.Module) -> float:
    """The fraction of the prunable weights that is exactly zero, 0..1."""
    weights = prunable(model).values()
    return sum(int((w == 0).sum()) for w in weights) / max(sum(w.numel() for w in weights), 1)
