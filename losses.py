"""The losses of gradual supervision, each a pure function, and the memory that they search.

    nt_xent             each image is its own class              SimCLR                   arXiv 2002.05709
    local_aggregation   neighbours in one cluster move together  Local Aggregation        arXiv 1903.12355
    propagate_labels    labelled neighbours vote for a label     Local Label Propagation  arXiv 1905.11581
    propagation         and the winning label is learned         the same
    supervised          cross-entropy over the active units

    loss = nt_xent(z1, z2) + supervised(logits, onehot)

reduction is "mean", "sum" or "none" (one value per image). All compute in float32, for other dtypes and
inside autocast too. A wrong shape or dtype raises a ValueError that names it.
"""

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

CHUNK_BYTES = 64 << 20  # of similarities; no search builds an [N, N] matrix


def check(**arguments) -> None:
    """ValueError for a wrong argument: check(z=(z, "B D float"), index=(index, "B int64"), temperature=0.5).

    Equal letters are equal sizes. Sizes and numbers are above 0. No tensor is read: a GPU would wait.
    """
    sizes = {}
    for name, value in arguments.items():
        if isinstance(value, tuple):
            x, expected = value
            *letters, dtype = expected.split()
            right = x.is_floating_point() if dtype == "float" else x.dtype == getattr(torch, dtype)
            fits = (sizes.setdefault(d, n) == n > 0 for d, n in zip(letters, x.shape, strict=False))
            if not (right and x.ndim == len(letters) and all(fits)):
                raise ValueError(f"{name} must be {expected}, not {x.dtype} {list(x.shape)} ({sizes})")
        elif not torch.is_tensor(value) and not 0 < value < math.inf:
            raise ValueError(f"{name} must be above 0, not {value}")


def reduce(loss: Tensor, reduction: str) -> Tensor:
    """loss [B] -> its mean, its sum, or for reduction="none" the loss itself."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', not '{reduction}'")
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.mean()


def take(x: Tensor, index: Tensor) -> Tensor:
    """x[index]; negative indices are errors too, which a GPU reports later."""
    try:
        return x.index_select(0, index)
    except IndexError:
        raise ValueError(f"index must be in 0..{len(x) - 1}") from None


def chunks(n: int, columns: int) -> list[slice]:
    """Slices of 0..n; a float32 [slice,columns] stays under CHUNK_BYTES."""
    size = max(1, CHUNK_BYTES // (4 * columns))
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b outside autocast."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


class Inner(torch.autograd.Function):
    """Inner products of the rows of a [...,N,D] and b [...,M,D]: [...,N,M], with a float32 gradient."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return product(a, b.mT)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (a, b), (for_a, for_b) = ctx.saved_tensors, ctx.needs_input_grad
        return product(grad, b) if for_a else None, product(grad.mT, a) if for_b else None


def nt_xent(
    z1: Tensor, z2: Tensor, temperature: float = 0.5, reduction: str = "mean", kind: Tensor | None = None
) -> Tensor:
    """Normalised temperature-scaled cross-entropy: each view must find the other (SimCLR, equation 1).

    z1, z2: [B,D], two views of the same images, at any scale. An untrained network gives about ln(2B-1).

        loss_i = -log softmax_j(z_i . z_j / temperature) at the other view of i, over the 2B-1 rows j != i

    kind: int64 [B]. Images of one kind are no negatives of each other: an image that occurs twice, or images
    of one (pseudo-)label. -1 is no kind: a negative of everything. "none" gives [2B].
    """
    check(z1=(z1, "B D float"), z2=(z2, "B D float"), temperature=temperature)
    z = F.normalize(torch.cat([z1, z2]).float(), dim=1)  # (2B, D)
    target = torch.arange(len(z), device=z.device).roll(len(z1))
    similarity = (Inner.apply(z, z) / temperature).fill_diagonal_(-math.inf)  # (2B, 2B)
    if kind is not None:
        check(z1=(z1, "B D float"), kind=(kind, "B int64"))
        kind = kind.repeat(2)
        same = (kind[:, None] == kind) & (kind >= 0)
        same.scatter_(1, target[:, None], False)  # the positive pair stays
        similarity = similarity.masked_fill(same, -math.inf)
    return F.cross_entropy(similarity, target, reduction=reduction)


