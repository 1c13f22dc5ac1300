"""A head that discovers, names, remembers and recycles its units, in a network that is pruned while it grows.

    claims, limit = claim(h, pool_h, named), threshold(pool_h, named)    # labels nearby?
    group = monitor.find_concept(index, claims, limit, h, known_h, known_y)    # alike
    unit, how = units.allocate(head, optimizer, UNNAMED)    # recycled or new
    imprint(head, unit, h, others)    # point it at them
    masks = prune_smallest(encoder, 0.8)    # then apply_masks

Sources: imprinting (arXiv 1712.07136); Fisher's discriminant (1936); pruning (arXiv 1710.01878, 1608.08710);
utility (Dohare et al. 2024, Nature 632).
"""

import itertools
import math
from collections.abc import Callable
from copy import copy
from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

EVENT = ("epoch", "event", "unit", "class", "count", "purity")  # columns of events.csv
UNNAMED, FREE = -1, -2  # owners that are no class: a kind without a name; nothing
UNKNOWN = -3  # vote of an image that no unit explains


def outside_autocast(function: Callable) -> Callable:
    """Switch autocast and gradients off inside a function: its float32 stays float32."""

    @wraps(function)
    def wrapped(*args, **kwargs):
        device = next((x.device.type for x in (*args, *kwargs.values()) if torch.is_tensor(x)), "cpu")
        with torch.autocast(device, enabled=False), torch.no_grad():
            return function(*args, **kwargs)

    return wrapped


# ---- growing ----


def linear_of(head: nn.Module) -> nn.Linear:
    """The plain nn.Linear in `head`, compiled, DataParallel or not; else ValueError."""
    while hasattr(head, "_orig_mod") or isinstance(head, nn.DataParallel):
        head = getattr(head, "_orig_mod", None) or head.module
    plain = head._parameters if isinstance(head, nn.Linear) else {}  # not what torch's pruning replaces
    if plain.get("weight") is None or "bias" not in plain or is_lazy(plain["weight"]):
        raise ValueError(f"the head must be a plain nn.Linear, unpruned, no weight norm; not {type(head)}")
    return head


def states_of(head: nn.Linear, optimizer: Optimizer | None) -> dict:
    """The optimizer state of weight and bias; ValueError if not one value for each weight."""
    known = optimizer.state if optimizer else {}
    states = {p: known.get(p, {}) for p in (head.weight, head.bias) if p is not None}
    sized = [(p, v) for p in states for v in states[p].values() if torch.is_tensor(v) and v.numel() > 1]
    odd = type(optimizer).__name__ in ("LBFGS", "Rprop", "Adafactor")
    if odd or any(v.shape != p.shape for p, v in sized):
        raise ValueError(f"units cannot change under {type(optimizer).__name__}; use SGD, Adam or AdamW")
    return states


def head_logits(head: nn.Module, h: Tensor) -> Tensor:
    """Logits float32 [n,U] of embeddings h [n,D] of any dtype."""
    return head(h.to(linear_of(head).weight.dtype)).float()


def random_rows(p: Tensor, count: int, like: Tensor) -> Tensor:
    """Rows for p: [count,D] of random directions and the mean length of `like`, or zeros [count]."""
    rows = p.new_zeros(count, *p.shape[1:])
    if p.ndim > 1:
        rows = F.normalize(torch.randn_like(rows), dim=1) * (like.norm(dim=1).mean() if len(like) else 1.0)
    return rows


@torch.no_grad()
def grow_head(head: nn.Module, optimizer: Optimizer | None, count: int = 1) -> None:
    """Add `count` units to a linear layer, in place, between two training steps.

    The parameters stay the same objects; old rows keep values, gradients and optimizer state. New ones have a
    random direction, the mean length of the others, no bias and a state of zeros. ValueError before any
    change: count < 1, no plain nn.Linear, an optimizer of other state (Adafactor, LBFGS, Rprop).
    """
    head = linear_of(head)
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    for p, state in states_of(head, optimizer).items():
        rows = random_rows(p, count, p)  # (count, D) or (count)
        for key, value in state.items():
            if torch.is_tensor(value) and value.shape == p.shape:
                state[key] = torch.cat([value, value.new_zeros(rows.shape)])
        grad, new, p.grad = p.grad, torch.cat([p.data, rows]), None
        # Autograd keeps the old shape until the dtype changes: to another, and back.
        p.data = p.data.to(torch.float16 if p.dtype == torch.float32 else torch.float32)
        p.data = new
        p.grad = None if grad is None else torch.cat([grad, torch.zeros_like(rows)])
    head.out_features += count


