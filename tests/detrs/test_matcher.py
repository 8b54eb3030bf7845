"""Test the matcher against all permutations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detrs.boxes import to_xyxy
from detrs.matcher import Costs, match, pair_costs
from detrs.structures import Predictions, Targets

FOCAL = Costs("focal", class_weight=2.0, box_weight=5.0, giou_weight=2.0, giou_eps=0.0)
SOFTMAX = Costs("softmax", class_weight=1.0, box_weight=5.0, giou_weight=2.0, giou_eps=0.0)


def random_case(seed: int, counts: tuple[int, ...], num_queries: int) -> tuple[Predictions, Targets]:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, len(counts), num_queries)
    logits = torch.randn(*shape, 5, generator=generator, dtype=torch.float64)
    boxes = 0.1 + 0.4 * torch.rand(*shape, 4, generator=generator, dtype=torch.float64)
    target_boxes = 0.1 + 0.4 * torch.rand(sum(counts), 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 4, (sum(counts),), generator=generator)
    return Predictions(logits, boxes), Targets(labels, target_boxes, counts)


def cheapest(costs: np.ndarray) -> float:
    """Return the least cost of pairing targets (rows) with queries (columns), by brute force."""
    if costs.shape[0] > costs.shape[1]:
        costs = costs.T
    rows = range(costs.shape[0])
    return min(
        sum(costs[row, column] for row, column in zip(rows, columns, strict=True))
        for columns in itertools.permutations(range(costs.shape[1]), costs.shape[0])
    )


@given(
    seed=st.integers(0, 2**31),
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple),
    num_queries=st.integers(1, 5),
    costs=st.sampled_from([FOCAL, SOFTMAX]),
)
@settings(max_examples=40, deadline=None)
def test_no_assignment_is_cheaper(seed: int, counts: tuple[int, ...], num_queries: int, costs: Costs) -> None:
    predictions, targets = random_case(seed, counts, num_queries)
    (matches,) = match([(predictions, targets.labels)], targets, costs)
    table = pair_costs(predictions, targets.labels, targets, targets.indices()[0], costs).numpy()
    owner = targets.indices()[0]
    for layer in range(2):
        for image, count in enumerate(counts):
            mine = owner[matches.targets[layer]] == image
            queries, rows = matches.queries[layer, mine], matches.targets[layer, mine]
            assert len(queries) == min(count, num_queries) == len(set(queries.tolist()))
            assert len(set(rows.tolist())) == len(rows)
            total = table[layer, rows, queries].sum()
            start = sum(counts[:image])
            assert total == pytest.approx(cheapest(table[layer, start : start + count]), abs=1e-12)


def test_costs_are_those_of_the_definition() -> None:
    predictions, targets = random_case(0, (2, 1), 3)
    table = pair_costs(predictions, targets.labels, targets, targets.indices()[0], FOCAL)
    for layer, target, query in itertools.product(range(2), range(3), range(3)):
        image = 0 if target < 2 else 1
        score = predictions.logits[layer, image, query, targets.labels[target]].sigmoid().item()
        focal = 0.25 * (1 - score) ** 2 * -np.log(score + 1e-8) - 0.75 * score**2 * -np.log(1 - score + 1e-8)
        box, target_boxes = predictions.boxes[layer, image, query], targets.boxes[target]
        l1 = (box - target_boxes).abs().sum().item()
        expected = 2 * focal + 5 * l1 - 2 * plain_giou(to_xyxy(box).tolist(), to_xyxy(target_boxes).tolist())
        assert table[layer, target, query].item() == pytest.approx(expected, abs=1e-12)


def plain_giou(a: list[float], b: list[float]) -> float:
    width, height = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union - (hull - union) / hull
