"""k-NN boundary sampling (arXiv 2406.16525, section 3; NPOS, arXiv 2303.02966) in PyTorch."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from oal_jax.config import Outliers

# (anchors, noise, features, k) to squared distances (anchors, noise rows): from each unit
# candidate, an anchor plus a noise row, to its k-th nearest feature.
Distances = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def by_faiss(anchors: Tensor, noise: Tensor, bank: Tensor, k: int) -> Tensor:
    """Distances from all candidates stacked, by faiss' full list of k neighbours (official)."""
    import faiss

    index = faiss.IndexFlatL2(bank.shape[1])
    index.add(bank.cpu().numpy())
    candidates = functional.normalize((anchors[:, None] + noise[None]).flatten(0, 1))
    distances, _ = index.search(candidates.cpu().numpy(), k)
    return torch.from_numpy(distances[:, -1]).to(bank.device).view(len(anchors), len(noise))


def by_matmul(anchors: Tensor, noise: Tensor, bank: Tensor, k: int) -> Tensor:
    """Distances by a matrix product and one order statistic, one anchor at a time."""
    blocks = []
    for anchor in anchors:
        products = functional.normalize(anchor[None] + noise) @ bank.T
        blocks.append(2 - 2 * _kth_largest(products, k))
    return torch.stack(blocks)


def by_products(anchors: Tensor, noise: Tensor, bank: Tensor, k: int) -> Tensor:
    """Distances without candidates: sums of anchor and noise products, divided by the length."""
    anchor_products, noise_products = anchors @ bank.T, noise @ bank.T
    squares = (anchors**2).sum(1)[:, None] + (noise**2).sum(1)[None]
    length = (squares + 2 * anchors @ noise.T).sqrt()
    kth = torch.stack([_kth_largest(a[None] + noise_products, k) for a in anchor_products])
    return 2 - 2 * kth / length


def _kth_largest(values: Tensor, k: int) -> Tensor:
    if values.is_cuda:  # a radix selection; on CPU kthvalue partitions rows in parallel
        return values.topk(k, dim=1, sorted=False).values.amin(1)
    return values.kthvalue(values.shape[1] - k + 1, dim=1).values


DISTANCES: dict[str, Distances] = {
    "faiss": by_faiss,
    "matmul": by_matmul,
    "products": by_products,
}


def boundary(features: Tensor, k: int, count: int, how: str) -> Tensor:
    """Indices of the `count` unit features furthest from their k-th neighbour, self included."""
    no_noise = torch.zeros(1, features.shape[1], device=features.device)
    return DISTANCES[how](features, no_noise, features, k)[:, 0].topk(count).indices


def select(distances: Tensor, keep: int, selection: str) -> Tensor:
    """Noise rows to keep for each anchor, (anchors, keep), from distances (anchors, noise rows).

    "reference" reads the flat list as (noise rows, anchors) and so ranks an anchor by distances of
    other anchors' candidates, as the official code does.
    """
    if selection == "reference":
        return distances.flatten().view(distances.shape[1], -1).topk(keep, dim=0).indices.T
    return distances.topk(keep, dim=1).indices


def sample_class(
    features: Tensor, config: Outliers, how: str, generator: torch.Generator
) -> Tensor:
    """Unit outliers (repeats * anchors * per_anchor, d) of a class with these unit features."""
    device, outliers, knn = features.device, [], config.knn
    selection = "reference" if config.official_code else "top"
    edge = features[boundary(features, knn.neighbour, knn.boundary_points, how)]
    for _ in range(knn.repeats):
        order = torch.randperm(len(edge), generator=generator)[: knn.anchors]
        anchors = edge[order.to(device)]
        noise = torch.randn(knn.noise_rows, features.shape[1], generator=generator)
        noise = knn.sigma * noise.to(device)
        distances = DISTANCES[how](anchors, noise, features, knn.neighbour)
        rows = select(distances, knn.per_anchor, selection)
        outliers.append(functional.normalize((anchors[:, None] + noise[rows]).flatten(0, 1)))
    return torch.cat(outliers)
