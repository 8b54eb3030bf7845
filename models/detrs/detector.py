"""Compose a detector from backbone, neck, encoder, queries, decoder and, optionally, denoising queries."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from detrs.backbone import ResNet
from detrs.decoder import Decoder
from detrs.denoising import Denoising, Draws, NoisedQueries, prepend
from detrs.encoder import Encoder
from detrs.neck import Neck
from detrs.structures import Denoised, Images, Outputs, Predictions, Queries, Targets

STRIDES = (4, 8, 16, 32)


class Detector(nn.Module):
    """Run the parts of a model in order.

    Args:
        backbone: computes four feature levels.
        strides: strides of the levels that the neck gets (32 means layer4, also when it is dilated).
        neck, encoder, queries, decoder: see their classes.
        denoising: adds denoising queries in training.
        min_tokens: number of encoder tokens that the queries are chosen from, at least; smaller images are padded.
    """

    def __init__(
        self,
        backbone: ResNet,
        strides: Sequence[int],
        neck: Neck,
        encoder: Encoder,
        queries: nn.Module,
        decoder: Decoder,
        denoising: Denoising | None = None,
        min_tokens: int = 0,
    ) -> None:
        super().__init__()
        self.strides, self.min_tokens = tuple(strides), min_tokens
        self.backbone, self.levels = backbone, [STRIDES.index(stride) for stride in strides]
        self.neck, self.encoder, self.queries, self.decoder = neck, encoder, queries, decoder
        self.denoising = denoising

    def forward(
        self,
        images: Images,
        targets: Targets | None = None,
        draws: Draws | None = None,
        max_targets: int | None = None,
    ) -> Outputs:
        """Predict class logits and boxes.

        Args:
            images: the batch.
            targets: used for denoising queries only, in training mode.
            draws: random numbers to use for denoising instead of new ones.
            max_targets: for denoising: number of targets of the image with the most in the global batch; None: in this
                one.
        """
        images = images.padded(*self._padded_size(*images.pixels.shape[2:]))
        features = self.backbone(images.pixels)
        memory = self.neck([features[level] for level in self.levels], images.padding_mask)
        memory = self.encoder(memory)
        queries, first_stage = self.queries(memory)
        noised = None
        if self.denoising is not None:
            if self.training and targets is not None:
                noised = self.denoising(targets, draws, max_targets)
            queries = with_denoising(queries, noised, self.denoising)
        predictions = self.decoder(queries, memory)
        if noised is None:
            return Outputs(predictions, first_stage)
        dn, predictions = split(predictions, noised.num_queries)
        return Outputs(predictions, first_stage, Denoised(dn, noised.num_groups, noised.group_size))

    def enable_activation_checkpointing(self) -> None:
        """Compute activations again in the backward pass instead of keeping them: slower, with less memory.

        A backbone whose batch norms are trained keeps its activations: a second forward pass would update their
        statistics twice.
        """
        self.encoder.activation_checkpointing = self.decoder.activation_checkpointing = True
        has_statistics = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.backbone.modules())
        self.backbone.activation_checkpointing = not has_statistics

    def _padded_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the size in pixels, enlarged at the shorter side until there are enough tokens for the queries."""
        while self._num_tokens(height, width) < self.min_tokens:
            height, width = (height + 8, width) if height <= width else (height, width + 8)
        return height, width

    def _num_tokens(self, height: int, width: int) -> int:
        # A dilated layer4 has the resolution of layer3
        strides = [min(stride, 16) if self.backbone.dilation else stride for stride in self.strides]
        strides += [strides[-1] * 2**i for i in range(1, 1 + self.neck.num_levels - len(strides))]
        return sum(-(-height // stride) * -(-width // stride) for stride in strides)


def with_denoising(queries: Queries, noised: NoisedQueries | None, denoising: Denoising) -> Queries:
    """Prepend the denoising queries, if any; make the result depend on the label embedding in any case."""
    if noised is not None:
        queries = prepend(noised, queries)
    # DistributedDataParallel waits for a gradient of every parameter, also in a batch without targets
    zero = denoising.label_embed.weight[0, 0] * 0
    return Queries(queries.content + zero, queries.pos, queries.reference, queries.attn_mask)


def split(predictions: Predictions, num_first: int) -> tuple[Predictions, Predictions]:
    """Split predictions into those of the first `num_first` queries and the rest."""
    logits, boxes = predictions.logits, predictions.boxes
    return (
        Predictions(logits[:, :, :num_first], boxes[:, :, :num_first]),
        Predictions(logits[:, :, num_first:], boxes[:, :, num_first:]),
    )
