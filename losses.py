"""The losses of gradual supervision, each pure and in float32, and the memory that the neighbour losses look into.

    nt_xent             every image is its own class             SimCLR                arXiv 2002.05709
    local_aggregation   neighbours that cluster together agree   Local Aggregation     arXiv 1903.12355
    propagate_labels    labelled neighbours vote                 Local Label Propag.   arXiv 1905.11581
    propagation         and their votes are learned              the same
    supervised          named classes                            cross-entropy over the units active so far

    loss = nt_xent(z1, z2) + supervised(logits, onehot)

A loss takes reduction="mean" (a scalar) or "none" (one value an image, to be weighted).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 64 << 20  # of a block of similarities; the neighbour search never builds an [N, N] matrix


def reduce(loss: Tensor, reduction: str) -> Tensor:
    """loss [B] -> its mean, or itself for reduction="none"."""
    return loss if reduction == "none" else loss.mean()


def chunks(n: int, columns: int) -> list[slice]:
    """Slices of 0..n such that a float32 matrix of one slice by `columns` stays under CHUNK_BYTES."""
    size = max(1, CHUNK_BYTES // (4 * max(columns, 1)))
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


# ---- self-supervision -----------------------------------------------------------------------------------------------


def nt_xent(z1: Tensor, z2: Tensor, temperature: float = 0.5, reduction: str = "mean", kind: Tensor | None = None) -> Tensor:
    """Normalised temperature-scaled cross-entropy: each view must find the other among all (SimCLR, equation 1).

    z1, z2: [B,D], two views of the same images, any scale. loss_i = -log softmax_j(z_i . z_j / temperature) at the other
    view, j over the 2B-1 other rows. An untrained network gives about ln(2B-1). "none" gives [2B].
    kind: int64 [B]; images of the same kind are no negatives of each other: an image that occurs twice in the batch, or, once
    there are labels, two of the same (pseudo-)label. The plain loss is kind=None.
    """
    z = F.normalize(torch.cat([z1, z2]).float(), dim=1)  # (2B, D)
    target = torch.arange(len(z), device=z.device).roll(len(z1))
    similarity = (z @ z.T / temperature).fill_diagonal_(float("-inf"))
    if kind is not None:
        kind = kind.repeat(2)
        same = (kind[:, None] == kind).scatter_(1, target[:, None], False)  # the positive pair stays
        similarity = similarity.masked_fill(same, float("-inf"))
    return F.cross_entropy(similarity, target, reduction=reduction)


# ---- memory ---------------------------------------------------------------------------------------------------------


class MemoryBank:
    """One unit row for every image of the data set, a running mean of its embeddings; zeros until the image is first seen.

    n: images; dim: width of z; momentum: weight of the old row (0.5).
    """

    def __init__(self, n: int, dim: int, momentum: float = 0.5, device: torch.device | str = "cpu"):
        self.rows = torch.zeros(n, dim, device=device)  # (n, dim)
        self.momentum = momentum

    @torch.no_grad()
    def update(self, index: Tensor, z: Tensor) -> None:
        """row_i <- normalize(momentum row_i + (1 - momentum) z_i) for the images `index` [B]; z [B,dim].

        An image that occurs more than once counts with the mean of its embeddings.
        """
        z = F.normalize(z.float(), dim=1)
        order = index.argsort()
        first = torch.ones_like(index, dtype=torch.bool)
        first[1:] = index[order][1:] != index[order][:-1]
        group = torch.empty_like(index)
        group[order] = first.cumsum(0) - 1  # one number for each distinct image; unlike unique(), this waits for no GPU
        total = torch.zeros_like(z).index_add_(0, group, z)
        count = torch.zeros_like(z[:, 0]).index_add_(0, group, torch.ones_like(z[:, 0]))
        mean = total[group] / count[group, None]
        self.rows[index] = F.normalize(self.momentum * self.rows[index] + (1 - self.momentum) * mean, dim=1)


# ---- clusters -------------------------------------------------------------------------------------------------------


def nearest_centre(x: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centre of each row of x [N,D], and the squared distance to it: int64 [N], float32 [N]. Chunked."""
    half_norm = centres.square().sum(1) / 2
    index = torch.empty(len(x), dtype=torch.long, device=x.device)
    distance = torch.empty(len(x), device=x.device)
    for part in chunks(len(x), len(centres)):
        score, index[part] = torch.addmm(half_norm, x[part], centres.T, beta=-1).max(1)
        distance[part] = (x[part].square().sum(1) - 2 * score).clamp_(min=0)
    return index, distance


