"""k-NN boundary sampling (arXiv 2406.16525, section 3; NPOS, arXiv 2303.02966) in PyTorch."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from oal_jax.config import Knn

Distances = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def by_faiss(anchors: Tensor, noise: Tensor, bank: Tensor, k: int) -> Tensor:
    """All candidates stacked, and faiss' full list of k neighbours: as the official code."""
    import faiss

    index = faiss.IndexFlatL2(bank.shape[1])
    index.add(bank.cpu().numpy())
    candidates = functional.normalize((anchors[:, None] + noise[None]).flatten(0, 1))
    found, _ = index.search(candidates.cpu().numpy(), k)
    return torch.from_numpy(found[:, -1]).to(bank.device).view(len(anchors), len(noise))


def by_matmul(anchors: Tensor, noise: Tensor, bank: Tensor, k: int) -> Tensor:
    """The same distances by a matrix product and one order statistic, an anchor at a time."""
    blocks = []
    for anchor in anchors:
        products = functional.normalize(anchor[None] + noise) @ bank.T
        blocks.append(2 - 2 * _kth_largest(products, k))
    return torch.stack(blocks)


def by_products(anchors: Tensor, noise: Tensor, bank: Tensor, k: int) -> Tensor:
    """Without candidates: products with anchors and with noise, added, and lengths divided out."""
    of_anchors, of_noise = anchors @ bank.T, noise @ bank.T
    squares = (anchors**2).sum(1)[:, None] + (noise**2).sum(1)[None]
    length = (squares + 2 * anchors @ noise.T).sqrt()
    kth = torch.stack([_kth_largest(a[None] + of_noise, k) for a in of_anchors])
    return 2 - 2 * kth / length


def _kth_largest(values: Tensor, k: int) -> Tensor:
    if values.is_cuda:  # selection by radix; on CPU kthvalue partitions, in parallel over rows
        return values.topk(k, dim=1, sorted=False).values.amin(1)
    return values.kthvalue(values.shape[1] - k + 1, dim=1).values


DISTANCES: dict[str, Distances] = {
    "faiss": by_faiss,
    "matmul": by_matmul,
    "products": by_products,
}


def boundary(features: Tensor, k: int, count: int, how: str) -> Tensor:
    """Rows of the `count` unit features furthest from their k-th neighbour, themselves counted."""
    nothing = torch.zeros(1, features.shape[1], device=features.device)
    return DISTANCES[how](features, nothing, features, k)[:, 0].topk(count).indices


def select(distances: Tensor, keep: int, selection: str) -> Tensor:
    """Noise rows that are kept of each anchor, (anchors, keep); `distances` are (anchors, rows).

    "reference" views the flat list as (rows, anchors) and so ranks an anchor by the distances of
    candidates of others, as the official code.
    """
    if selection == "reference":
        return distances.flatten().view(distances.shape[1], -1).topk(keep, dim=0).indices.T
    return distances.topk(keep, dim=1).indices


def sample_class(features: Tensor, knn: Knn, how: str, generator: torch.Generator) -> Tensor:
    """Unit-norm outliers of a class of unit features, (repeats * anchors * keep, d)."""
    device, found = features.device, []
    edge = features[boundary(features, knn.neighbour, knn.boundary, how)]
    for _ in range(knn.repeats):
        order = torch.randperm(len(edge), generator=generator)[: knn.anchors]
        anchors = edge[order.to(device)]
        noise = torch.randn(knn.noise_rows, features.shape[1], generator=generator)
        noise = knn.sigma * noise.to(device)
        distances = DISTANCES[how](anchors, noise, features, knn.neighbour)
        rows = select(distances, knn.keep, knn.selection)
        found.append(functional.normalize((anchors[:, None] + noise[rows]).flatten(0, 1)))
    return torch.cat(found)