class MemoryBank:
    """Running means of embeddings: unit rows [n,dim], zeros at first; momentum: of the old row, 0..1."""

    def __init__(self, n: int, dim: int, momentum: float = 0.5, device: torch.device | str = "cpu"):
        check(n=n, dim=dim)
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be in 0..1, not {momentum}")
        self.rows = torch.zeros(n, dim, device=device)
        self.momentum = momentum

    @torch.no_grad()
    def update(self, index: Tensor, z: Tensor) -> None:
        """row_i <- normalize(momentum row_i + (1 - momentum) z_i); index int64 [B], z [B,dim].

        If an image occurs twice, the mean of its embeddings counts.
        """
        check(rows=(self.rows, "N D float"), z=(z, "B D float"), index=(index, "B int64"))
        z = F.normalize(z.float(), dim=1)
        order = index.argsort()
        first = torch.ones_like(index, dtype=torch.bool)
        first[1:] = index[order][1:] != index[order][:-1]
        group = torch.empty_like(index)
        group[order] = first.cumsum(0) - 1  # as unique(), which would wait for a GPU
        total = torch.zeros_like(z).index_add_(0, group, z)
        count = torch.zeros_like(z[:, 0]).index_add_(0, group, torch.ones_like(z[:, 0]))
        mean = total[group] / count[group, None]
        old = take(self.rows, index)
        self.rows[index] = F.normalize(self.momentum * old + (1 - self.momentum) * mean, dim=1).to(old)


def nearest_centre(x: Tensor, centres: Tensor) -> Tensor:
    """The nearest of the centres [k,D] to each row of x [N,D]: int64 [N]."""
    half = centres.square().sum(1) / 2
    return torch.cat([product(x[p], centres.T).sub_(half).argmax(1) for p in chunks(len(x), len(centres))])