@torch.no_grad()
def recycle_unit(head: nn.Module, optimizer: Optimizer | None, unit: int) -> None:
    """Reset a unit as if it were new. IndexError if there is no such unit, ValueError as `grow_head`."""
    head = linear_of(head)
    states = states_of(head, optimizer)
    if not 0 <= unit < head.out_features:
        raise IndexError(f"no unit {unit} in a head of {head.out_features}")
    for p, state in states.items():
        p[unit] = random_rows(p, 1, torch.cat([p[:unit], p[unit + 1 :]]))[0]
        for value in (p.grad, *state.values()):
            if torch.is_tensor(value) and value.shape == p.shape:
                value[unit] = 0


@outside_autocast
def imprint(head: nn.Module, unit: int, h: Tensor, others=None, tolerance: float = 0.03, rivals=None) -> None:
    """Point a unit at embeddings h [n,D] of its class, which can then be predicted at once.

    Its row becomes normalize(mean(normalize(h))), of the mean length of the others. Given others [m,D], of
    other classes, it turns to where its class differs from them (`discriminant`), and the bias keeps the mean
    logit of h, or is lowered until the unit wins at most the share `tolerance` of the others from its
    rivals (bool [U], None: all). Without a bias, others are ignored. Raises ValueError before any change.
    """
    inner = linear_of(head)
    weight, bias = inner.weight, inner.bias  # (U, D), (U)
    (units, width), same = weight.shape, h if others is None else others
    fits = 0 <= unit < units and len(h) and h.shape[1:] == same.shape[1:] == (width,) and 0 <= tolerance <= 1
    if not fits or rivals is not None and len(rivals) != units:
        raise ValueError(f"imprint: h, others [n,{width}], rivals [{units}], unit < {units}, tolerance 0..1")
    rest = torch.arange(units, device=weight.device) != unit  # (U)
    rivals = rest if rivals is None else rest & rivals.bool()
    length = weight[rest].float().norm(dim=1).mean() if rest.any() else 1.0
    own = F.normalize(h.float(), dim=1).mean(0)
    weight[unit] = F.normalize(own, dim=0) * length
    if bias is None:
        return
    bias[unit] = 0
    if others is None or not len(others) or not rivals.any():
        return
    best, kind = head_logits(head, others).masked_fill(~rivals, -math.inf).max(1)  # (m), (m)
    before = head_logits(head, h)[:, unit].mean()
    direction = discriminant(own, F.normalize(others.float(), dim=1), kind)
    weight[unit] = F.normalize(direction, dim=0) * length
    margin = (head_logits(head, others)[:, unit] - best).quantile(1 - tolerance, interpolation="higher")
    bias[unit] = torch.minimum(before - head_logits(head, h)[:, unit].mean(), -margin - 1e-4)


def sums(h: Tensor, group: Tensor, groups: int) -> Tensor:
    """Sum of the rows of h [n,D] by group (int64 [n], 0..groups-1): [groups,D]."""
    return h.new_zeros(groups, h.shape[1]).index_add_(0, group, h)


@outside_autocast
def discriminant(own: Tensor, others: Tensor, kind: Tensor, shrinkage: float = 0.8) -> Tensor:
    """The direction float32 [D] in which the mean `own` [D] of a class differs most from the others [m,D].

    Fisher's: solve(S, own - mean(others)); S: covariance of the others around the means of their kinds
    (int64 [m]), shrunk towards its mean variance because they are few.
    """
    own, others = own.float(), others.float()
    count = kind.bincount()
    around = others - (sums(others, kind, len(count)) / count.clamp(min=1)[:, None])[kind]  # (m, D)
    covariance = around.T @ around / len(others)  # (D, D)
    target = covariance.diagonal().mean().clamp(min=1e-6) * torch.eye(len(own), device=own.device)  # (D, D)
    return torch.linalg.solve((1 - shrinkage) * covariance + shrinkage * target, own - others.mean(0))


# ---- owners ----


