"""Train and evaluate in one of the processes of a run. There is no Ray here.

Read `train` first: it is the complete loop. A `Training` is the state that the loop advances, and what a checkpoint
holds. Step, epoch, learning rate, order and random draws are functions of the position, the number of samples that the
optimizer has consumed over all epochs and workers.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from detrs.detector import Detector
from detrs.zoo import Model
from raydetr.config import ClusterConfig, Precision, RunConfig
from raydetr.data.batch import Batch, to_model
from raydetr.data.corrupt import CorruptSample, CorruptSampleLog
from raydetr.data.layout import Layout
from raydetr.data.stream import evaluation_batches, train_batches
from raydetr.data.transforms.transform import Transform
from raydetr.evaluation.detections import PackedDetections
from raydetr.evaluation.evaluator import drop_blank_batches, evaluate
from raydetr.shards.reader import Shards
from raydetr.training.counts import PendingCounts
from raydetr.training.nonfinite import BatchNormSnapshot, NonFiniteCause, SkippedStep, StepLoss, compute_loss
from raydetr.training.optim import Ema, build_optimizer, lr_factor, set_learning_rates
from raydetr.training.sync_norm import synchronize_norms
from raydetr.training.world import World


@dataclass(frozen=True)
class StepReport:
    """One optimizer step. `terms` are means over the workers; None between two multiples of `log_every_steps`."""

    step: int  # counted from 1
    position: int
    terms: dict[str, float] | None
    images_per_second: float
    skipped: SkippedStep | None = None
    corrupt: tuple[CorruptSample, ...] = ()  # of all workers
    is_evaluated: bool = False  # an evaluation follows


@dataclass(frozen=True)
class EvaluationReport:
    """State after an evaluation. `detections` are those of this worker's share of the split."""

    step: int
    epoch: int
    position: int
    detections: PackedDetections
    seconds: float  # from the first batch to the last one, of this worker
    corrupt: tuple[CorruptSample, ...] = ()  # images without predictions, of all workers


