"""A head that discovers, names, remembers and recycles, and a network whose smallest weights are pruned while it grows.

    claims, limit = claim(h, pool_h, named), threshold(pool_h, named)    # are there names around an image?
    monitor.look(index, claims, limit, h, known_h, known_y)              # none, time and again, and alike: a concept
    unit, how = units.take(head, optimizer, UNNAMED)    # a unit for them: a redundant one, else a new one
    imprint(head, unit, h, others)                      # it points at what sets them apart from the others
    units.owner[unit] = 7                               # the first labels give it a name

    grow_head(head, optimizer)                          # one more unit; the old ones do not notice
    masks = prune_smallest(encoder, 0.8)                # zero the smallest 80 % of the weights
    dead = prune_filters(encoder, 0.3)                  # or whole filters
    masks = prune(encoder, 0.8, 0.3, masks)             # or both, and what was pruned before
    apply_masks(encoder, masks)                         # after every optimizer step: momentum revives what was pruned once

Sources: Qi, Brown & Lowe 2018, "Low-Shot Learning with Imprinted Weights" (arXiv 1712.07136); Fisher 1936, "The Use of Multiple
Measurements in Taxonomic Problems" (Annals of Eugenics 7), for what sets a class apart; Zhu & Gupta 2017, "To Prune, or Not to
Prune" (arXiv 1710.01878); Li et al. 2017, "Pruning Filters for Efficient ConvNets" (arXiv 1608.08710); Dohare et al. 2024, "Loss
of plasticity in deep continual learning" (Nature 632), for the utility of a unit.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

UNNAMED, FREE = -1, -2  # owners of a unit that has no class: a concept without a name; nobody

# ---- growing --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def grow_head(head: nn.Linear, optimizer: torch.optim.Optimizer | None, count: int = 1) -> None:
    """Add `count` units to a linear layer, in place, in the middle of training.

    The larger parameter takes the place of the old one in the same parameter group, and the old rows keep their values
    and their optimizer state (momentum, second moments), so that their next update is what it would have been. A new row
    has a random direction, the mean length of the old rows, no bias, and a state of zeros. Raises ValueError for count < 1,
    and, before anything is changed, for an optimizer whose state is not one value a weight (Adafactor, LBFGS).
    """
    if count < 1:
        raise ValueError(f"a head grows by at least one unit, not {count}")
    for old in head.parameters(recurse=False) if optimizer is not None else ():
        for key, value in optimizer.state.get(old, {}).items():
            if torch.is_tensor(value) and value.numel() > 1 and value.shape != old.shape:
                raise ValueError(f"cannot grow the state '{key}' of {type(optimizer).__name__}; use SGD, Adam, AdamW or RMSprop")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("cannot grow a layer that LBFGS trains; use SGD, Adam, AdamW or RMSprop")
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
    optimizer.state[new] = state


@torch.no_grad()
def recycle_unit(head: nn.Linear, optimizer: torch.optim.Optimizer | None, unit: int, masks: dict[str, Tensor] | None = None) -> None:
    """Make a unit forget: a random direction of the mean length of the other rows, no bias, an optimizer state of zeros.

    masks: of the pruned weights of the head, if it has any, by parameter name; the unit's row is whole again. Raises IndexError
    for a unit that is not there.
    """
    if not 0 <= unit < head.out_features:
        raise IndexError(f"no unit {unit} in a head of {head.out_features}")
    for name, parameter in head.named_parameters(recurse=False):
        fresh = torch.zeros_like(parameter[unit])
        if parameter.ndim > 1:
            others = torch.arange(len(parameter), device=parameter.device) != unit
            length = parameter[others].norm(dim=1).mean() if others.any() else 1.0
            fresh = F.normalize(torch.randn_like(fresh), dim=0) * length
        parameter[unit] = fresh
        if optimizer is not None:
            for value in optimizer.state.get(parameter, {}).values():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    value[unit] = 0
        if masks and name in masks:
            masks[name][unit] = True


@torch.no_grad()
def imprint(
    head: nn.Linear, unit: int, h: Tensor, others: Tensor | None = None, tolerance: float = 0.03, rivals: Tensor | None = None
) -> None:
    """Point a unit at embeddings h [n,D] of its class, so that it can be predicted at once.

    Its row becomes normalize(mean(normalize(h))), with the mean length of the other rows. A mean of few images lies close to
    everything. With others [m,D], embeddings of images of other classes, the row is therefore turned to where its class differs
    from them (`discriminant`); the bias lets it speak as loudly to its own images as before, but so much more softly that it wins no
    more than the share `tolerance` of the others (or one image more, at a tie) from its rivals (bool [U], the units that answer;
    None: all). A head without biases heeds no others. The optimizer state is left alone.
    """
    rest = torch.arange(len(head.weight), device=head.weight.device) != unit
    rivals = rest if rivals is None else rest & rivals
    length, own = head.weight[rest].norm(dim=1).mean() if rest.any() else 1.0, F.normalize(h.float(), dim=1).mean(0)

    def point_at(direction: Tensor) -> None:
        head.weight[unit] = (F.normalize(direction, dim=0) * length).to(head.weight.dtype)

    point_at(own)
    if head.bias is None:
        return
    head.bias[unit] = 0
    if others is None or not len(others) or not rivals.any():
        return
    best, kind = head(others).float().masked_fill(~rivals, float("-inf")).max(1)
    loud = head(h)[:, unit].float().mean()
    point_at(discriminant(own, F.normalize(others.float(), dim=1), kind))
    margin = (head(others)[:, unit].float() - best).quantile(1 - tolerance, interpolation="higher")
    head.bias[unit] = torch.minimum(loud - head(h)[:, unit].float().mean(), -margin)


def discriminant(own: Tensor, others: Tensor, kind: Tensor, shrinkage: float = 0.8) -> Tensor:
    """The direction [D] in which the mean embedding `own` [D] of a class differs from the others [m,D], relative to how these vary.

    Fisher's linear discriminant: solve(S, own - mean(others)), S being the covariance of the others around the means of their kinds
    (int64 [m], >= 0), shrunk towards its mean variance, for they are few.
    """
    total = others.new_zeros(int(kind.max()) + 1, others.shape[1]).index_add_(0, kind, others)
    around = others - (total / kind.bincount().clamp(min=1)[:, None])[kind]
    covariance = around.T @ around / len(others)
    variance = covariance.diagonal().mean().clamp(min=1e-6)
    identity = torch.eye(len(own), device=own.device)
    return torch.linalg.solve((1 - shrinkage) * covariance + shrinkage * variance * identity, own - others.mean(0))


# ---- owners ---------------------------------------------------------------------------------------------------------


class Units:
    """What each unit of a head stands for: a class, a concept that has no name yet, or nothing.

    owner: the class of each unit, or UNNAMED, or FREE
    utility [U]: running mean (0.99) of the probability that a unit was given, over the training images
    age: looks of the monitor since each unit got its owner; below `mature` (3) a unit cannot be redundant
    """

    def __init__(self, owner: Sequence[int], mature: int = 3, device: torch.device | str = "cpu"):
        self.owner, self.age, self.mature = list(owner), [mature] * len(owner), mature
        self.utility = torch.full((len(self.owner),), 1 / max(len(self.owner), 1), device=device)

    def owners(self) -> Tensor:
        """`owner` as a tensor, int64 [U]."""
        return torch.tensor(self.owner, device=self.utility.device)

    def of_classes(self, num_classes: int) -> Tensor:
        """The unit of each class, -1 for a class that has none: int64 [num_classes]."""
        place = {c: unit for unit, c in enumerate(self.owner)}
        return torch.tensor([place.get(c, -1) for c in range(num_classes)], device=self.utility.device)

    def in_use(self, taught: Tensor) -> Tensor:
        """Which units speak: those of classes that have a label (taught: bool [C]), and the unnamed ones. bool [U]."""
        taught = taught.tolist()
        return torch.tensor([c == UNNAMED or (c >= 0 and taught[c]) for c in self.owner], device=self.utility.device)

    def unnamed(self) -> list[int]:
        """The units of concepts that have no name yet."""
        return [unit for unit, c in enumerate(self.owner) if c == UNNAMED]

    def observe(self, p: Tensor) -> None:
        """Update the utilities with probabilities p [B,U] of a batch."""
        self.utility.lerp_(p.detach().mean(0), 0.01)

    def redundant(self) -> int | None:
        """A unit that may be used again: nobody's, else a mature unnamed one that is hardly ever chosen. Never one with a class."""
        if FREE in self.owner:
            return self.owner.index(FREE)
        idle = [u for u in self.unnamed() if self.age[u] >= self.mature]
        least = min(idle, key=lambda u: float(self.utility[u]), default=None)
        return least if least is not None and self.utility[least] < 0.1 / len(self.owner) else None

    def take(self, head: nn.Linear, optimizer: torch.optim.Optimizer | None, owner: int) -> tuple[int, str]:
        """A unit for `owner`, "recycled" if there is a redundant one, else "grown". Changes the head in place."""
        unit = self.redundant()
        if unit is None:
            unit, how = head.out_features, "grown"
            grow_head(head, optimizer)
            self.owner.append(owner)
            self.age.append(0)
            self.utility = torch.cat([self.utility, self.utility.new_zeros(1)])
        else:
            how = "recycled"
            recycle_unit(head, optimizer, unit)
            self.owner[unit], self.age[unit] = owner, 0
        self.utility[unit] = 1 / len(self.owner)
        return unit, how


