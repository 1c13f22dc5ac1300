"""A head that discovers, names, remembers and recycles its units, in a network that is pruned while it grows.

    claims, limit = claim(h, pool_h, named), threshold(pool_h, named)    # are there labels around an image?
    group = monitor.find_concept(index, claims, limit, h, known_h, known_y)    # unclaimed and alike: a kind
    unit, how = units.allocate(head, optimizer, UNNAMED)    # a unit for it: a redundant one, else a new one
    imprint(head, unit, h, others)                          # it points at what sets it apart from the others

    grow_head(head, optimizer)                              # one more unit; the old ones do not notice
    masks = prune_smallest(encoder, 0.8)                    # zero the smallest 80 % of the weights
    apply_masks(encoder, masks)                             # after every step: momentum revives pruned weights

Sources: Qi, Brown & Lowe 2018, imprinting (arXiv 1712.07136); Fisher 1936, the discriminant; Zhu & Gupta 2017 and
Li et al. 2017, pruning (arXiv 1710.01878, 1608.08710); Dohare et al. 2024, the utility of a unit (Nature 632).
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EVENT = ("epoch", "event", "unit", "class", "count", "purity")  # the columns of events.csv
UNNAMED, FREE = -1, -2  # owners of a unit that has no class: a concept without a name; nobody
UNKNOWN = -3  # vote of an image that resembles nothing with a name or a unit


def outside_autocast(function: Callable) -> Callable:
    """Switch autocast off inside a function, so that what it computes in float32 stays in float32."""

    @wraps(function)
    def wrapped(*args, **kwargs):
        device = next((x.device.type for x in (*args, *kwargs.values()) if torch.is_tensor(x)), "cpu")
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return wrapped


# ---- growing ----


def linear_of(head: nn.Module) -> nn.Linear:
    """The nn.Linear inside `head`, out of the wrappers of torch.compile and DataParallel.

    Raises ValueError where weight and bias are not plain parameters: lazy layers, parametrizations, torch's pruning.
    """
    while not isinstance(head, nn.Linear):
        inner = next((getattr(head, name) for name in ("_orig_mod", "module") if hasattr(head, name)), None)
        if inner is None:
            raise ValueError(f"a head must be an nn.Linear, not {type(head).__name__}")
        head = inner
    plain = head._parameters  # what parametrizations and torch.nn.utils.prune replace is not among these
    if plain.get("weight") is None or "bias" not in plain or torch.nn.parameter.is_lazy(head.weight):
        raise ValueError(
            "the head's weight and bias must be plain parameters: remove weight norm or pruning first"
        )
    return head


def rows_of(head: nn.Linear) -> list[nn.Parameter]:
    """The parameters that have a row for each unit."""
    return [p for p in (head.weight, head.bias) if p is not None]


@torch.no_grad()
def grow_head(head: nn.Module, optimizer: torch.optim.Optimizer | None, count: int = 1) -> None:
    """Add `count` units to a linear layer, in place, in the middle of training.

    The parameters stay the same objects, so that parameter groups and hooks still hold. The old rows keep values,
    gradients and optimizer state (momentum, second moments), so that their next update is what it would have been. A
    new row has a random direction, the mean length of the old rows, no bias, and a state of zeros. Raises ValueError,
    before anything is changed, for count < 1, for a head that is not a plain linear layer (`linear_of`), and for an
    optimizer whose state is not one value for each weight (Adafactor, LBFGS).
    """
    head = linear_of(head)
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    states = {p: optimizer.state.get(p, {}) if optimizer is not None else {} for p in rows_of(head)}
    sized = [(p, v) for p in states for v in states[p].values() if torch.is_tensor(v) and v.numel() > 1]
    if isinstance(optimizer, torch.optim.LBFGS) or any(v.shape != p.shape for p, v in sized):
        raise ValueError(
            f"cannot grow what {type(optimizer).__name__} trains; use SGD, Adam, AdamW or RMSprop"
        )
    for p in rows_of(head):
        rows = p.new_zeros(count, *p.shape[1:])  # (count, D) or (count)
        if p.ndim > 1:
            length = p.norm(dim=1).mean() if len(p) else 1.0
            rows = F.normalize(torch.randn_like(rows), dim=1) * length
        for key, value in states[p].items():
            if torch.is_tensor(value) and value.shape == p.shape:
                states[p][key] = torch.cat([value, torch.zeros_like(rows, dtype=value.dtype)])
        grad, new, p.grad = p.grad, torch.cat([p.data, rows]), None
        p.data = p.data.to(
            torch.float32 if p.dtype == torch.float64 else torch.float64
        )  # autograd forgets the shape
        p.data = new
        p.grad = None if grad is None else torch.cat([grad, torch.zeros_like(rows)])
    head.out_features += count


@torch.no_grad()
def recycle_unit(head: nn.Module, optimizer: torch.optim.Optimizer | None, unit: int) -> None:
    """Reset a unit: a random direction, the mean length of the other rows, no bias, gradient and state of zeros.

    Raises IndexError for a unit that is not there, and ValueError as `grow_head` does.
    """
    head = linear_of(head)
    if not 0 <= unit < head.out_features:
        raise IndexError(f"no unit {unit} in a head of {head.out_features}")
    for p in rows_of(head):
        fresh = torch.zeros_like(p[unit])
        if p.ndim > 1:
            others = torch.arange(len(p), device=p.device) != unit
            length = p[others].norm(dim=1).mean() if others.any() else 1.0
            fresh = F.normalize(torch.randn_like(fresh), dim=0) * length
        p[unit] = fresh
        for value in (p.grad, *(optimizer.state.get(p, {}).values() if optimizer is not None else ())):
            if torch.is_tensor(value) and value.shape == p.shape:
                value[unit] = 0


@torch.no_grad()
@outside_autocast
def imprint(
    head: nn.Module,
    unit: int,
    h: Tensor,
    others: Tensor | None = None,
    tolerance: float = 0.03,
    rivals: Tensor | None = None,
) -> None:
    """Point a unit at embeddings h [n,D] of its class, so that the class can be predicted at once.

    Its row becomes normalize(mean(normalize(h))), with the mean length of the other rows (Qi, Brown & Lowe
    2018). The mean of few images lies close to everything. Given others [m,D], embeddings of images of other
    classes, the row is therefore turned to where its class differs from them (`discriminant`), and the bias
    keeps the mean logit of h, or lowers it until the unit wins at most the share `tolerance` of the others
    (or one image more, at a tie) from its rivals (bool [U], the units that answer; None: all). Without a bias
    the unit cannot be held back, so `others` is ignored. The optimizer state is left alone.
    """
    inner = linear_of(head)
    if not 0 <= unit < inner.out_features or not len(h):
        raise ValueError(
            f"imprint needs a unit in 0..{inner.out_features - 1} and at least one embedding, not {unit} and {len(h)}"
        )
    weight, bias = inner.weight, inner.bias
    rest = torch.arange(len(weight), device=weight.device) != unit  # (U)
    rivals = rest if rivals is None else rest & rivals
    length, own = (
        weight[rest].float().norm(dim=1).mean() if rest.any() else 1.0,
        F.normalize(h.float(), dim=1).mean(0),
    )  # own (D)

    def logits(x: Tensor) -> Tensor:
        return head(x.to(weight.dtype)).float()  # (n, U)

    weight[unit] = (F.normalize(own, dim=0) * length).to(weight.dtype)
    if bias is None:
        return
    bias[unit] = 0
    if others is None or not len(others) or not rivals.any():
        return
    best, kind = logits(others).masked_fill(~rivals, float("-inf")).max(1)  # (m)
    before = logits(h)[:, unit].mean()
    direction = discriminant(own, F.normalize(others.float(), dim=1), kind)
    weight[unit] = (F.normalize(direction, dim=0) * length).to(weight.dtype)
    margin = (logits(others)[:, unit] - best).quantile(1 - tolerance, interpolation="higher")
    bias[unit] = torch.minimum(before - logits(h)[:, unit].mean(), -margin)


def discriminant(own: Tensor, others: Tensor, kind: Tensor, shrinkage: float = 0.8) -> Tensor:
    """The direction [D] in which the mean embedding `own` [D] of a class differs from the others [m,D],
    relative to their spread.

    Fisher's linear discriminant (1936): solve(S, own - mean(others)), where S is the covariance of the others
    around the means of their kinds (int64 [m], >= 0), shrunk towards its mean variance because the others are
    few.
    """
    total = others.new_zeros(int(kind.max()) + 1, others.shape[1]).index_add_(0, kind, others)  # (kinds, D)
    around = others - (total / kind.bincount().clamp(min=1)[:, None])[kind]  # (m, D)
    covariance = around.T @ around / len(others)  # (D, D)
    variance = covariance.diagonal().mean().clamp(min=1e-6)
    identity = torch.eye(len(own), device=own.device)
    return torch.linalg.solve(
        (1 - shrinkage) * covariance + shrinkage * variance * identity, own - others.mean(0)
    )


# ---- owners ----


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
        place = {c: unit for unit, c in reversed(list(enumerate(self.owner)))}  # the first of several
        return torch.tensor([place.get(c, -1) for c in range(num_classes)], device=self.utility.device)

    def in_use(self, taught: Tensor) -> Tensor:
        """Which units speak: those of classes that have a label (taught: bool [C]), and the unnamed ones.
        bool [U]."""
        taught = taught.tolist()
        return torch.tensor(
            [c == UNNAMED or (c >= 0 and taught[c]) for c in self.owner], device=self.utility.device
        )

    def unnamed(self) -> list[int]:
        """The units of concepts that have no name yet."""
        return [unit for unit, c in enumerate(self.owner) if c == UNNAMED]

    def observe(self, p: Tensor) -> None:
        """Update the utilities with probabilities p [B,U] of a batch."""
        self.utility.lerp_(p.detach().mean(0), 0.01)

    def redundant(self) -> int | None:
        """A unit that may be used again: nobody's, else a mature unnamed one that is hardly ever chosen.
        Never one with a class."""
        if FREE in self.owner:
            return self.owner.index(FREE)
        idle = [u for u in self.unnamed() if self.age[u] >= self.mature]
        least = min(idle, key=lambda u: float(self.utility[u]), default=None)
        return least if least is not None and self.utility[least] < 0.1 / len(self.owner) else None

    def allocate(
        self, head: nn.Linear, optimizer: torch.optim.Optimizer | None, owner: int
    ) -> tuple[int, str]:
        """A unit for `owner`, "recycled" if there is a redundant one, else "grown". Changes the head in
        place."""
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


# ---- confusion ----


class ConfusionMonitor:
    """Finds a kind that has no unit yet: images that no label claims, look after look, and that resemble each
    other.

    An image is claimed by the labels around it (`claim`). Labels leak at random, so that the neighbourhood of
    a named kind holds them at a known rate and that of a nameless kind hardly any, however sure the softmax
    is. The known classes themselves say how few are too few (`threshold`).

    n: number of images; at_least: images that make a kind, as a share (0.2) of the images looked at per named
    class, and never fewer than 20; patience: looks in a row in which an image must be unclaimed (2);
    cooldown: looks after a find in which nothing else is found (2), so that a new unit spreads over its kind
    before the next is looked for; chance: the largest probability that randomly leaking labels avoid a named
    kind so well (0.02, asked every look)
    """

    def __init__(
        self, n: int, at_least=0.2, patience=2, cooldown=2, chance=0.02, device: torch.device | str = "cpu"
    ):
        self.at_least, self.patience, self.cooldown, self.chance = at_least, patience, cooldown, chance
        self.streak = torch.zeros(n, dtype=torch.long, device=device)  # looks in a row without a claim
        self.concept = torch.full((n,), -1, device=device)  # the unnamed unit that an image belongs to
        self.cooldown_left, self.settled = 0, False

    @outside_autocast
    def find_concept(
        self, index: Tensor, claims: Tensor, limit: float, h: Tensor, known_h: Tensor, known_y: Tensor
    ) -> Tensor | None:
        """Which of the images `index` int64 [W] are a kind without a unit, as places in `index`. Call it once
        an epoch.

        claims [W]: from `claim`, unclaimed below `limit` (`threshold`); h [W,D]: embeddings; known_h [L,D],
        known_y [L]: of labelled images, whose spread says how near each other two images of a kind are.
        Around a kind there are at most two thirds of the labels that a named one would have, and fewer than
        chance explains. None: there is none.
        """
        self.streak[index] = torch.where(claims < limit, self.streak[index] + 1, 0)
        self.cooldown_left = max(0, self.cooldown_left - 1)
        again = (self.streak[index] >= self.patience).nonzero()[:, 0]  # (A), places in index
        at_least = max(20, round(self.at_least * len(index) / max(len(known_y.unique()), 1)))
        if self.cooldown_left or len(again) < at_least or not len(known_y):
            return None
        unit, known = F.normalize(h.float(), dim=1), F.normalize(known_h.float(), dim=1)  # (W, D), (L, D)
        reach, rows = resemblance(known_h, known_y), unit[again]  # (A, D)
        # Two images are similar if their cosine exceeds reach**2, the expected cosine of two members of one
        # class.
        similar = torch.cat([(part @ rows.T > reach**2).sum(1) for part in rows.split(1000)])  # (A)
        centre = F.normalize(rows[rows @ rows[similar.argmax()] > reach**2].mean(0), dim=0)  # (D)
        near = unit @ centre > reach  # (W)
        group, found = again[near[again]], (known @ centre > reach).sum()
        expected = (near.sum() + found) * len(known) / (len(unit) + len(known))
        by_chance = torch.special.gammaincc(
            found + 1.0, expected.float()
        )  # Poisson: at most `found`, `expected` due
        if len(group) < at_least or found > 2 / 3 * expected or by_chance > self.chance:
            return None
        self.cooldown_left = self.cooldown + 1
        return group


@outside_autocast
def claim(h: Tensor, pool_h: Tensor, named: Tensor, temperature: float = 0.2) -> Tensor:
    """How far the names around an image claim it: float32 [n], near 0 where there are none, about 1 amid a
    class that has a name.

    h [n,D]: embeddings; pool_h [M,D]: of images to compare with, of which `named` (bool [M]) have a label. It
    is the density of named images over the density of all images, both by the kernel exp(cosine /
    temperature), relative to the share of named ones. NaN where there is none.
    """
    pool_h, claims = F.normalize(pool_h.float(), dim=1), []
    for part in h.split(1000):
        weight = ((F.normalize(part.float(), dim=1) @ pool_h.T - 1) / temperature).exp()  # (1000, M)
        claims.append(weight @ named.float() / weight.sum(1))
    return torch.cat(claims) / named.float().mean()


@outside_autocast
def threshold(pool_h: Tensor, named: Tensor, reject: float = 0.05, temperature: float = 0.2) -> float:
    """The claim below which an image is unknown: that of the share `reject` of the named images, each as if
    it had no label.

    pool_h [M,D], named bool [M]: as in `claim`. About that share of all images of the known classes will be
    taken for unknown.
    """
    if named.sum() < 2:
        return float("-inf")
    pool_h, weight_of, claims = F.normalize(pool_h.float(), dim=1), named.float(), []
    for part in pool_h[named].split(1000):
        weight = ((part @ pool_h.T - 1) / temperature).exp()
        claims.append((weight @ weight_of - 1) / weight.sum(1))  # its own weight is 1
    return float((torch.cat(claims) / weight_of.mean()).quantile(reject))


@outside_autocast
def resemblance(h: Tensor, y: Tensor) -> float:
    """The cosine to the mean of the others of their class that three quarters of the embeddings h [L,D] of
    classes y [L] reach.

    1, which nothing reaches, where no class has two of them.
    """
    unit = F.normalize(h.float(), dim=1)
    total = torch.zeros(int(y.max()) + 1, unit.shape[1], device=h.device).index_add_(0, y, unit)
    several = y.bincount()[y] > 1
    cosine = (unit * F.normalize(total[y] - unit, dim=1)).sum(1)[several]
    return float(cosine.quantile(0.25)) if len(cosine) else 1.0


@outside_autocast
def two_means(h: Tensor) -> tuple[float, Tensor]:
    """Split embeddings h [n,D] in two by k-means: the cosine of the two centres, and bool [n], which are
    in the second half."""
    from sklearn.cluster import KMeans

    unit = F.normalize(h.float(), dim=1)
    second = torch.from_numpy(KMeans(2, n_init=3, random_state=0).fit_predict(unit.cpu().numpy()) == 1).to(
        h.device
    )
    return float(F.cosine_similarity(unit[second].mean(0), unit[~second].mean(0), dim=0)), second


# ---- the life of a head ----


class HeadManager:
    """Opens, names, recycles and imprints the units of a head, in a network and in its EMA together.

    networks: the network, its EMA and the optimizer (or None); embed(network, index): embeddings [n,D] of
    training images; y: int64 [N], their classes or -1, read where a label is known and for the event log;
    watched: int64, a random subset of the images, in which unknown classes are looked for; classes: their
    names; owner: of each unit, see `Units`. A `pool` says what an epoch offers: bool [N] active, labelled,
    labelled_before, bool [C] taught, taught_before.
    """

    def __init__(
        self,
        networks: tuple[nn.Module, nn.Module, torch.optim.Optimizer | None],
        embed: Callable[[nn.Module, Tensor], Tensor],
        y: Tensor,
        watched: Tensor,
        classes: Sequence[str],
        owner: Sequence[int],
        seed: int = 0,
    ):
        self.network, self.ema, self.optimizer = networks
        self.embed, self.y, self.watched, self.classes, self.seed = embed, y, watched, classes, seed
        self.units, self.monitor = Units(owner, device=y.device), ConfusionMonitor(len(y), device=y.device)
        self.epoch, self.events = 0, []
        self.given: dict[
            int, str
        ] = {}  # names that a person gave to units (`python evaluate.py RUN --name UNIT=NAME`)

    def state_dict(self) -> dict:
        """Plain values and tensors."""
        return {
            "units": vars(self.units),
            "monitor": vars(self.monitor),
            "events": self.events,
            "given": self.given,
        }

    def load_state_dict(self, saved: dict) -> None:
        """The reverse, on the device of the images."""
        for name in ("units", "monitor"):
            values = {k: v.to(self.y.device) if torch.is_tensor(v) else v for k, v in saved[name].items()}
            vars(getattr(self, name)).update(values)
        self.events, self.given = saved["events"], saved["given"]

    def names(self, taught: Tensor) -> list[str | None]:
        """The name that each unit answers with: a person's, that of a class with a label (taught: bool
        [C]), or None."""
        own = [self.classes[c] if c >= 0 and taught[c] else None for c in self.units.owner]
        return [self.given.get(unit, name) for unit, name in enumerate(own)]

    def log(
        self,
        event: str,
        unit: int | None = None,
        c: int | None = None,
        count: int | None = None,
        purity: float | None = None,
    ):
        """Append a row of events.csv."""
        name = None if c is None else self.classes[c]
        self.events.append(dict(zip(EVENT, (self.epoch, event, unit, name, count, purity), strict=True)))

    @torch.no_grad()
    def logits(self, h: Tensor, taught: Tensor) -> Tensor:
        """Logits [N,U] of the EMA for embeddings h [N,D]; -inf for the units that are not in use."""
        return self.ema.head(h).masked_fill(~self.units.in_use(taught), float("-inf"))

    def predict(self, h: Tensor, taught: Tensor) -> tuple[Tensor, Tensor]:
        """For embeddings h [N,D]: the best unit among all in use, and the best class among those with a
        label. int64 [N] each."""
        owner, logits = self.units.owners(), self.logits(h, taught)
        return logits.argmax(1), owner[logits.masked_fill(owner < 0, float("-inf")).argmax(1)]

    def neighborhood(self, pool, labelled: Tensor) -> Tensor:
        """The images whose claims are computed, and the labelled ones (bool [N]) they are compared with:
        indices int64 [M]."""
        chosen = labelled.clone()
        chosen[self.watched] = True
        return (chosen & pool.active).nonzero()[:, 0]

    def discover(self, pool, h: Tensor) -> Tensor:
        """Give each kind that no label claims, epoch after epoch, a unit without a name; review the units
        there are.

        As long as labels leak, a unit is provisional: its images teach no name, and when the labels have
        settled, all is looked at afresh. h: unit embeddings [N,D] by the EMA. Returns int64 [N]: the unnamed
        unit that an image votes for, UNKNOWN, or -1 for no vote.
        """
        votes = torch.full_like(self.y, -1)
        if not pool.labelled_before.any():
            return votes
        monitor, concept = self.monitor, self.monitor.concept
        index = self.neighborhood(pool, pool.labelled_before)  # (M)
        near_h, labelled, watched = (
            h[index],
            pool.labelled_before[index],
            index[~pool.labelled[index]],
        )  # (M, D) (M) (W)
        claims, limit = claim(h[watched], near_h, labelled), threshold(near_h, labelled)  # (W)
        unclaimed, known_h, known_y = (
            claims < limit,
            near_h[labelled],
            self.y[index[labelled]],
        )  # (W), (L, D), (L)

        self.units.age = [age + 1 for age in self.units.age]
        before, monitor.settled = monitor.settled, not (pool.labelled & ~pool.labelled_before).any()
        for unit in self.units.unnamed() if monitor.settled and not before else ():
            if unit not in self.given:
                self.release(unit)
        self.join_units(watched, unclaimed, h, resemblance(known_h, known_y))
        self.review_units(pool, watched[~unclaimed], h)
        claims[concept[watched] >= 0] = math.inf
        group = monitor.find_concept(watched, claims, limit, h[watched], known_h, known_y)
        if group is not None:
            surest = watched[
                group[claims[group].argsort()[: (len(group) + 1) // 2]]
            ]  # the half that is claimed least
            unit, _ = self.open_unit(pool, UNNAMED, surest)
            concept[watched[group]] = unit
            self.log_unit("opened", unit, surest)
        member = concept[watched] if monitor.settled else torch.full_like(watched, -1)
        votes[watched] = torch.where(unclaimed & (member < 0), UNKNOWN, member)
        return votes

    def join_units(self, watched: Tensor, unclaimed: Tensor, h: Tensor, reach: float) -> None:
        """Assign the unclaimed of the watched images to the unnamed unit whose centre is nearest, if its
        cosine is above `reach`."""
        concept, unnamed = self.monitor.concept, self.units.unnamed()
        centres = {u: F.normalize(h[concept == u].mean(0), dim=0) for u in unnamed if (concept == u).any()}
        concept.fill_(-1)
        if centres:
            units, unknown = torch.tensor(list(centres), device=h.device), watched[unclaimed]
            cosine, nearest = (h[unknown] @ torch.stack(list(centres.values())).T).max(1)  # (unknown images)
            concept[unknown] = torch.where(cosine > reach, units[nearest], -1)
        for unit in unnamed:
            if (
                concept == unit
            ).sum() < 10 and unit not in self.given:  # labels have come to claim its images
                self.release(unit)

    def review_units(self, pool, claimed: Tensor, h: Tensor) -> None:
        """Merge two unnamed units that hold one kind, and split one that holds two.

        The measure is how far apart k-means puts the two halves of a known class: a unit is split if its
        halves are farther apart than those of any known class, and two units are merged if they are nearer to
        each other than is usual. claimed: int64, images that belong to known classes, by prediction.
        """
        concept, guess = self.monitor.concept, self.predict(h[claimed], pool.taught_before)[1]
        parts = [h[claimed[guess == c]] for c in guess.unique()]
        usual = torch.tensor([two_means(part)[0] for part in parts if len(part) >= 20])
        if not len(usual):
            return
        for a, b in itertools.combinations(self.units.unnamed(), 2):
            here, there = concept == a, concept == b
            if (
                here.any()
                and there.any()
                and F.cosine_similarity(h[here].mean(0), h[there].mean(0), dim=0) > usual.median()
            ):
                kept, gone = (
                    (a, b) if (a in self.given, here.sum()) >= (b in self.given, there.sum()) else (b, a)
                )
                if gone not in self.given:
                    self.log_unit("merged", gone, (concept == gone).nonzero()[:, 0])
                    concept[concept == gone] = kept
                    self.units.owner[gone] = FREE
        for unit in self.units.unnamed():
            index = (concept == unit).nonzero()[:, 0]
            if len(index) < 40 or unit in self.given:
                continue
            cosine, second = two_means(h[index])
            second = second if second.sum() <= len(index) / 2 else ~second
            if cosine < usual.min() and second.sum() >= 20:
                new, _ = self.open_unit(pool, UNNAMED, index[second])
                concept[index[second]] = new
                self.log_unit("split", new, index[second])
                self.imprint_ema(pool, unit, index[~second])

    def log_unit(self, event: str, unit: int, index: Tensor) -> None:
        """An event of an unnamed unit with the images `index`, and what they truly are where that is known
        (for the log only)."""
        true = self.y[index][self.y[index] >= 0].bincount()
        known = len(true) > 0
        self.log(
            event,
            unit,
            int(true.argmax()) if known else None,
            len(index),
            float(true.max() / true.sum()) if known else None,
        )

    def release(self, unit: int) -> None:
        """The unit stands for nothing any more and is the first to be used again."""
        self.units.owner[unit] = FREE
        self.monitor.concept[self.monitor.concept == unit] = -1
        self.log("released", unit)

    def open_unit(self, pool, owner: int, index: Tensor) -> tuple[int, str]:
        """A unit for `owner`, imprinted with the images `index`; "grown" or "recycled"."""
        unit, how = self.units.allocate(self.network.head, self.optimizer, owner)
        self.monitor.concept[self.monitor.concept == unit] = -1  # what it stood for before
        if how == "grown":
            grow_head(self.ema.head, None)
        for name, parameter in self.network.head.named_parameters():
            self.ema.head.get_parameter(name).data[unit] = parameter.data[unit]
        imprint(self.network.head, unit, self.embed(self.network, index))
        self.imprint_ema(pool, unit, index)
        return unit, how

    def imprint_ema(self, pool, unit: int, index: Tensor) -> None:
        """Only the EMA, which answers, is kept apart from the other classes: that bias would hold the
        network's own unit back."""
        others = (pool.labelled_before & (self.y != self.units.owner[unit])).nonzero()[:, 0]
        order = torch.randperm(len(others), generator=torch.Generator().manual_seed(self.seed))[:1000]
        other_h = self.embed(self.ema, others[order.to(others.device)]) if len(others) else None
        rivals = self.units.in_use(pool.taught_before)
        imprint(self.ema.head, unit, self.embed(self.ema, index), other_h, rivals=rivals)

    def name_class(self, pool, c: int, votes: Tensor) -> None:
        """Give class c, whose first labels have come, a unit.

        The unnamed unit that most of its labelled images fall into; else the one it had from the start; else
        a recycled or new one.
        """
        units, index = self.units, (pool.labelled & (self.y == c)).nonzero()[:, 0]
        with torch.no_grad():
            logits = (
                self.ema.head(self.embed(self.ema, index)) - self.ema.head.bias
            )  # without bias: a young unit's is lowered
        best = logits.masked_fill(~units.in_use(pool.taught_before), float("-inf")).argmax(1)
        count = best.bincount(minlength=len(units.owner))
        unit, own = int(count.argmax()), units.owner.index(c) if c in units.owner else None
        if units.owner[unit] == UNNAMED:
            if own is not None:
                self.release(own)
            units.owner[unit], units.age[unit] = c, 0
            self.log("named", unit, c, len(index), float(count[unit] / len(index)))
            members = (votes == unit).nonzero()[:, 0]
            self.imprint_ema(pool, unit, torch.cat([index, members]))
        elif own is not None:
            imprint(self.network.head, own, self.embed(self.network, index))
            self.imprint_ema(pool, own, index)
        else:
            unit, how = self.open_unit(pool, c, index)
            votes[votes == unit] = UNKNOWN  # what voted for it when it was another's
            self.log(how, unit, c, len(index))


