"""Denoising queries with and without negatives, against loops over single boxes, and the parts of DINO left out."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import goldens
import small_models
from detrs.criterion import denoising_matches
from detrs.denoising import Denoising, Draws, denoising_attn_mask
from detrs.structures import Denoised, Predictions, Targets
from detrs.zoo import DinoConfig, build
from goldens import Golden

DINO = small_models.CONFIGS["dino"]
CONTRASTIVE = pytest.mark.parametrize("contrastive", [True, False])


def denoising(*, contrastive: bool) -> Denoising:
    torch.manual_seed(0)
    return Denoising(
        4, 8, num_denoising=9, label_noise=0.6, box_noise=0.4, group_rule="fill", contrastive=contrastive
    ).double()


@pytest.mark.parametrize("case", goldens.read("dn_detr").manifest["cases"], ids=lambda case: case["prefix"])
def test_without_negatives_the_queries_are_those_of_the_official_dn_detr(case: dict[str, Any]) -> None:
    golden, prefix = goldens.read("dn_detr"), case["prefix"]
    module = Denoising(
        91, 7, num_denoising=case["scalar"], label_noise=2 * case["label_noise_scale"],
        box_noise=case["box_noise_scale"], group_rule="fixed", contrastive=False, box_noise_kind="center_and_size",
    ).double()  # fmt: skip
    module.label_embed.weight.data.copy_(goldens.rule_weight("label_enc.weight", (92, 7)))
    objects = goldens.packed_targets(golden.arrays, len(case["n_targets"]), torch.float64, prefix)
    noised = module(objects, dn_detr_draws(golden, prefix, case["scalar"] * len(objects.labels)))
    assert noised.num_groups == case["scalar"]
    assert noised.num_queries == case["pad_size"]
    assert torch.equal(noised.labels, golden.tensor(f"{prefix}known_labels"))
    # The last of the official columns is the indicator of denoising queries, which DINO has not
    content = golden.tensor(f"{prefix}query_label")[..., :-1]
    torch.testing.assert_close(noised.content, content, rtol=0, atol=1e-12)
    reference = golden.tensor(f"{prefix}query_bbox").sigmoid()
    torch.testing.assert_close(noised.reference, reference, rtol=0, atol=1e-12)
    mask = denoising_attn_mask(noised, golden.manifest["num_queries"], torch.device("cpu"))
    assert torch.equal(mask, golden.tensor(f"{prefix}attn_mask"))


def dn_detr_draws(golden: Golden, prefix: str, num_rows: int) -> Draws:
    """Return the draws in our form: DN-DETR draws the moves uniformly from [-1, 1), as 2u - 1."""
    found = [golden.tensor(name) for name in sorted(golden.arrays) if name.startswith(f"{prefix}draw")]
    flat, wide = [x for x in found if x.dim() == 1], [x for x in found if x.dim() == 2]
    label_chance, new_labels = flat or (torch.ones(num_rows), torch.zeros(0, dtype=torch.int64))
    move = 2 * wide[0] - 1 if wide else torch.zeros(num_rows, 4)
    return Draws(label_chance, new_labels, (move >= 0).double(), move.abs())


def targets() -> Targets:
    generator = torch.Generator().manual_seed(1)
    shares = torch.rand(6, 4, generator=generator, dtype=torch.float64)
    # Within the image, but with noise some reach beyond it
    boxes = torch.cat((0.15 + 0.7 * shares[:, :2], 0.1 + 0.2 * shares[:, 2:]), dim=1)
    return Targets(torch.tensor([0, 1, 2, 3, 1, 0]), boxes, (4, 0, 2))


@CONTRASTIVE
def test_queries_are_those_of_a_loop_over_single_boxes(contrastive: bool) -> None:
    """Positives move up to box_noise * half a side, negatives from there to twice as far (DINO, section 3.3)."""
    module, objects = denoising(contrastive=contrastive), targets()
    seeds = [5, 6, 7]
    noised = module(objects, module.draw_by_image(objects.counts, 4, seeds))
    num_groups, kinds = 9 // 4, ("positive", "negative") if contrastive else ("positive",)
    assert noised.num_groups == num_groups
    assert noised.num_queries == num_groups * len(kinds) * 4 == noised.content.shape[1]
    first = 0
    for image, (count, seed) in enumerate(zip(objects.counts, seeds, strict=True)):
        generator = torch.Generator().manual_seed(seed)
        shape = (num_groups, len(kinds), count)
        chance = torch.rand(shape, generator=generator)
        labels = torch.randint(0, 4, shape, generator=generator)
        signs = torch.randint(0, 2, (*shape, 4), generator=generator)
        fractions = torch.rand((*shape, 4), generator=generator).double()
        query = 0
        for group in range(num_groups):
            for number, kind in enumerate(kinds):
                for index in range(4):
                    found = noised.reference[image, query]
                    content = noised.content[image, query]
                    query += 1
                    if index >= count:
                        assert found.tolist() == [0.5] * 4
                        assert not content.any()
                        continue
                    draw = (group, number, index)
                    label = objects.labels[first + index]
                    if chance[draw] < 0.3:
                        label = labels[draw]
                    assert torch.equal(content, module.label_embed.weight[label])
                    x, y, width, height = objects.boxes[first + index].tolist()
                    corners = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
                    for side in range(4):
                        length = (width, height)[side % 2] / 2
                        share = fractions[draw][side].item() + (kind == "negative")
                        corners[side] += (1 if signs[draw][side] else -1) * share * length * 0.4
                    x0, y0, x1, y1 = (min(max(value, 0.0), 1.0) for value in corners)
                    expected = [(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]
                    assert found.tolist() == pytest.approx(expected, abs=1e-9)
        first += count


@CONTRASTIVE
def test_groups_see_neither_each_other_nor_are_seen(contrastive: bool) -> None:
    noised = denoising(contrastive=contrastive)(targets())
    mask = denoising_attn_mask(noised, 5, torch.device("cpu"))
    group_size = 8 if contrastive else 4
    for i in range(2 * group_size + 5):
        for j in range(2 * group_size + 5):
            is_seen = j >= 2 * group_size or (i < 2 * group_size and i // group_size == j // group_size)
            assert mask[i, j] == (not is_seen)


@CONTRASTIVE
def test_the_positives_of_each_group_are_matched_with_their_targets(contrastive: bool) -> None:
    """A query is matched if it is a copy of a target: without noise, and by its box."""
    module, objects = denoising(contrastive=contrastive), targets()
    rows = len(objects.labels) * 2 * module.num_blocks
    still = Draws(
        torch.ones(rows), torch.zeros(0, dtype=torch.int64), torch.ones(rows, 4), torch.zeros(rows, 4)
    )
    noised = module(objects, still)
    boxes = noised.reference[None]
    matches = denoising_matches(
        Denoised(Predictions(boxes, boxes), noised.num_groups, noised.group_size), objects, 1
    )
    image, _ = objects.indices()
    found = {
        (image[target].item(), query.item(), target.item())
        for query, target in zip(matches.queries[0], matches.targets[0], strict=True)
    }
    expected = {
        (image[target].item(), query, target)
        for target in range(6)
        for query in range(noised.num_queries)
        if (boxes[0, image[target], query] - objects.boxes[target]).abs().max() < 1e-9
    }
    assert found == expected
    assert len(found) == 12


def test_without_negatives_there_are_half_as_many_queries_in_training() -> None:
    images, objects = small_models.batch((2, 3))
    counts = []
    for contrastive in (True, False):
        model = build(dataclasses.replace(DINO, contrastive_denoising=contrastive))
        denoised = model.detector.train()(images, objects).denoised
        assert denoised is not None
        counts.append(denoised.predictions.boxes.shape[2])
    assert counts == [2 * 2 * 3, 2 * 3]  # 8 // 3 groups of 3 targets


def test_without_mixed_selection_the_content_is_that_of_the_chosen_tokens() -> None:
    torch.manual_seed(0)
    detector = build(dataclasses.replace(DINO, mixed_selection=False)).detector.eval()
    images, _ = small_models.batch((1, 1))
    features = detector.backbone(images.pixels)
    memory = detector.encoder(
        detector.neck([features[level] for level in detector.levels], images.padding_mask)
    )
    queries, _ = detector.queries(memory)
    assert not queries.content.requires_grad
    tokens, logits, _, _ = detector.queries.proposals(memory)
    for image in range(2):
        best = logits[image].amax(-1).argsort(descending=True)[:10]
        torch.testing.assert_close(queries.content[image], tokens[image, best])


@pytest.mark.parametrize("twice", [True, False])
def test_the_boxes_of_a_layer_train_the_layer_before_only_by_looking_forward_twice(twice: bool) -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(
        DINO, shared_class_heads=False, shared_box_heads=False, look_forward_twice=twice
    )
    detector = build(config).detector.eval()
    head = detector.decoder.box_heads[0]
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    images, _ = small_models.batch((1, 1))
    boxes = detector(images).predictions.boxes
    gradients = torch.autograd.grad(boxes[1].sum(), list(head.parameters()), allow_unused=True)
    assert all((gradient is not None and bool(gradient.any())) == twice for gradient in gradients)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            DinoConfig(num_classes=3, num_denoising=0, contrastive_denoising=False),
            "contrastive_denoising.*no effect with model.num_denoising=0",
        ),
        (
            DinoConfig(num_classes=3, num_decoder_layers=1, look_forward_twice=False),
            "look_forward_twice.*no effect with model.num_decoder_layers=1",
        ),
    ],
    ids=["no denoising", "one layer"],
)
def test_what_has_no_effect_is_an_error(config: DinoConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(dataclasses.replace(config, backbone=small_models.SMALL["backbone"]))