class Units:
    """What each unit of a head stands for: a class, a concept without a name, or nothing.

    owner: the class of each unit, or UNNAMED, or FREE
    given: names that a person gave to units
    utility [U]: running mean (0.99) of a unit's probability
    age: epochs since a unit got its owner; below `mature` it is not redundant, nor merged
    """

    def __init__(self, owner, mature=3, device="cpu"):
        self.owner, self.age, self.mature = list(owner), [mature] * len(owner), mature
        self.given: dict[int, str] = {}
        self.utility = torch.full((len(self.owner),), 1 / max(len(self.owner), 1), device=device)

    def of_classes(self, num_classes: int) -> Tensor:
        """The unit of each class, -1 for a class that has none: int64 [num_classes]."""
        place = [self.owner.index(c) if c in self.owner else -1 for c in range(num_classes)]
        return torch.tensor(place, device=self.utility.device)

    def in_use(self, taught: Tensor) -> Tensor:
        """Which units answer, bool [U]: the unnamed and those of taught (bool [C]) classes."""
        taught = taught.tolist()
        answering = [c == UNNAMED or (c >= 0 and taught[c]) for c in self.owner]
        return torch.tensor(answering, device=self.utility.device)

    def unnamed(self) -> list[int]:
        """The units without a class."""
        return [unit for unit, c in enumerate(self.owner) if c == UNNAMED]

    def observe(self, p: Tensor) -> None:
        """Update the utilities with probabilities p [B,U] of a batch."""
        self.utility.lerp_(p.detach().float().mean(0), 0.01)

    def redundant(self) -> int | None:
        """A unit to use again: nobody's, else a mature unnamed one hardly ever chosen; or None."""
        able = [u for u, c in enumerate(self.owner) if c < 0 and u not in self.given]
        free = [u for u in able if self.owner[u] == FREE]
        idle = [u for u in able if self.age[u] >= self.mature and self.utility[u] < 0.1 / len(self.owner)]
        return min(free or idle, key=lambda u: self.utility[u], default=None)

    def allocate(self, head: nn.Module, optimizer: Optimizer | None, owner: int) -> tuple[int, str]:
        """A unit of `head` for `owner`: "recycled" if one is redundant, else "grown", in place."""
        unit, how = self.redundant(), "recycled"
        if unit is not None:
            recycle_unit(head, optimizer, unit)
        else:
            unit, how = len(self.owner), "grown"
            grow_head(head, optimizer)
            self.owner.append(owner)
            self.age.append(0)
            self.utility = F.pad(self.utility, (0, 1))
        self.owner[unit], self.age[unit], self.utility[unit] = owner, 0, 1 / len(self.owner)
        return unit, how


# ---- confusion ----


class ConfusionMonitor:
    """Finds a kind without a unit: images that stay unclaimed for epochs and resemble each other.

    n: number of images; at_least: share of a class's images that makes a kind (20 or more); patience: epochs
    in a row without a claim; cooldown: epochs after a find; chance: largest probability of so few labels if
    the kind were named, 20 times that until `settled`
    """

    def __init__(self, n: int, at_least=0.2, patience=2, cooldown=2, chance=0.0002, device="cpu"):
        self.at_least, self.patience, self.cooldown, self.chance = at_least, patience, cooldown, chance
        self.streak = torch.zeros(n, dtype=torch.long, device=device)  # epochs without a claim
        self.concept = torch.full((n,), -1, device=device)  # the unnamed unit of an image
        self.cooldown_left, self.settled = 0, False

    @outside_autocast
    def find_concept(self, index: Tensor, claims, limit: float, h, known_h, known_y) -> Tensor | None:
        """Places in `index` int64 [W] of the images of one kind without a unit, or None; once an epoch.

        claims [W]: unclaimed below `limit`, see `claim`, `threshold`; h [W,D]: embeddings; known_h [L,D],
        known_y [L]: labelled images, whose spread says how near images of a kind are. A kind is new if its
        images have at most 2/3 of the labels expected at the named classes' rate, and the Poisson probability
        of so few is at most `chance`.
        """
        self.streak[index] = torch.where(claims < limit, self.streak[index] + 1, 0)
        self.cooldown_left = max(0, self.cooldown_left - 1)
        again = (self.streak[index] >= self.patience).nonzero()[:, 0]  # (A)
        if self.cooldown_left or not len(known_y):
            return None
        h, known = (F.normalize(x.float(), dim=1) for x in (h, known_h))  # (W, D), (L, D)
        reach, chance = resemblance(known_h, known_y), self.chance * (1 if self.settled else 20)
        classes = F.normalize(sums(known, known_y, int(known_y.max()) + 1), dim=1)
        named = len(known) + ((h @ classes.T).amax(1) > reach**2).sum()  # images of named classes
        at_least = max(20, round(self.at_least * int(named) / len(known_y.unique())))

        def around(x: Tensor, centre: Tensor) -> Tensor:
            cosine = x @ centre
            return (cosine > radius) & (cosine > (x @ classes.T).amax(1))  # and no class more

        # The cosine of two images of a class is about reach**2; where kinds overlap, that is too wide.
        for radius, rest in (reach**2, again), (reach, again):
            while len(rest):
                rows = h[rest]
                similar = torch.cat([(part @ rows.T > radius).sum(1) for part in rows.split(1000)])  # (A)
                if similar.max() < at_least:
                    break
                alike = rows @ rows[similar.argmax()] > radius  # (A)
                inside = around(rows, F.normalize(rows[alike].mean(0), dim=0))
                centre = F.normalize(rows[inside].mean(0), dim=0)
                near, labels = around(h, centre) & claims.isfinite(), around(known, centre).sum()  # (W)
                expected = (near.sum() + labels) * len(known) / named
                by_chance = torch.special.gammaincc(labels + 1.0, expected)  # Poisson: `labels` or fewer
                group = rest[near[rest]]
                group = group[h[group] @ centre > reach]  # (G)
                if len(group) >= at_least and labels <= 2 / 3 * expected and by_chance <= chance:
                    self.cooldown_left = self.cooldown + 1
                    return group
                rest = rest[~(alike | (rows @ centre > radius))]
        return None