# ---- pruning ----


def prunable(model: nn.Module) -> dict[str, Tensor]:
    """The weights that may be pruned, by name: those of linear and convolutional layers and the inputs of
    attention.

    Not biases, norms, layer scales, class tokens and position embeddings, of which some are small without
    being useless.
    """
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            if module._parameters.get("weight") is None:
                raise ValueError(
                    f"{name or 'the model'}: remove its weight norm or torch's own pruning before pruning it"
                )
            weights[f"{name}.weight".removeprefix(".")] = module.weight
        elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            weights[f"{name}.in_proj_weight".removeprefix(".")] = module.in_proj_weight
    return weights


def smallest(size: Tensor, share: float) -> Tensor:
    """Which of the values [n] belong to the smallest round(share n): bool [n]. Raises ValueError for a
    share outside 0..1."""
    if not 0 <= share <= 1:
        raise ValueError(f"sparsity must be in 0..1, not {share}")
    chosen = torch.zeros(len(size), dtype=torch.bool, device=size.device)
    chosen[size.topk(round(share * len(size)), largest=False, sorted=False).indices] = True
    return chosen


@torch.no_grad()
def prune_smallest(model: nn.Module, sparsity: float) -> dict[str, Tensor]:
    """Zero the fraction `sparsity` (0..1) of all prunable weights that is smallest in magnitude, over all
    layers together.

    Returns masks {parameter name: bool, True = kept} for `apply_masks`. Weights that are zero already are the
    first to go, so a rising sparsity only ever adds to what is pruned. Raises ValueError outside 0..1.
    """
    weights = prunable(model)
    gone = smallest(
        torch.cat([w.abs().flatten() for w in weights.values()]) if weights else torch.zeros(0), sparsity
    )
    parts = gone.split([w.numel() for w in weights.values()]) if weights else ()
    masks = {name: ~part.view_as(w) for (name, w), part in zip(weights.items(), parts, strict=True)}
    apply_masks(model, masks)
    return masks