@torch.no_grad()
def kmeans(
    x: Tensor, k: int, iterations: int = 10, generator: Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm on x [N,D] -> cluster of each row int64 [N], centres float32 [min(k,N),D].

    Starts from 4k random rows; the first two iterations drop half of the centres each, those whose rows can
    join an earlier centre at the least cost. generator: on the device of x.
    """
    check(x=(x, "N D float"), k=k)
    x, k = x.float(), min(k, len(x))
    order = torch.randperm(len(x), device=x.device, generator=generator)
    centres = x[order[: k * min(4, 2**iterations)]]
    for _ in range(iterations):
        index = nearest_centre(x, centres)
        count = index.bincount(minlength=len(centres))[:, None]
        total = torch.zeros_like(centres).index_add_(0, index, x)
        centres = torch.where(count > 0, total / count.clamp(min=1), centres)
        if (n := len(centres)) > k:
            near = [(1 / torch.cdist(centres[p], centres)).tril(p.start - 1).amax(1) for p in chunks(n, n)]
            cost = count[:, 0] / torch.cat(near).square()  # count distance**2; tril: to an earlier one
            centres = centres[cost.topk(max(k, n // 2)).indices]
    return nearest_centre(x, centres), centres


def clusterings(
    rows: Tensor, active: Tensor, k: int, repeats: int = 3, generator: Generator | None = None
) -> Tensor:
    """`repeats` k-means clusterings of the active rows (bool [N]): int64 [repeats,N], -1 where not active."""
    check(rows=(rows, "N D float"), active=(active, "N bool"), repeats=repeats)
    clusters = torch.full((repeats, len(rows)), -1, device=rows.device)
    for i in range(repeats):
        clusters[i, active] = kmeans(rows[active], k, generator=generator)[0]
    return clusters


def searched(n: int) -> tuple[int, int]:
    """k and `every` of `neighbours` for n rows: at most 12,000 a step, of them twice the paper's share."""
    every = math.ceil(n / 12_000)
    return max(16, round(0.0064 * n / every)), every


def neighbours(
    z: Tensor, index: Tensor, bank: MemoryBank, active: Tensor, k: int, every: int = 1, turn: int = 0
) -> tuple[Tensor, Tensor]:
    """The k rows of the bank most similar to each z, without the image itself: B_i of local aggregation.

    z: unit rows [B,D] of the images index int64 [B]; active: bool [N], the rows to search; every: search only
    each `every`-th row, from another start at each `turn`. Returns row numbers int64 [B,k], nearest first, -1
    where there are fewer, and similarities float32 [B,k], with gradient; k: at most the rows searched.
    """
    check(bank=(bank.rows, "N D float"), z=(z, "B D float"), index=(index, "B int64"), k=k, every=every)
    check(bank=(bank.rows, "N D float"), active=(active, "N bool"))
    take(active, index)  # refuses an index out of range
    z, first = z.float(), turn % min(every, len(bank.rows))
    number = torch.arange(first, len(bank.rows), every, device=z.device)
    rows, there = bank.rows[first::every].float(), active[first::every]
    with torch.no_grad():
        near = torch.empty(len(z), min(k, len(rows)), dtype=torch.long, device=z.device)
        for part in chunks(len(z), len(rows)):
            similarity = product(z[part], rows.T)
            similarity.masked_fill_(~there | (number == index[part, None]), -2.0)
            best, near[part] = similarity.topk(near.shape[1], dim=1)
            near[part] = near[part].masked_fill(best < -1.5, -1)
    close = rows[near.clamp(min=0)]  # (B, k, D)
    similarity = Inner.apply(close, z[:, :, None].mT)[:, :, 0]  # (B, k)
    return torch.where(near < 0, -1, near * every + first), similarity


def local_aggregation(
    z: Tensor,
    index: Tensor,
    bank: MemoryBank,
    clusters: Tensor,
    background: int | tuple[Tensor, Tensor] = 64,
    temperature: float = 0.07,
    reduction: str = "mean",
) -> Tensor:
    """Of the neighbours of an image, those in its own cluster should be the most likely (equation 6).

    z: unit rows [B,D] of the images index int64 [B]; clusters: int64 [H,N], rows of clusters or
    pseudo-labels, negative where an image takes no part. B_i: the `background` bank rows nearest to z_i; C_i:
    the images that share a cluster with i in any row; both without i itself.

        loss_i = log sum_{j in B_i} exp(m_j . z_i / tau) - log sum_{j in B_i and C_i} exp(m_j . z_i / tau)

    The nearest neighbour stands in where none is in C_i; an image without neighbours has loss 0.
    background: the size of B_i, or what `neighbours` returned, to share one search among losses.
    """
    check(bank=(bank.rows, "N D float"), clusters=(clusters, "H N int64"), temperature=temperature)
    if not isinstance(background, tuple):
        background = neighbours(z, index, bank, (clusters >= 0).any(0), background)
    near, similarity = background  # (B, k)
    check(index=(index, "B int64"), background=(near, "B k int64"), similarity=(similarity, "B k float"))
    there = near >= 0
    own = take(clusters.T, index)[:, None]  # (B, 1, H)
    both = ((clusters.T[near.clamp(min=0)] == own) & (own >= 0)).any(2) & there
    both[:, 0] |= there[:, 0] & ~both.any(1)
    similarity = similarity.float() / temperature
    # Not -inf: its gradient is NaN in a row without neighbours.
    total = similarity.masked_fill(~there, -1e4).logsumexp(1)
    agree = similarity.masked_fill(~both, -1e4).logsumexp(1)
    return reduce(total - agree, reduction)


def align(votes: Tensor, expected: Tensor, rounds: int = 10) -> Tensor:
    """Scale the columns of votes [N,C], whose rows sum to 1, until their means are proportional to expected.

    Columns with expected [C] 0 keep their mean. Distribution alignment (arXiv 1911.09785).
    """
    votes, expected = votes.float(), expected.float()
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
    balance: bool | Tensor = False,
) -> tuple[Tensor, Tensor]:
    """Let the k nearest labelled rows vote on the label of every row (arXiv 1905.11581, equations 2-4).

    bank_rows: unit rows [N,D]; labels: int64 [N], read only where labelled (bool [N]) is true.

        vote_c = sum over the k labelled neighbours l with label c of exp(m_l . m_i / tau) / density(l)
        density(l) = sum over the density_k rows j != l nearest to l of exp(m_l . m_j / tau)

    balance: True divides the votes of each class by its number of labels; a tensor [C], how many rows each
    class should get (0: not known), also aligns them with it. Returns the pseudo-label int64 [N] with most
    votes and its share of them [N]. Labelled rows keep their label, with 1; without any, all get -1 and 0.
    """
    check(bank_rows=(bank_rows, "N D float"), labels=(labels, "N int64"), labelled=(labelled, "N bool"))
    check(k=k, density_k=density_k, temperature=temperature)
    n, known, rows = len(bank_rows), labelled.nonzero()[:, 0], bank_rows.float()
    if not len(known):
        return torch.full_like(labels, -1), torch.zeros_like(rows[:, 0])
    voters, y, aligned = rows[known], labels[known], torch.is_tensor(balance)
    classes = len(balance) if aligned else int(y.max()) + 1
    if y.min() < 0 or y.max() >= classes:
        raise ValueError(f"labels must be in 0..{classes - 1} where labelled")

    weight = torch.zeros(len(known), device=rows.device)  # log of 1 / density
    if n > 1:
        for part in chunks(len(known), n):
            similarity = product(voters[part], rows.T).scatter_(1, known[part, None], -math.inf)
            weight[part] = -(similarity.topk(min(density_k, n - 1), dim=1).values / temperature).logsumexp(1)
    if aligned or balance:
        weight -= y.bincount()[y].log()

    votes = torch.zeros(n, classes, device=rows.device)
    for part in chunks(n, len(known)):
        similarity, near = product(rows[part], voters.T).topk(min(k, len(known)), dim=1)  # (b, k)
        votes[part].scatter_add_(1, y[near], (similarity / temperature + weight[near]).softmax(1))
    if aligned:
        votes = align(votes, balance)
    confidence, pseudo = votes.max(1)
    pseudo[known], confidence[known] = y, 1.0
    return pseudo, confidence