@outside_autocast
def claim(h: Tensor, pool_h: Tensor, named: Tensor, temperature: float = 0.2, own: float = 0.0) -> Tensor:
    """How far labels around an image claim it: float32 [n], 0 without any, about 1 in a labelled class.

    The density of named images over that of all, by the kernel exp(cosine / temperature), relative to their
    share. h [n,D]: embeddings; pool_h [M,D]: to compare with, `named` (bool [M]) or not. NaN if none is.
    own: weight to leave out, 1 of an image itself.
    """
    if named.dtype != torch.bool or len(named) != len(pool_h) or not temperature > 0:
        raise ValueError(f"named must be bool [{len(pool_h)}] and temperature above 0")
    pool_h, weight_of, claims = F.normalize(pool_h.float(), dim=1), named.float(), []  # (M, D), (M)
    for part in h.split(1000):
        w = ((F.normalize(part.float(), dim=1) @ pool_h.T - 1) / temperature).exp()  # (n, M)
        claims.append((w @ weight_of - own) / w.sum(1))
    return torch.cat(claims) / weight_of.mean()


def threshold(pool_h: Tensor, named: Tensor, reject: float = 0.05, temperature: float = 0.2) -> float:
    """The claim below which an image is unknown: quantile `reject` of the named ones; -inf without two.

    Each is asked as if it had no label.
    """
    claims = claim(pool_h[named], pool_h, named, temperature, own=1)
    return float(claims.quantile(reject)) if len(claims) > 1 else -math.inf


@outside_autocast
def resemblance(h: Tensor, y: Tensor) -> float:
    """The cosine to the mean of its class's other images that three quarters of the images reach.

    h [L,D]: embeddings; y int64 [L]: classes. 1, which nothing reaches, if no class has two.
    """
    h = F.normalize(h.float(), dim=1)
    count = y.bincount()  # (classes)
    others = sums(h, y, len(count))[y] - h  # (L, D)
    cosine = (h * F.normalize(others, dim=1)).sum(1)[count[y] > 1]
    return float(cosine.quantile(0.25)) if len(cosine) else 1.0


@outside_autocast
def separation(a: Tensor, b: Tensor) -> float:
    """How far groups [n,D] and [m,D] are apart on the line between their means, in standard deviations.

    Ashman, Bird & Zepf 1994 (arXiv astro-ph/9408030). Halves of one kind are 3 to 4 apart.
    """
    a, b = a.float(), b.float()
    line = a.mean(0) - b.mean(0)
    spread = sum(((x - x.mean(0)) @ line).square().mean() for x in (a, b)) / 2
    return float(line @ line / spread.sqrt())