def filter_layers(model: nn.Module) -> list[tuple[str, str]]:
    """The convolutions of a chain conv, norm, ReLU, ..., each with its batch norm, by name; not the last,
    whose filters are the output."""
    if not isinstance(model, nn.Sequential):
        raise ValueError(
            "whole filters can be pruned in a plain chain of layers only (cnn, vgg-small, vgg11, vgg16)"
        )
    names = [
        name for name, module in model.named_children() if isinstance(module, nn.Conv2d | nn.BatchNorm2d)
    ]
    return list(zip(names[::2], names[1::2], strict=True))[:-1]


@torch.no_grad()
def prune_filters(model: nn.Module, share: float) -> dict[str, Tensor]:
    """Zero the fraction `share` (0..1) of the filters of a chain of convolutions with the smallest norm, with
    their batch norm.

    Those of the last layer, which are the embedding, are left alone and do not count. Norms are compared over
    all layers together, each relative to the mean of its layer, whose largest filter always stays. A dead
    filter's output is exactly zero (its batch norm's scale and shift are masked too), so that `model.compact`
    can remove it. Returns masks for `apply_masks`. Raises ValueError outside 0..1 and for a model that is not
    a chain.
    """
    layers = filter_layers(model)
    norms = [model.get_submodule(conv).weight.flatten(1).norm(dim=1) for conv, _ in layers]
    relative = [norm / norm.mean().clamp(min=1e-12) for norm in norms]
    gone = (
        smallest(torch.cat(relative) if relative else torch.zeros(0), share).split(
            [len(norm) for norm in norms]
        )
        if layers
        else ()
    )
    masks = {}
    for (conv, norm), size, dead in zip(layers, norms, gone, strict=True):
        kept = ~dead
        kept[size.argmax()] = True
        masks[f"{conv}.weight"] = kept.view(-1, 1, 1, 1).expand_as(model.get_submodule(conv).weight)
        masks[f"{norm}.weight"] = masks[f"{norm}.bias"] = kept
    apply_masks(model, masks)
    return masks


