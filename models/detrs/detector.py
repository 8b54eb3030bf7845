"""A detector: backbone, neck, encoder, queries, decoder; with denoising queries where a paper has them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from detrs.backbone import ResNet
from detrs.decoder import Decoder
from detrs.denoising import ContrastiveDenoising, Draws, NoisedQueries, prepend
from detrs.encoder import Encoder
from detrs.neck import Neck
from detrs.structures import Denoised, Images, Outputs, Predictions, Queries, Targets

STRIDES = (4, 8, 16, 32)


class Detector(nn.Module):
    """The parts in order; which ones is the zoo's choice.

    Args:
        backbone: all four feature levels.
        strides: the strides of the levels the neck gets ("32" means layer4, also when it is dilated).
        neck, encoder, queries, decoder: see there.
        denoising: makes denoising queries in training.
    """

    def __init__(
        self,
        backbone: ResNet,
        strides: Sequence[int],
        neck: Neck,
        encoder: Encoder,
        queries: nn.Module,
        decoder: Decoder,
        denoising: ContrastiveDenoising | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.levels = backbone, [STRIDES.index(stride) for stride in strides]
        self.neck, self.encoder, self.queries, self.decoder = neck, encoder, queries, decoder
        self.denoising = denoising

    def forward(self, images: Images, targets: Targets | None = None, draws: Draws | None = None) -> Outputs:
        """Predict.

        Args:
            images: normalised, padded at the right and at the bottom.
            targets: only used for denoising, in training.
            draws: replaces the random numbers of denoising.
        """
        features = self.backbone(images.pixels)
        memory = self.neck([features[level] for level in self.levels], images.padding)
        memory = self.encoder(memory)
        queries, first_stage = self.queries(memory)
        noised = None
        if self.denoising is not None:
            if self.training and targets is not None:
                noised = self.denoising(targets, draws)
            queries = with_denoising(queries, noised, self.denoising)
        predictions = self.decoder(queries, memory)
        if noised is None:
            return Outputs(predictions, first_stage)
        dn, predictions = split(predictions, noised.num_slots)
        return Outputs(predictions, first_stage, Denoised(dn, noised.num_groups, noised.block))


def with_denoising(
    queries: Queries, noised: NoisedQueries | None, denoising: ContrastiveDenoising
) -> Queries:
    """Denoising queries in front, if any; the label embedding is always part of the graph."""
    if noised is not None:
        queries = prepend(noised, queries)
    # with DistributedDataParallel every parameter needs a gradient, also in a batch without targets
    tie = denoising.label_embed.weight[0, 0] * 0
    return Queries(queries.content + tie, queries.pos, queries.reference, queries.blocked)


def split(predictions: Predictions, num_slots: int) -> tuple[Predictions, Predictions]:
    """The predictions of the first `num_slots` queries and of the others."""
    logits, boxes = predictions.logits, predictions.boxes
    return (
        Predictions(logits[:, :, :num_slots], boxes[:, :, :num_slots]),
        Predictions(logits[:, :, num_slots:], boxes[:, :, num_slots:]),
    )