def spread_centres(x: Tensor, k: int, generator: torch.Generator | None) -> Tensor:
    """Greedy k-means++ (Arthur & Vassilvitskii 2007) on at most 8 k of the rows.

    A few candidates are drawn by their squared distance to the centres so far; the one that leaves least distance stays.
    """
    sample = x[torch.randperm(len(x), device=x.device, generator=generator)[: 8 * k]]
    trials = 2 + int(math.log(k))
    centres = sample[:1].repeat(k, 1)
    distance = (sample - centres[0]).square().sum(1)
    norm = sample.square().sum(1)
    for i in range(1, k):
        cumulative = distance.double().cumsum(0)
        u = torch.rand(trials, device=x.device, generator=generator, dtype=torch.float64) * cumulative[-1]
        candidates = torch.searchsorted(cumulative, u).clamp(max=len(sample) - 1)
        to_candidates = norm + norm[candidates, None] - 2 * sample[candidates] @ sample.T  # (trials, samples)
        left = torch.minimum(distance, to_candidates.clamp_(min=0))
        best = left.sum(1).argmin(keepdim=True)  # a tensor as index: no waiting for a GPU
        distance, centres[i] = left.index_select(0, best)[0], sample.index_select(0, candidates.index_select(0, best))[0]
    return centres