def propagation(together: Tensor, named: Tensor, confidence: Tensor, reduction: str = "mean") -> Tensor:
    """confidence (together + named): learn propagated labels (arXiv 1905.11581, equation 7). All float [B].

    together: `local_aggregation` with clusters=pseudo[None]; named: `supervised`; both with reduction="none".
    """
    check(together=(together, "B float"), named=(named, "B float"), confidence=(confidence, "B float"))
    return reduce(confidence.float() * (together.float() + named.float()), reduction)


def one_hot(units: Tensor, count: int) -> Tensor:
    """Targets int64 [B,count] for units int64 [B]; a row of zeros where the unit is negative."""
    check(units=(units, "B int64"), count=count)
    try:
        return F.one_hot(units.clamp(min=0), count) * (units >= 0)[:, None]
    except RuntimeError:
        raise ValueError(f"units must be below count, {count}") from None


def supervised(
    logits: Tensor, onehot: Tensor, active: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy with one-hot targets over the active units; the mean is over images of known class, or 0.

    logits [B,C]; onehot [B,C], a row of zeros where the class is not known; active: bool [C], None for all.

        loss_i = - sum_c onehot_ic log softmax(logits_i over the active units)_c
    """
    check(logits=(logits, "B C float"), onehot=(onehot.float(), "B C float"))
    logits, onehot = logits.float(), onehot.float()
    if active is not None:
        check(logits=(logits, "B C float"), active=(active, "C bool"))
        logits, onehot = logits.masked_fill(~active, -math.inf), onehot * active
    log_p = (logits - logits.logsumexp(1, keepdim=True)).masked_fill(onehot == 0, 0.0)  # 0 log 0 = 0
    loss = -(onehot * log_p).sum(1)
    if reduction == "mean":
        return loss.sum() / (onehot.sum(1) > 0).sum().clamp(min=1)
    return reduce(loss, reduction)