@outside_autocast
def two_means(h: Tensor) -> tuple[float, Tensor]:
    """Split embeddings h [n,D] by k-means: the separation of the halves; the smaller one, bool [n]."""
    from sklearn.cluster import KMeans

    h = F.normalize(h.float(), dim=1)
    half = KMeans(2, n_init=3, random_state=0).fit_predict(h.cpu().numpy())
    second = torch.from_numpy(half == (half.mean() <= 0.5)).to(h.device)
    return separation(h[second], h[~second]), second


# ---- the life of a head ----


class HeadManager:
    """Opens, names, recycles and imprints units in the heads of a network and its EMA together.

    networks: the network, its EMA, each with a `head`, and the optimizer or None; embed(network, index):
    embeddings [n,D] of training images; y: int64 [N], classes or -1; watched: int64, images in which to look
    for kinds; classes: names; owner: see `Units`. A `pool` is what an epoch offers: bool [N] active,
    labelled, labelled_before, bool [C] taught, taught_before.
    """

    def __init__(self, networks: tuple, embed: Callable, y: Tensor, watched: Tensor, classes, owner, seed=0):
        self.network, self.ema, self.optimizer = networks
        self.embed, self.y, self.watched, self.classes, self.seed = embed, y, watched, classes, seed
        self.units, self.monitor = Units(owner, device=y.device), ConfusionMonitor(len(y), device=y.device)
        self.epoch, self.events, self.given, self.reach = 0, [], self.units.given, 1.0
        self.final = y < -1  # set later: images labelled at last
        if any(linear_of(n.head).out_features != len(owner) for n in networks[:2]):
            raise ValueError("owner must have an entry for each unit")

    def state_dict(self) -> dict:
        """Plain values and tensors."""
        parts = {"units": vars(self.units), "monitor": vars(self.monitor)}
        return parts | {"events": self.events, "given": self.given}

    def load_state_dict(self, saved: dict) -> None:
        """The reverse."""
        for own, values in ((self.units, saved["units"]), (self.monitor, saved["monitor"])):
            for key, v in values.items():
                setattr(own, key, v.to(self.y.device, copy=True) if torch.is_tensor(v) else copy(v))
        self.events, self.given = list(saved["events"]), dict(saved["given"])
        self.units.given = self.given

    def names(self, taught: Tensor) -> list[str | None]:
        """The name of each unit: a person's, that of its class if it is taught (bool [C]), or None."""
        own = [self.classes[c] if c >= 0 and taught[c] else None for c in self.units.owner]
        return [self.given.get(unit, name) for unit, name in enumerate(own)]

    def answered(self, taught: Tensor) -> Tensor:
        """The taught (bool [C]) class whose name each unit has, also a person's, or C + unit: int64 [U]."""
        place = {self.classes[c]: c for c in taught.nonzero()[:, 0].tolist()}
        found = [place.get(name, len(taught) + unit) for unit, name in enumerate(self.names(taught))]
        return torch.tensor(found, device=self.y.device)

    def log(self, event: str, unit=None, c=None, count=None, purity=None) -> None:
        """Append a row of events.csv; c: the class."""
        row = (self.epoch, event, unit, None if c is None else self.classes[c], count, purity)
        self.events.append(dict(zip(EVENT, row, strict=True)))

    @outside_autocast
    def logits(self, h: Tensor, taught: Tensor) -> Tensor:
        """Logits [N,U] of the EMA for embeddings h [N,D]; -inf for the units that are not in use."""
        return head_logits(self.ema.head, h).masked_fill(~self.units.in_use(taught), -math.inf)

    def probabilities(self, h: Tensor, taught: Tensor) -> Tensor:
        """For h [N,D]: of each class, by all units of its name, then of each unit without one: [N,C+U]."""
        p = self.logits(h, taught).softmax(1).T  # (U, N)
        return sums(p, self.answered(taught), len(taught) + len(p)).T

    def predict(self, h: Tensor, taught: Tensor) -> tuple[Tensor, Tensor]:
        """For embeddings h [N,D]: the best unit in use and the best class, int64 [N]."""
        p = self.probabilities(h, taught)[:, : len(taught)]
        return self.logits(h, taught).argmax(1), p.argmax(1)

    def neighborhood(self, pool, labelled: Tensor) -> Tensor:
        """Indices int64 [M] of active images that are watched or labelled (bool [N])."""
        return (labelled.index_fill(0, self.watched, True) & pool.active).nonzero()[:, 0]

    def lacks_labels(self, pool) -> bool:
        """Whether a taught class has no label, as after --from: others would claim its images."""
        count = self.y[pool.labelled].bincount(minlength=len(pool.taught))
        return bool((pool.taught & (count == 0)).any())

    @outside_autocast
    def discover(self, pool, h: Tensor) -> Tensor:
        """Give each kind that no label claims, epoch after epoch, a unit without a name; review these units.

        While labels leak, units are provisional: no image is trained towards them. Then the search restarts.
        h: unit embeddings [N,D] by the EMA. Returns int64 [N]: the unnamed unit an image votes for, UNKNOWN
        (until these units are old), or -1.
        """
        votes, h = torch.full_like(self.y, -1), h.float()
        if not (pool.labelled_before & pool.active).any():
            return votes
        monitor, concept = self.monitor, self.monitor.concept
        index = self.neighborhood(pool, pool.labelled_before)  # (M)
        near_h, labelled = h[index], pool.labelled_before[index]  # (M, D), (M)
        known_h, known_y = near_h[labelled], self.y[index[labelled]]  # (L, D), (L)
        watched = index[~pool.labelled[index]]  # (W)
        claims, limit = claim(h[watched], near_h, labelled), threshold(near_h, labelled)  # (W)
        unclaimed = claims < limit

        self.units.age = [age + 1 for age in self.units.age]
        leaking = pool.taught_before[self.y[self.final & ~pool.labelled_before]].any()  # more to come
        if not (leaking or monitor.settled):
            for unit in sorted({*self.units.unnamed()} - {*self.given}):  # provisional until now
                monitor.streak[concept == unit], monitor.cooldown_left = monitor.patience, 0
                self.release(unit)
        monitor.settled = not leaking
        self.reach = resemblance(known_h, known_y)
        self.join_units(watched, unclaimed, h)
        self.review_units(pool, watched[~unclaimed], h)
        claims[concept[watched] >= 0] = math.inf
        group = monitor.find_concept(watched, claims, limit, h[watched], known_h, known_y)
        if group is not None:
            members = watched[group[claims[group].argsort()]]
            surest = members[: (len(members) + 1) // 2]
            unit, _ = self.open_unit(pool, UNNAMED, surest)
            concept[members] = unit
            self.log_unit("opened", unit, surest)
        ages = [self.units.age[unit] for unit in self.units.unnamed()]
        if not monitor.settled or min(ages, default=0) <= 4 * monitor.cooldown + 2:
            votes[watched[unclaimed]] = UNKNOWN
        return torch.where(concept < 0, votes, concept) if monitor.settled else votes

    def centres(self, h: Tensor, member: Tensor) -> Tensor:
        """Normalized means [U,D] of h [N,D] over each unit's images (int64 [N] or -1); zero without any."""
        return F.normalize(sums(h, member + 1, len(self.units.owner) + 1)[1:], dim=1)

    def join_units(self, watched: Tensor, unclaimed: Tensor, h: Tensor) -> None:
        """Move the unclaimed watched images [W] to the nearest unnamed unit above cosine `reach`."""
        concept, unknown = self.monitor.concept, watched[unclaimed]  # (N), (V)
        cosine, nearest = (h[unknown] @ self.centres(h, concept).T).max(1)
        concept.fill_(-1)
        concept[unknown] = torch.where(cosine > max(self.reach, 0), nearest, -1)
        for unit in self.units.unnamed():
            if (concept == unit).sum() < 10:  # labels claim its images
                self.release(unit)

    def review_units(self, pool, claimed: Tensor, h: Tensor) -> None:
        """Merge mature unnamed units of one kind, and split one that holds two.

        usual: the median `separation` of the halves of n images of a known class (of few, it is larger).
        Units less than 1.25 times that apart are merged; a unit whose halves are 1.3 times that is split.
        claimed: int64 [V], images of known classes.
        """
        concept, guess = self.monitor.concept, self.predict(h[claimed], pool.taught_before)[1]  # (N), (V)
        parts = [h[claimed[guess == c]] for c in guess.unique()]  # (n, D) each

        def usual(n=None):
            apart = [two_means(part[:n])[0] for part in parts if len(part) >= 20]
            return torch.tensor(apart or [math.nan]).nanmedian()

        age, limit = self.units.age, 1.25 * usual()
        mature = [unit for unit in self.units.unnamed() if age[unit] >= self.units.mature]
        for a, b in itertools.combinations(mature, 2):
            gone, kept = sorted((a, b), key=lambda u: (u in self.given, int((concept == u).sum())))
            if gone not in self.given and separation(h[concept == a], h[concept == b]) < limit:
                self.log_unit("merged", gone, concept == gone)
                concept[concept == gone] = kept
                self.units.owner[gone] = FREE
        for unit in sorted({*self.units.unnamed()} - {*self.given}):
            index = (concept == unit).nonzero()[:, 0]  # (n)
            gap, second = two_means(h[index])  # bool (n)
            if second.sum() >= 30 and gap > 1.3 * usual(len(index)):
                age[unit] = 0  # not recycled for its half
                new, _ = self.open_unit(pool, UNNAMED, index[second])
                concept[index[second]] = new
                self.log_unit("split", new, index[second])
                self.imprint_ema(pool, unit, index[~second])

    def log_unit(self, event: str, unit: int, index: Tensor) -> None:
        """Log an event of a unit with its images `index` and their class, unless most have none."""
        true = self.y[index]
        c, known = int(true.mode().values), (true >= 0).sum()
        c, purity = (c, float((true == c).sum() / known)) if c >= 0 else (None, None)
        self.log(event, unit, c, len(true), purity)

    def release(self, unit: int) -> None:
        """Let a unit stand for nothing, unless a person has named it."""
        if unit not in self.given:
            self.units.owner[unit] = FREE
            self.monitor.concept[self.monitor.concept == unit] = -1
            self.log("released", unit)

    def open_unit(self, pool, owner: int, index: Tensor) -> tuple[int, str]:
        """A unit for `owner`, imprinted with the images `index`; "grown" or "recycled"."""
        unit, how = self.units.allocate(self.network.head, self.optimizer, owner)
        self.monitor.concept[self.monitor.concept == unit] = -1
        if how == "grown":
            grow_head(self.ema.head, None)
        imprint(self.network.head, unit, self.embed(self.network, index))
        self.imprint_ema(pool, unit, index)
        return unit, how

    def imprint_ema(self, pool, unit: int, index: Tensor) -> None:
        """Imprint the EMA's unit away from other classes; in the network, a low bias would slow learning."""
        others = (pool.labelled_before & (self.y != self.units.owner[unit])).nonzero()[:, 0]
        order = torch.randperm(len(others), generator=torch.Generator().manual_seed(self.seed))[:1000]
        other_h = self.embed(self.ema, others[order.to(others.device)]) if len(others) else None  # (m, D)
        rivals = self.units.in_use(pool.taught_before)  # (U)
        imprint(self.ema.head, unit, self.embed(self.ema, index), other_h, rivals=rivals)

    @outside_autocast
    def name_class(self, pool, c: int, votes: Tensor, h: Tensor | None) -> None:
        """Give class c, whose first labels are here, a unit; votes int64 [N]: from `discover`, changed.

        The unnamed unit whose centre is nearest to more than half of its labelled images ("purity"); else its
        own or a new one. h: as in `discover`, or None.
        """
        units, concept, labels = self.units, self.monitor.concept, pool.labelled & (self.y == c)
        index, own = labels.nonzero()[:, 0], units.owner.index(c) if c in units.owner else None  # (n)
        share, unit = 0.0, -1
        if units.unnamed():
            of_label = units.of_classes(len(self.classes))[self.y]  # (N)
            member = torch.where(pool.labelled, of_label, concept).masked_fill(labels, -1)  # (N)
            count = (h[index] @ self.centres(h, member).T).argmax(1).bincount()
            unit, share = int(count.argmax()), float(count.max() / len(index))
        if share > 0.5 and units.owner[unit] == UNNAMED and unit not in units.given:
            if own is not None:
                self.release(own)
            units.owner[unit], units.age[unit] = c, 0
            self.log("named", unit, c, len(index), share)
            self.imprint_ema(pool, unit, torch.cat([index, (votes == unit).nonzero()[:, 0]]))
            concept[concept == unit] = -1
        elif own is not None:
            imprint(self.network.head, own, self.embed(self.network, index))
            self.imprint_ema(pool, own, index)
        else:
            unit, how = self.open_unit(pool, c, index)
            votes[votes == unit] = UNKNOWN
            self.log(how, unit, c, len(index))


# ---- pruning ----


def prunable(model: nn.Module) -> dict[str, Tensor]:
    """Weights of linear, convolutional, attention layers, by name. ValueError if one is reparametrized."""
    weights = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.MultiheadAttention):
            continue
        key = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
        w = module._parameters.get(key)
        if w is None and getattr(module, key, None) is None:  # attention of several widths
            continue
        if w is None or is_lazy(w):
            raise ValueError(f"{name or 'the model'}: remove weight norm or torch's pruning, or run it once")
        if all(w is not other for other in weights.values()):
            weights[f"{name}.{key}".removeprefix(".")] = w
    return weights