@torch.no_grad()
def kmeans(x: Tensor, k: int, iterations: int = 10, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm on x [N,D] -> cluster of each row int64 [N], centres [k,D]; k is lowered to N if N is smaller.

    An empty cluster takes over the row that lies farthest from its centre. generator: on the device of x.
    """
    x, k = x.float(), min(k, len(x))
    centres = spread_centres(x, k, generator)
    for _ in range(iterations):
        index, distance = nearest_centre(x, centres)
        count = index.bincount(minlength=k)
        centres = torch.zeros_like(centres).index_add_(0, index, x) / count.clamp(min=1)[:, None]
        empty = (count == 0).nonzero()[:, 0]
        centres[empty] = x[distance.topk(len(empty)).indices]
    return nearest_centre(x, centres)[0], centres


def clusterings(
    rows: Tensor, active: Tensor, k: int, repeats: int = 3, iterations: int = 10, generator: torch.Generator | None = None
) -> Tensor:
    """`repeats` k-means clusterings of the active rows: int64 [repeats,N], -1 where not active (bool [N])."""
    clusters = torch.full((repeats, len(rows)), -1, device=rows.device)
    for h in range(repeats):
        clusters[h, active] = kmeans(rows[active], k, iterations, generator)[0]
    return clusters


# ---- local aggregation ----------------------------------------------------------------------------------------------


def searched(n: int) -> tuple[int, int]:
    """How a step looks for neighbours in a bank of n rows: how many it takes, and that it looks at every so many-th row.

    Of 12,000 rows at most, in turn, so that the cost of a step does not grow with the data; twice the share that the paper takes.
    """
    every = math.ceil(n / 12_000)
    return max(16, round(0.0064 * n / every)), every


def neighbours(z: Tensor, index: Tensor, bank: MemoryBank, active: Tensor, k: int, every: int = 1, turn: int = 0) -> tuple[Tensor, Tensor]:
    """The k rows of the bank most similar to each z, without the image itself: B_i of local aggregation.

    z: unit rows [B,D] of the images `index` int64 [B]; active: bool [N], the rows to look at. Of a large bank one may look
    at `every` so many-th row only, beginning with another one each `turn`. Returns the rows' numbers int64 [B,k], nearest
    first, -1 where there are fewer than k, and their similarities float32 [B,k], with gradient.
    """
    z, first = z.float(), turn % every
    number = torch.arange(first, len(bank.rows), every, device=z.device)
    rows, there = bank.rows[first::every], active[first::every]
    with torch.no_grad():
        near = torch.empty(len(z), min(k, len(rows)), dtype=torch.long, device=z.device)
        for part in chunks(len(z), len(rows)):
            similarity = (z[part] @ rows.T).masked_fill_(~there | (number == index[part, None]), -2.0)
            best, near[part] = similarity.topk(near.shape[1], dim=1)
            near[part] = near[part].masked_fill(best < -1.5, -1)
    similarity = torch.bmm(rows[near.clamp(min=0)], z[:, :, None])[:, :, 0]
    return torch.where(near < 0, -1, near * every + first), similarity


def local_aggregation(
    z: Tensor,
    index: Tensor,
    bank: MemoryBank,
    clusters: Tensor,
    background: int = 64,
    temperature: float = 0.07,
    reduction: str = "mean",
    found: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Of the background neighbours of an image, those in its own cluster should be the likely ones (equation 6).

    z: unit rows [B,D] of the images `index` int64 [B]; clusters: int64 [H,N], one row a clustering (from `clusterings`, or
    pseudo-labels), negative where an image is not to be looked at. B_i: the `background` rows of the bank nearest to z_i;
    C_i: the images that share a cluster with i in any clustering; both without i itself.

        loss_i = log sum_{j in B_i} exp(m_j . z_i / temperature) - log sum_{j in B_i and C_i} exp(m_j . z_i / temperature)

    The nearest neighbour counts as close where nothing else does. An image with no neighbour at all has loss 0.
    found: B_i and its similarities from `neighbours`, where several losses share one search.
    """
    near, similarity = found or neighbours(z, index, bank, (clusters >= 0).any(0), background)
    there = near >= 0
    close = torch.zeros_like(there)
    for cluster in clusters:
        close |= cluster[near.clamp(min=0)] == cluster[index, None]
    close &= there
    close[:, 0] |= there[:, 0] & ~close.any(1)
    similarity = similarity / temperature
    # A large finite number instead of -inf, whose gradient would not be a number in a row with no neighbour.
    total = similarity.masked_fill(~there, -1e4).logsumexp(1)
    agree = similarity.masked_fill(~close, -1e4).logsumexp(1)
    return reduce(total - agree, reduction)


# ---- label propagation ----------------------------------------------------------------------------------------------


def align(votes: Tensor, expected: Tensor, rounds: int = 10) -> Tensor:
    """Scale the columns of votes [N,C], whose rows sum to 1, until their means are as `expected` [C] in proportion.

    Columns of which nothing is expected (0) keep their mean. Distribution alignment (arXiv 1911.09785) by the iterations of
    Sinkhorn & Knopp 1967: without it a class that few labels made too broad takes ever more images from the others.
    """
    mean, due = votes.mean(0), expected > 0
    share = torch.where(due, expected / expected.sum() * (mean * due).sum(), mean)
    for _ in range(rounds):
        votes = F.normalize(votes * (share / votes.mean(0).clamp(min=1e-12)), p=1, dim=1)
    return votes


@torch.no_grad()
def propagate_labels(
    bank_rows: Tensor,
    labels: Tensor,
    labelled: Tensor,
    k: int = 10,
    density_k: int = 50,
    temperature: float = 0.07,
    balance: bool = False,
    expected: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Let the k nearest labelled rows vote on the label of every row (arXiv 1905.11581, equations 2-4).

    bank_rows: unit rows [N,D]; labels: int64 [N], looked at only where labelled (bool [N]) is true.

        vote_c = sum over the k labelled neighbours l with label c of exp(m_l . m_i / temperature) / density(l)
        density(l) = sum over the density_k rows j != l nearest to l of exp(m_l . m_j / temperature)

    balance divides the votes of each class by its number of labels. expected: [C], how many rows of each class are due, in
    proportion, 0 where nobody knows; the votes are scaled until each class has its share (`align`). Returns the pseudo-label int64
    [N] with the most votes and its share of all votes float32 [N]. Labelled rows keep their label with confidence 1; if nothing is
    labelled, all get -1 with confidence 0.
    """
    n, known = len(bank_rows), labelled.nonzero()[:, 0]
    pseudo, confidence = torch.full_like(labels, -1), torch.zeros(n, device=bank_rows.device)
    if not len(known):
        return pseudo, confidence
    rows, voters, y = bank_rows.float(), bank_rows[known].float(), labels[known]

    weight = torch.zeros(len(known), device=rows.device)  # log of 1 / density
    if n > 1:
        for part in chunks(len(known), n):
            similarity = (voters[part] @ rows.T).scatter_(1, known[part, None], float("-inf"))
            weight[part] = -(similarity.topk(min(density_k, n - 1), dim=1).values / temperature).logsumexp(1)
    if balance:
        weight -= y.bincount()[y].log()

    votes = torch.zeros(n, int(y.max()) + 1 if expected is None else len(expected), device=rows.device)
    for part in chunks(n, len(known)):
        similarity, near = (rows[part] @ voters.T).topk(min(k, len(known)), dim=1)  # (b, k)
        votes[part].scatter_add_(1, y[near], (similarity / temperature + weight[near]).softmax(1))
    if expected is not None:
        votes = align(votes, expected)
    confidence, pseudo = votes.max(1)
    pseudo[known], confidence[known] = y, 1.0
    return pseudo, confidence


# ---- supervision ----------------------------------------------------------------------------------------------------


def one_hot(units: Tensor, count: int) -> Tensor:
    """Targets [B,count] for units [B]; a row of zeros where there is none (-1)."""
    return F.one_hot(units.clamp(min=0), count) * (units >= 0)[:, None]


def supervised(logits: Tensor, onehot: Tensor, active: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """Cross-entropy with one-hot targets over the units active so far.

    logits [B,C]; onehot [B,C], a row of zeros for an image whose class is not known; active: bool [C], all if None.

        loss_i = - sum_c onehot_ic log softmax(logits_i over the active units)_c

    The mean is over the images of known class; it is 0 if there is none.
    """
    logits, onehot = logits.float(), onehot.float()
    if active is not None:
        logits, onehot = logits.masked_fill(~active, float("-inf")), onehot * active
    log_p = (logits - logits.logsumexp(1, keepdim=True)).masked_fill(onehot == 0, 0.0)  # 0 log 0 = 0
    loss = -(onehot * log_p).sum(1)
    return loss if reduction == "none" else loss.sum() / (onehot.sum(1) > 0).sum().clamp(min=1)


def propagation(
    z: Tensor,
    logits: Tensor,
    index: Tensor,
    bank: MemoryBank,
    pseudo: Tensor,
    confidence: Tensor,
    onehot: Tensor,
    active: Tensor | None = None,
    background: int = 64,
    temperature: float = 0.07,
    reduction: str = "mean",
    found: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Learn the propagated labels, each weighted by its confidence (arXiv 1905.11581, equation 7).

    z [B,D], logits [B,C], onehot [B,C] (of the pseudo-labels) belong to the images `index` [B]; pseudo int64 [N] and
    confidence [N] to all images, from `propagate_labels`; active: bool [C], the units that take part;
    found: from `neighbours`, where several losses share one search.

        loss_i = confidence_i [ local aggregation with the images of the same pseudo-label + cross-entropy(pseudo-label) ]

    Where no neighbour has the pseudo-label of an image, its nearest one stands in, as in `local_aggregation`.
    """
    together = local_aggregation(z, index, bank, pseudo[None], background, temperature, "none", found)
    named = supervised(logits, onehot, active, reduction="none")
    return reduce(confidence[index] * (together + named), reduction)