def prune(model: nn.Module, sparsity: float, filters: float, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """Prune a share of whole filters and then the smallest weights, dead filters included; the masks, no
    wider than `before`."""
    masks = dict(before)
    for new in (prune_filters(model, filters) if filters else {}, prune_smallest(model, sparsity)):
        for name, mask in new.items():
            if name in masks:
                mask = mask.clone()
                mask[: len(masks[name])] &= masks[name]
            masks[name] = mask
    return masks


@torch.no_grad()
def apply_masks(model: nn.Module, masks: dict[str, Tensor]) -> None:
    """Zero the weights that the masks do not keep. Rows that a layer has grown since are kept.

    Raises ValueError, before anything is changed, for a mask that fits no parameter.
    """
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        p = parameters.get(name)
        if p is None or p.ndim != mask.ndim or p.shape[1:] != mask.shape[1:] or len(p) < len(mask):
            raise ValueError(f"the mask '{name}' {tuple(mask.shape)} fits no parameter of the model")
    for name, mask in masks.items():
        parameters[name][: len(mask)].mul_(mask)


def sparsity_of(model: nn.Module) -> float:
    """The fraction of the prunable weights that is exactly zero, 0..1."""
    weights = prunable(model).values()
    return sum(int((w == 0).sum()) for w in weights) / max(sum(w.numel() for w in weights), 1)