# ---- confusion ------------------------------------------------------------------------------------------------------


class ConfusionMonitor:
    """Finds a concept that has no unit yet: images that no unit claims, look after look, and that resemble each other.

    What claims an image are the names around it (`claim`): labels leak at random, so that the neighbourhood of a named kind holds
    them at a known rate, and that of a kind which nobody names holds hardly any, however sure the softmax is. What is too few
    follows from the known classes themselves (`threshold`).

    n: images in all; at_least: images that make a concept, as a share (0.3) of the images looked at for each class that has a name,
    and never fewer than 20; patience: looks in a row in which an image must be unclaimed (2); cooldown: looks after an opening in
    which nothing else is opened (2); chance: largest probability that labels which leak at random avoid the concept so well (0.02, for
    it is asked anew at every look)
    """

    def __init__(
        self,
        n: int,
        at_least: float = 0.3,
        patience: int = 2,
        cooldown: int = 2,
        chance: float = 0.02,
        device: torch.device | str = "cpu",
    ):
        self.at_least, self.patience, self.cooldown, self.chance = at_least, patience, cooldown, chance
        self.streak = torch.zeros(n, dtype=torch.long, device=device)  # looks in a row in which nobody claimed the image
        self.concept = torch.full((n,), -1, device=device)  # the unit that an image helped to open
        self.rest = 0  # looks to wait

    def look(self, index: Tensor, claims: Tensor, limit: float, h: Tensor, known_h: Tensor, known_y: Tensor) -> Tensor | None:
        """Which of the images `index` int64 [W] are a concept without a unit; None if there is none. Call it once an epoch.

        claims [W]: from `claim`, unclaimed below `limit` (`threshold`); h [W,D]: their embeddings; known_h [L,D], known_y [L]: of
        labelled images, whose resemblance to their own class says what resembling means. Around a concept there are at most two
        thirds of the labels that a named one would have, and too few by more than chance. Returns the places in `index` of the
        less claimed half of it, the surer ones. As long as nothing is labelled, nothing is missed.
        """
        if not len(known_y):
            return None
        at_least = max(20, round(self.at_least * len(index) / len(known_y.unique())))
        self.streak[index] = torch.where(claims < limit, self.streak[index] + 1, 0)
        self.rest = max(0, self.rest - 1)
        again = (self.streak[index] >= self.patience).nonzero()[:, 0]
        if self.rest or len(again) < at_least:
            return None
        unit, known, reach = F.normalize(h.float(), dim=1), F.normalize(known_h.float(), dim=1), resemblance(known_h, known_y)
        rows = unit[again]  # two are alike if they could lie at `reach` from one centre, in directions of their own
        alike = torch.cat([(part @ rows.T > reach**2).sum(1) for part in rows.split(1000)])
        centre = F.normalize(rows[rows @ rows[alike.argmax()] > reach**2].mean(0), dim=0)
        near = unit @ centre > reach
        group, found = again[near[again]], (known @ centre > reach).sum()
        expected = (near.sum() + found) * len(known) / (len(unit) + len(known))
        by_chance = torch.special.gammaincc(found + 1.0, expected.float())  # Poisson: at most `found` where `expected` are due
        if len(group) < at_least or found > 2 / 3 * expected or by_chance > self.chance:
            return None
        self.rest = self.cooldown + 1
        return group[claims[group].argsort()[: (len(group) + 1) // 2]]


def claim(h: Tensor, pool_h: Tensor, named: Tensor, temperature: float = 0.2) -> Tensor:
    """How far the names around an image claim it: float32 [n], near 0 where there are none, about 1 amid a class that has a name.

    h [n,D]: embeddings; pool_h [M,D]: of images to compare with, of which `named` (bool [M]) have a label. It is the density of
    named images over the density of all images, both by the kernel exp(cosine / temperature), relative to the share of named ones.
    NaN where there is none.
    """
    pool_h, claims = F.normalize(pool_h.float(), dim=1), []
    for part in h.split(1000):
        weight = ((F.normalize(part.float(), dim=1) @ pool_h.T - 1) / temperature).exp()  # (1000, M)
        claims.append(weight @ named.float() / weight.sum(1))
    return torch.cat(claims) / named.float().mean()


def threshold(pool_h: Tensor, named: Tensor, reject: float = 0.05, temperature: float = 0.2) -> float:
    """The claim below which an image is unknown: that of the share `reject` of the named images, each as if it had no label.

    pool_h [M,D], named bool [M]: as in `claim`. About that share of all images of the known classes will be taken for unknown.
    """
    if named.sum() < 2:
        return float("-inf")
    pool_h, weight_of, claims = F.normalize(pool_h.float(), dim=1), named.float(), []
    for part in pool_h[named].split(1000):
        weight = ((part @ pool_h.T - 1) / temperature).exp()
        claims.append((weight @ weight_of - 1) / weight.sum(1))  # its own weight is 1
    return float((torch.cat(claims) / weight_of.mean()).quantile(reject))


def resemblance(h: Tensor, y: Tensor) -> float:
    """The cosine to the mean of the others of their class that three quarters of the embeddings h [L,D] of classes y [L] reach.

    1, which nothing reaches, where no class has two of them.
    """
    unit = F.normalize(h.float(), dim=1)
    total = torch.zeros(int(y.max()) + 1, unit.shape[1], device=h.device).index_add_(0, y, unit)
    several = y.bincount()[y] > 1
    cosine = (unit * F.normalize(total[y] - unit, dim=1)).sum(1)[several]
    return float(cosine.quantile(0.25)) if len(cosine) else 1.0


FEW = (1, 5, 20)  # labels of a new class


@torch.no_grad()
def first_sight(
    head: nn.Linear, named: Tensor, first_h: Tensor, other_h: Tensor, test_h: Tensor, is_new: Tensor, right: Tensor
) -> dict[str, float]:
    """How a class is recognised at the moment its first 1, 5 or 20 labels come, before any gradient step, and what that costs.

    head: before the class has a unit, of which `named` (bool [U]) answer; first_h [20,D]: embeddings of its images in the order
    of their labels; other_h [L,D]: of labelled images of the other classes; test_h [T,D]: of test images of old classes and of
    the new one (is_new: bool [T]), and which of them the head gets right so far. For a unit imprinted with heed of the others
    ("imprint"), without ("plain") and "random": "KIND_N", the test accuracy on the class, and "KIND_N_lost", that of the old ones
    that goes to it.
    """
    best = head(test_h).masked_fill(~named, float("-inf")).amax(1)
    result = {}
    for n in FEW:
        for kind, options in (("imprint", {"others": other_h, "rivals": F.pad(named, (0, 1))}), ("plain", {}), ("random", None)):
            trial = copy.deepcopy(head)
            grow_head(trial, None)
            if options is not None:
                imprint(trial, trial.out_features - 1, first_h[:n], **options)
            taken = trial(test_h)[:, -1] > best
            result[f"{kind}_{n}"] = taken[is_new].float().mean().item()
            result[f"{kind}_{n}_lost"] = (taken & right)[~is_new].float().mean().item()
    return result


# ---- pruning --------------------------------------------------------------------------------------------------------


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


def smallest(size: Tensor, share: float) -> Tensor:
    """Which of the values [n] belong to the smallest round(share n): bool [n]. Raises ValueError for a share outside 0..1."""
    if not 0 <= share <= 1:
        raise ValueError(f"sparsity must be in 0..1, not {share}")
    chosen = torch.zeros(len(size), dtype=torch.bool, device=size.device)
    chosen[size.topk(round(share * len(size)), largest=False, sorted=False).indices] = True
    return chosen


@torch.no_grad()
def prune_smallest(model: nn.Module, sparsity: float) -> dict[str, Tensor]:
    """Zero the fraction `sparsity` (0..1) of all prunable weights that is smallest in magnitude, over all layers together.

    Returns masks {parameter name: bool, True = kept} for `apply_masks`. Weights that are zero already are the first to
    go, so a rising sparsity only ever adds to what is pruned. Raises ValueError outside 0..1.
    """
    weights = prunable(model)
    gone = smallest(torch.cat([w.abs().flatten() for w in weights.values()]) if weights else torch.zeros(0), sparsity)
    parts = gone.split([w.numel() for w in weights.values()]) if weights else ()
    masks = {name: ~part.view_as(w) for (name, w), part in zip(weights.items(), parts, strict=True)}
    apply_masks(model, masks)
    return masks


def filter_layers(model: nn.Module) -> list[tuple[str, str]]:
    """The convolutions of a chain conv, norm, ReLU, ..., each with its batch norm, by name; not the last, whose filters are the output."""
    if not isinstance(model, nn.Sequential):
        raise ValueError("whole filters can be pruned in a plain chain of layers only (cnn, vgg-small, vgg11, vgg16)")
    names = [name for name, module in model.named_children() if isinstance(module, nn.Conv2d | nn.BatchNorm2d)]
    return list(zip(names[::2], names[1::2], strict=True))[:-1]


@torch.no_grad()
def prune_filters(model: nn.Module, share: float) -> dict[str, Tensor]:
    """Zero the fraction `share` (0..1) of the filters of a chain of convolutions with the smallest norm, with their batch norm.

    Those of the last layer, which are the embedding, are left alone and do not count.
    Norms are compared over all layers together, each relative to the mean of its layer, whose largest filter always stays. A dead
    filter's output is exactly zero (its batch norm's scale and shift are masked too), so that `model.compact` can remove it. Returns
    masks for `apply_masks`. Raises ValueError outside 0..1 and for a model that is not a chain.
    """
    layers = filter_layers(model)
    norms = [model.get_submodule(conv).weight.flatten(1).norm(dim=1) for conv, _ in layers]
    relative = [norm / norm.mean().clamp(min=1e-12) for norm in norms]
    gone = smallest(torch.cat(relative) if relative else torch.zeros(0), share).split([len(norm) for norm in norms]) if layers else ()
    masks = {}
    for (conv, norm), size, dead in zip(layers, norms, gone, strict=True):
        kept = ~dead
        kept[size.argmax()] = True
        masks[f"{conv}.weight"] = kept.view(-1, 1, 1, 1).expand_as(model.get_submodule(conv).weight)
        masks[f"{norm}.weight"] = masks[f"{norm}.bias"] = kept
    apply_masks(model, masks)
    return masks


def prune(model: nn.Module, sparsity: float, filters: float, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """Prune a share of whole filters and then the smallest weights, dead filters included; the masks, no wider than `before`."""
    masks = dict(before)
    for new in (prune_filters(model, filters) if filters else {}, prune_smallest(model, sparsity)):
        masks |= {name: mask & masks[name] if name in masks else mask for name, mask in new.items()}
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