class Training:
    """Model, EMA, optimizer and position of a run, in one process."""

    def __init__(self, config: RunConfig, model: Model, num_samples: int, world: World) -> None:
        self.config, self.model, self.world, self.num_samples = config, model, world, num_samples
        self.detector = model.detector.to(world.device)
        if config.optim.activation_checkpointing:
            self.detector.enable_activation_checkpointing()
        self.criterion = model.criterion
        decay = config.optim.ema_decay
        self.ema = Ema(self.detector, decay) if decay is not None else None
        # After the copy for the EMA, which is only evaluated
        synchronize_norms(self.detector, world)
        self.optimizer = build_optimizer(self.detector, config.optim)
        self.replica = _replicate(self.detector, config.cluster, world)
        self.batch_norms = BatchNormSnapshot(self.detector)
        # Small gradients underflow in float16: the scaler multiplies the loss by the largest factor without overflow
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.optim.precision == "fp16")
        self.position = 0
        self.until_epoch: int | None = None  # where training ends for now; None: at its end
        self.should_stop: Callable[[], bool] = lambda: False  # asked on every worker, before every batch
        self.on_evaluation_batch: Callable[[], None] = lambda: None  # called for every batch of an evaluation
        # Entered for each part of a step; `raydetr profile` measures them
        self.part: Callable[[str], AbstractContextManager[object]] = nullcontext
        self.is_stopping = False  # a worker was asked to stop; the same on every worker
        # A process was killed after it had written the checkpoint of this position, and before it had evaluated it
        self.lacks_evaluation = False
        self.skipped_steps = 0  # because of NaN or infinity
        # CPU time of this process in its steps, with loading and without evaluations; not that of loader processes
        self.cpu_seconds = 0.0
        self.corrupt_log = CorruptSampleLog()  # all corrupt samples so far
        self.corrupt: tuple[CorruptSample, ...] = ()  # in the last step or evaluation, of all workers

    @property
    def weights(self) -> nn.Module:
        """The model that is evaluated: the EMA if there is one."""
        return self.detector if self.ema is None else self.ema.model

    @property
    def step(self) -> int:
        """Optimizer steps done so far."""
        return self.position // self.config.data.batch_size

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the complete run."""
        return self.steps_until(self.config.optim.epochs)

    @property
    def last_step(self) -> int:
        """Step at which training ends for now: the last of all, or that of `until_epoch`."""
        return self.total_steps if self.until_epoch is None else self.steps_until(self.until_epoch)

    def steps_until(self, epoch: int) -> int:
        """Return the number of steps after which every sample was used `epoch` times."""
        return math.ceil(epoch * self.num_samples / self.config.data.batch_size)

    def finished_epoch(self) -> int | None:
        """Return the epoch that the last step completed; None if it completed none."""
        # The last batch can reach beyond the last epoch, by several epochs if it is larger than the data
        epoch = min(self.position // self.num_samples, self.config.optim.epochs)
        return epoch if epoch > 0 and self.step == self.steps_until(epoch) else None

    def is_at_evaluation(self) -> bool:
        """Return whether the model is to be evaluated at this position."""
        epoch, config = self.finished_epoch(), self.config
        if epoch is None:
            return False
        return epoch % config.evaluation.every_epochs == 0 or epoch in (self.until_epoch, config.optim.epochs)

    def random_seed(self, position: int) -> int:
        """Return the seed of what is drawn for the sample at a position, on any rank and after any resume."""
        # A tuple of integers has the same hash in every process, unlike text. Generators take 64 bits without a sign
        return hash((self.config.seed, position)) & (2**63 - 1)

    def train_step(self, *micro_batches: Batch) -> dict[str, Tensor] | SkippedStep:
        """Run forward, backward and update on this worker's share of a global batch; return the loss terms.

        If the loss or the gradient of any worker is not finite, all workers skip the step: only the position
        advances. Masked samples are missing from the batches; a batch without samples adds nothing to the gradient.

        Args:
            micro_batches: the share, in as many batches on every worker; their gradients are accumulated.

        Raises:
            RuntimeError: another worker died, so that a collective failed; or the device is out of memory.
        """
        set_learning_rates(self.optimizer, lr_factor(self.config.optim, self.step, self.total_steps))
        # One collective for all counts, which overlaps with the forward pass where the model does not need them
        counts = PendingCounts.start(
            micro_batches, self.config.model.num_queries, self.world, is_stopping=self.should_stop()
        )
        self.batch_norms.save()  # the forward pass updates them, but the step may be skipped
        losses = []
        for batch in micro_batches:
            # Accumulate in this process, and communicate once, with the last micro-batch
            with nullcontext() if batch is micro_batches[-1] else self._no_sync():
                losses.append(self._forward_and_backward(batch, counts))
        with self.part("clipping"):
            self.scaler.unscale_(self.optimizer)
            norm = self._clip()  # of the averaged gradient: the same on every worker, so all decide alike
        outcome: dict[str, Tensor] | SkippedStep
        totals = counts.wait()
        # One copy to the host instead of three, because each waits for the device
        flags = torch.stack((torch.isfinite(norm), totals.num_corrupt > 0, totals.num_stopping > 0))
        is_finite, is_corrupt, self.is_stopping = flags.tolist()
        if is_finite:
            with self.part("optimizer"):
                self._update()
            outcome = {**_sum_terms(losses), "grad_norm": norm}
        else:
            outcome = self._skip(micro_batches, losses)
        self.optimizer.zero_grad(set_to_none=True)
        self.position += self.config.data.batch_size
        corrupt = [row for batch in micro_batches for row in batch.corrupt]
        self.corrupt = self._gather_corrupt(corrupt) if is_corrupt else ()
        return outcome

    def _forward_and_backward(self, batch: Batch, counts: PendingCounts) -> StepLoss:
        """Add the gradient of a micro-batch; return its part of the loss."""
        # Dropout draws from the global generators
        torch.manual_seed(self.random_seed(batch.positions[0] if batch.positions else batch.position))
        with self.part("transfer"):
            images, targets = to_model(batch, self.world.device)
        denoising = self.detector.denoising
        draws, max_targets = None, None
        if denoising is not None:
            max_targets = counts.wait().max_targets()
            seeds = [self.random_seed(position) for position in batch.positions]
            with self.part("denoising"):
                draws = denoising.draw_by_image(batch.counts, max_targets, seeds).to(self.world.device)
        # Synchronized statistics are the same on all workers, and stay so
        norms = BatchNormSnapshot(self.detector) if batch.is_blank and self.world.size == 1 else None
        with self._autocast():
            outputs = self.replica(images, targets, draws, max_targets)
        totals = counts.wait()
        # Returns NaN instead of raising: the other workers would wait forever for the gradient of this one
        with self.part("criterion"):
            loss = compute_loss(
                self.criterion,
                outputs,
                targets,
                totals.num_boxes,
                self.criterion.total_class_weight(totals.num_matched, totals.num_queries),
                is_blank=batch.is_blank,
            )
        with self.part("backward"):
            torch.autograd.backward(self.scaler.scale(loss.total))
        if norms is not None:
            norms.restore()
        return StepLoss(loss.total.detach(), loss.terms, loss.error)

    def evaluate(self, shards: Shards) -> PackedDetections | None:
        """Evaluate `weights` on this worker's share of a split, in the precision of training.

        With `evaluation.report`, which shows those of the largest, the arrays have the losses of the images.

        Returns:
            The detections; None, on every worker, if one was asked to stop before it was done.

        Raises:
            ShardError: an image is corrupt, and `data.on_corrupt` is "raise".
            RemoteError: a server of shards cannot be reached.
            LoaderError: a loader process died.
            RuntimeError: another worker died, so that a collective failed; or the device is out of memory.
        """
        data = self.config.data
        batches = evaluation_batches(
            shards,
            rank=self.world.rank,
            world_size=self.world.size,
            batch_size=data.eval_batch_size,
            transform=Transform(data.val_transform),
            num_workers=data.num_loader_workers,
            on_corrupt=data.on_corrupt,
        )
        corrupt: list[CorruptSample] = []
        detections = evaluate(
            self.weights,
            self.model.postprocess,
            drop_blank_batches(self._until_stopped(batches), corrupt),
            shards.label_map,
            self.world.device,
            self._autocast,
            self.criterion if self.config.evaluation.report else None,
        )
        self.is_stopping = any(self.world.all_gather(self.is_stopping))
        if self.is_stopping:
            return None
        self.corrupt = self._gather_corrupt(replace(row, position=self.position) for row in corrupt)
        return detections

    def _until_stopped(self, batches: Iterable[Batch | None]) -> Iterator[Batch | None]:
        for batch in batches:
            if self.should_stop():
                self.is_stopping = True
                return
            self.on_evaluation_batch()
            yield batch

    def mean_terms(self, terms: dict[str, Tensor]) -> dict[str, float]:
        """Return the loss terms averaged over the workers, and the learning rates."""
        stacked = torch.stack([term.detach().float() for term in terms.values()])
        means = (self.world.all_reduce_async(stacked).wait() / self.world.size).tolist()
        rates = {f"lr/{group['name']}": group["lr"] for group in self.optimizer.param_groups}
        return {**dict(zip(terms, means, strict=True)), **rates}

    def _gather_corrupt(self, own: Iterable[CorruptSample]) -> tuple[CorruptSample, ...]:
        return tuple(row for rows in self.world.all_gather(tuple(own)) for row in rows)

    def _autocast(self) -> torch.autocast:
        return autocast(self.config.optim.precision, self.world.device)

    def _update(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update()

    def _skip(self, batches: Sequence[Batch], losses: Sequence[StepLoss]) -> SkippedStep:
        """Undo the changes of the forward pass; gather the causes of all workers."""
        self.batch_norms.restore()
        # Of several micro-batches, the first that is not finite
        reasons = [loss.reason() for loss in losses]
        number = next((i for i, reason in enumerate(reasons) if reason is not None), 0)
        batch, terms = batches[number], losses[number].terms
        causes = self._causes(batch, reasons[number])
        self.skipped_steps += bool(causes)
        # Without causes, the gradient overflowed: lower the scale. Other problems do not depend on the scale: keep it.
        self.scaler.update(self.scaler.get_scale() if causes else None)
        seed = self.random_seed(batch.positions[0] if batch.positions else batch.position)
        return SkippedStep(self.step + 1, seed, causes, batch, terms)

    def _causes(self, batch: Batch, reason: str | None) -> tuple[NonFiniteCause, ...]:
        """Gather the causes of all workers; empty if a smaller gradient scale can help."""
        gathered = self.world.all_gather((reason, tuple(batch.image_ids.tolist())))
        if all(reason is None for reason, _ in gathered):
            if self.scaler.get_scale() > 1:
                return ()
            gathered = [
                ("the loss is finite, but not the gradient of all workers", ids) for _, ids in gathered
            ]
        return tuple(
            NonFiniteCause(rank, reason, ids)
            for rank, (reason, ids) in enumerate(gathered)
            if reason is not None
        )

    def _no_sync(self) -> AbstractContextManager[None]:
        """Keep gradients in this process."""
        if isinstance(self.replica, DistributedDataParallel):
            return self.replica.no_sync()
        return nullcontext()

    def _clip(self) -> Tensor:
        """Clip the gradient; return its norm before clipping, which is NaN or infinite if any element is."""
        limit = self.config.optim.clip_max_norm
        return nn.utils.clip_grad_norm_(self.detector.parameters(), math.inf if limit is None else limit)


def train(
    training: Training, train_shards: Shards, val_shards: Shards
) -> Iterator[StepReport | EvaluationReport]:
    """Train from the current position to the end; yield a report for every step and every evaluation.

    Raises:
        ShardError: a sample is corrupt, and `data.on_corrupt` is "raise".
        RemoteError: a server of shards cannot be reached.
        LoaderError: a loader process died.
        RuntimeError: another worker died, so that a collective failed; or the device is out of memory.
    """
    config, world = training.config, training.world
    if training.lacks_evaluation:
        yield from _evaluate(training, val_shards)
    if training.is_stopping or training.step >= training.last_step:
        return
    layout = Layout(config.data.batch_size, world.size, config.data.micro_batch_size)
    batches = training_batches(config, train_shards, layout, rank=world.rank, position=training.position)
    began, cpu_began = time.perf_counter(), time.process_time()
    training.detector.train()
    while True:
        outcome = training.train_step(*islice(batches, layout.num_micro_batches))
        skipped = outcome if isinstance(outcome, SkippedStep) else None
        now = time.perf_counter()
        rate, began = config.data.batch_size / (now - began), now
        is_logged = training.step % config.tracking.log_every_steps == 0
        means = training.mean_terms(outcome) if is_logged and not isinstance(outcome, SkippedStep) else None
        training.cpu_seconds += time.process_time() - cpu_began
        is_evaluated = training.is_at_evaluation()
        yield StepReport(
            training.step, training.position, means, rate, skipped, training.corrupt, is_evaluated
        )
        if training.is_stopping:
            return
        if is_evaluated:
            yield from _evaluate(training, val_shards)
            began = time.perf_counter()
        cpu_began = time.process_time()
        if training.is_stopping or training.step >= training.last_step:
            return


def training_batches(
    config: RunConfig, shards: Shards, layout: Layout, *, rank: int, position: int
) -> Iterator[Batch]:
    """Yield the micro-batches of a rank from a position on, indefinitely; see `train_batches`."""
    return train_batches(
        shards,
        seed=config.seed,
        position=position,
        layout=layout,
        rank=rank,
        transform=Transform(config.data.train_transform),
        num_workers=config.data.num_loader_workers,
        on_corrupt=config.data.on_corrupt,
    )


def _evaluate(training: Training, val_shards: Shards) -> Iterator[EvaluationReport]:
    """Evaluate, and yield the report; none if a worker is asked to stop meanwhile: the resumed run evaluates again."""
    epoch = training.finished_epoch()
    assert epoch is not None
    began = time.perf_counter()
    detections = training.evaluate(val_shards)
    if detections is None:
        return
    seconds = time.perf_counter() - began
    training.lacks_evaluation = False
    yield EvaluationReport(training.step, epoch, training.position, detections, seconds, training.corrupt)


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Return the context of a forward pass in a precision of `optim.precision`."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


def _sum_terms(losses: Sequence[StepLoss]) -> dict[str, Tensor]:
    """Return the loss and its terms over the micro-batches of a step: sums of losses, means of other metrics."""
    terms = {"loss": torch.stack([loss.total for loss in losses]).sum()}
    for name in losses[0].terms:
        values = torch.stack([loss.terms[name] for loss in losses])
        terms[name] = values.sum() if name.startswith("loss") else values.mean()
    return terms


def _replicate(detector: Detector, config: ClusterConfig, world: World) -> nn.Module:
    if world.size == 1:
        return detector
    # No buffers are sent before a forward pass: frozen ones are equal, and batch norm is synchronized. torch 2.13
    # renamed the setting
    parameters = inspect.signature(DistributedDataParallel.__init__).parameters
    sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
    settings: dict[str, Any] = {"gradient_as_bucket_view": True, sync_buffers: False}
    replica = DistributedDataParallel(detector, **settings)
    if config.bf16_gradients:
        # A lambda, because torch compares annotations, which are text in this file
        replica.register_comm_hook(None, lambda state, bucket: _average_in_bf16(bucket.buffer()))
    return replica


def _average_in_bf16(gradients: Tensor) -> torch.futures.Future[Tensor]:
    """Average gradients over the workers in bfloat16, in place; torch's own hook for this is for NCCL only."""
    rounded = gradients.to(torch.bfloat16).div_(dist.get_world_size())
    pending = dist.all_reduce(rounded, async_op=True).get_future()
    averaged: torch.futures.Future[Tensor] = pending.then(lambda done: gradients.copy_(done.value()[0]))
    return averaged