def smallest(sizes: list[Tensor], share: float) -> tuple[Tensor, ...]:
    """The smallest round(share n) of all n values in 1-D tensors: bool tensors. ValueError outside 0..1."""
    if not 0 <= share <= 1:
        raise ValueError(f"a share must be in 0..1, not {share}")
    together = torch.cat(sizes or [torch.zeros(0)])
    chosen = torch.zeros_like(together, dtype=torch.bool)
    chosen[together.topk(round(share * len(together)), largest=False, sorted=False).indices] = True
    return chosen.split([len(size) for size in sizes])


@torch.no_grad()
def prune_smallest(model: nn.Module, sparsity: float) -> dict[str, Tensor]:
    """Zero the fraction `sparsity` (0..1) of all prunable weights that is smallest in magnitude.

    Returns masks {name: bool, True = kept} for `apply_masks`. ValueError outside 0..1.
    """
    weights = prunable(model)
    gone = smallest([w.abs().flatten() for w in weights.values()], sparsity)
    masks = {name: ~part.view_as(w) for (name, w), part in zip(weights.items(), gone, strict=True)}
    apply_masks(model, masks)
    return masks


def filter_layers(model: nn.Module) -> list[tuple[str, str]]:
    """Names of a chain's convolutions and batch norms in pairs, but the last. ValueError without one."""
    chain = model.named_children() if isinstance(model, nn.Sequential) else ()
    layers = [(name, type(m)) for name, m in chain if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    if not layers or [kind for _, kind in layers] != [nn.Conv2d, nn.BatchNorm2d] * (len(layers) // 2):
        raise ValueError("whole filters can be pruned in a plain chain only (cnn, vgg-small, vgg11, vgg16)")
    names = [name for name, _ in layers]
    return list(zip(names[::2], names[1::2], strict=True))[:-1]


@torch.no_grad()
def prune_filters(model: nn.Module, share: float) -> dict[str, Tensor]:
    """Zero the fraction `share` (0..1) of a chain's filters with the smallest norm, and their batch norm.

    The last layer is kept. Norms are relative to their layer's mean; its largest filter stays. Returns masks
    for `apply_masks`. ValueError outside 0..1 and without a chain.
    """
    layers, weights = filter_layers(model), prunable(model)
    norms = [weights[f"{conv}.weight"].flatten(1).norm(dim=1) for conv, _ in layers]
    gone = smallest([norm / norm.mean().clamp(min=1e-12) for norm in norms], share)
    masks = {}
    for (conv, norm), size, dead in zip(layers, norms, gone, strict=True):
        kept = ~dead
        kept[size.argmax()] = True
        masks[f"{conv}.weight"] = kept.view(-1, 1, 1, 1).expand_as(weights[f"{conv}.weight"])
        masks[f"{norm}.weight"] = masks[f"{norm}.bias"] = kept
    apply_masks(model, masks)
    return masks


def prune(model: nn.Module, sparsity: float, filters: float, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """Prune a share of whole filters and then the smallest weights; the masks keep no more than `before`.

    ValueError before anything is pruned.
    """
    for share in (sparsity, filters):
        smallest([], share)
    apply_masks(model, before)
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
    """Zero the weights that the masks do not keep; rows grown since are kept.

    ValueError, before any change, for a mask that fits no parameter.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        p = parameters.get(name)
        if p is None or p.shape[1:] != mask.shape[1:] or len(p) < len(mask):
            raise ValueError(f"the mask '{name}' {list(mask.shape)} fits no parameter")
    for name, mask in masks.items():
        parameters[name][: len(mask)].masked_fill_(~mask, 0)


def sparsity_of(model: nn.Module) -> float:
    """The fraction of the prunable weights that is zero, 0..1."""
    weights = prunable(model).values()
    return sum(int((w == 0).sum()) for w in weights) / max(sum(w.numel() for w in weights), 1)
