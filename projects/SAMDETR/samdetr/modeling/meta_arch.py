"""SAMDETR, the meta-architecture: from images to losses or detections."""

from itertools import pairwise

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone, detector_postprocess
from detectron2.modeling.backbone import Backbone
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from ..errors import UserError
from ..ops.runtime import upload
from .backbone import optimize_backbone
from .boxes import xyxy_to_cxcywh
from .criterion import NonFinitePredictionError, SetCriterion
from .decoder import Decoder
from .encoder import build_encoder
from .feature_projection import FeatureProjection
from .pixel_head import DenseHead
from .postprocessing import select_detections
from .query_generator import build_query_generator
from .structures import FeatureLevel, ImageTarget, Predictions, QueryBatch

__all__ = ["SAMDETR", "SetDetector", "name_of", "used_features"]


class SetDetector(nn.Module):
    """What SAM-DETR has in common with other detectors that predict a set: images come in, losses or detections go out.

    A subclass says how it predicts: ``encode(images, image_sizes)`` turns normalised images into what ``decode`` takes, and
    ``decode(encoded, targets)`` returns the :class:`Predictions` and the :class:`QueryBatch` that they were made from, or None
    if there are neither denoising queries nor proposals; see :class:`SAMDETR`. It sets the attributes ``query_generator``, None
    for a detector that has queries of its own, and ``dense_head``, None if it has none.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        in_features: list[str],
        criterion: SetCriterion,
        num_classes: int,
        max_detections: int,
        pixel_mean: list[float],
        pixel_std: list[float],
    ):
        """
        Args:
            backbone: follows detectron2's backbone interface; optimised in place, see :func:`optimize_backbone`.
            in_features: names of the backbone's outputs to use, from the finest to the coarsest.
            criterion: computes the losses.
            num_classes: number of classes K; labels in training are in [0, K).
            max_detections: how many detections to return per image.
            pixel_mean, pixel_std: of each channel, in the units of the images (0 to 255).
        """
        super().__init__()
        self.backbone = optimize_backbone(backbone)
        self.in_features = list(in_features)
        self.criterion = criterion
        self.num_classes = num_classes
        self.max_detections = max_detections
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    @staticmethod
    def shared_parts(cfg) -> dict:
        """Return the arguments that all of these detectors have in common."""
        return {
            "backbone": build_backbone(cfg),
            "in_features": cfg.MODEL.SAMDETR.IN_FEATURES,
            "criterion": SetCriterion(cfg),
            "num_classes": cfg.MODEL.SAMDETR.NUM_CLASSES,
            "max_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def lr_factor(self, name: str) -> float:
        """Return the factor of the learning rate for the parameter ``name``; not 1 where a detector's authors say so."""
        return 1.0

    def forward(self, batched_inputs: list[dict], normalizers: Tensor | None = None) -> dict[str, Tensor] | list[dict]:
        """Compute the losses of a batch of images in training, and detections in evaluation.

        Args:
            batched_inputs: detectron2's standard input, one dict per image: ``image`` (3, H, W) in 0 to 255; in training
                ``instances`` with ``gt_boxes`` and ``gt_classes``; in evaluation ``height`` and ``width`` of the output,
                by default those of the image.
            normalizers: what to divide the losses by, if this is a part of a larger batch; see
                :meth:`loss_normalizers`.

        Returns:
            In training, the weighted losses by name. In evaluation, one ``{"instances": Instances}`` per image, with
            ``pred_boxes``, ``scores``, ``pred_classes`` and ``query_indices``, best first; boxes are in pixels of the output
            and clipped.

        Raises:
            UserError: in training, a ground-truth label or box is unusable, or a prediction is not finite (with
                ``SOLVER.NON_FINITE "stop"``); names the image.
        """
        images = self.preprocess_images(batched_inputs)
        encoded = self.encode(images.tensor, images.image_sizes)
        if not self.training:
            predictions, _ = self.decode(encoded)
            last = predictions.logits[-1], predictions.boxes[-1]
            detections = select_detections(*last, images.image_sizes, self.max_detections)
            return [{"instances": _in_output_pixels(*pair)} for pair in zip(detections, batched_inputs)]
        targets = self.prepare_targets(batched_inputs)
        predictions, queries = self.decode(encoded, targets)
        if normalizers is None:
            normalizers = self._normalizers([targets])
        try:
            denoising = None if queries is None else queries.denoising
            losses = self.criterion(predictions, targets, denoising, normalizers)
            if queries is not None and queries.proposals is not None:
                losses |= self.criterion.matching_losses(
                    queries.proposals, targets, normalizers[0], prefix="loss_proposal"
                )
            if self.dense_head is not None:
                losses |= self.dense_head.losses(encoded, targets, self.criterion, normalizers[0])
            return losses
        except NonFinitePredictionError as error:
            raise UserError(
                f"The model's predictions for {name_of(batched_inputs[error.image_index])} are not finite. A smaller "
                "learning rate (SOLVER.BASE_LR), gradient clipping (SOLVER.CLIP_GRADIENTS) or a look at this image and "
                "its boxes helps."
            ) from error

    def loss_normalizers(self, parts: list[list[dict]]) -> Tensor:
        """Return what to divide the losses of each part of a batch by, so that they add up to those of the whole batch.

        Args:
            parts: the parts of the batch on this process, each in the format of :meth:`forward`.

        Returns:
            See :meth:`samdetr.modeling.criterion.SetCriterion.normalizers`.
        """
        return self._normalizers([self.prepare_targets(part) for part in parts])

    def _normalizers(self, parts: list[list[ImageTarget]]) -> Tensor:
        num_boxes = sum(len(target) for part in parts for target in part)
        generator = self.query_generator
        num_denoising = 0 if generator is None else sum(generator.num_denoising(part) for part in parts)
        return self.criterion.normalizers(num_boxes, num_denoising, self.device)

    @torch.no_grad()
    def predict(self, batched_inputs: list[dict]) -> dict[str, Tensor]:
        """Return the raw outputs of every decoder layer, before post-processing, in the order of the queries.

        Args:
            batched_inputs: see :meth:`forward`; ground truth is ignored.

        Returns:
            ``pred_logits`` (L, B, Q, K) and ``pred_boxes`` (L, B, Q, 4), normalised (cx, cy, w, h).
        """
        images = self.preprocess_images(batched_inputs)
        predictions, _ = self.decode(self.encode(images.tensor, images.image_sizes))
        return {"pred_logits": predictions.logits, "pred_boxes": predictions.boxes}

    def preprocess_images(self, batched_inputs: list[dict]) -> ImageList:
        """Normalise the images, and pad them at the right and at the bottom to the size of the largest."""
        # Training's images wait in pinned memory.
        images = [inputs["image"].to(self.device, non_blocking=True) for inputs in batched_inputs]
        images = [(image - self.pixel_mean) / self.pixel_std for image in images]
        return ImageList.from_tensors(
            images, self.backbone.size_divisibility, padding_constraints=self.backbone.padding_constraints
        )

    def prepare_targets(self, batched_inputs: list[dict]) -> list[ImageTarget]:
        """Return the ground truth, normalised by each image's own size, without boxes that have no area."""
        for inputs in batched_inputs:
            if "instances" not in inputs:
                raise UserError(f"{name_of(inputs)} has no 'instances', which training needs; an empty one will do.")
        instances = [inputs["instances"] for inputs in batched_inputs]
        # All images at once, because with many small images the overhead of separate calls would dominate.
        labels = torch.cat([x.gt_classes for x in instances])
        boxes = torch.cat([x.gt_boxes.tensor.float() for x in instances])
        finite, known = boxes.isfinite().all(1), (labels >= 0) & (labels < self.num_classes)
        if not (finite & known).all():
            self.refuse_targets(batched_inputs)
        image = [i for i, x in enumerate(instances) for _ in range(len(x))]
        image = torch.tensor(image, dtype=torch.long, device=boxes.device)
        sizes = torch.tensor([x.image_size[::-1] * 2 for x in instances]).to(boxes)  # (width, height) twice
        boxes = xyxy_to_cxcywh(boxes) / sizes[image]
        keep = (boxes[:, 2:] > 0).all(1)
        labels, boxes, image = labels[keep], boxes[keep], image[keep]
        counts = torch.bincount(image, minlength=len(instances)).tolist()
        return [
            ImageTarget(*target)
            for target in zip(*(upload(values, self.device).split(counts) for values in (labels, boxes)))
        ]

    def refuse_targets(self, batched_inputs: list[dict]) -> None:
        """Raise an error that names the image whose ground truth is unusable."""
        for inputs in batched_inputs:
            labels, boxes = inputs["instances"].gt_classes, inputs["instances"].gt_boxes.tensor.float()
            if not boxes.isfinite().all():
                raise UserError(f"{name_of(inputs)} has a box that is not finite: {boxes.tolist()}.")
            if len(labels) and not 0 <= labels.min() <= labels.max() < self.num_classes:
                raise UserError(
                    f"{name_of(inputs)} has class labels from {labels.min()} to {labels.max()}, but "
                    f"MODEL.SAMDETR.NUM_CLASSES is {self.num_classes}: set it to the dataset's number of classes."
                )


@META_ARCH_REGISTRY.register()
class SAMDETR(SetDetector):
    """SAM-DETR and SAM-DETR++ (https://arxiv.org/abs/2203.06883, https://arxiv.org/abs/2207.14172)."""

    @configurable
    def __init__(
        self,
        *,
        feature_projection: FeatureProjection,
        encoder: nn.Module,
        query_generator: nn.Module,
        decoder: Decoder,
        dense_head: DenseHead | None = None,
        kernels: str = "torch",
        **options,
    ):
        """
        Args:
            feature_projection: turns the chosen features into levels.
            encoder: see :data:`samdetr.modeling.encoder.ENCODER_REGISTRY`.
            query_generator: see :data:`samdetr.modeling.query_generator.QUERY_GENERATOR_REGISTRY`.
            decoder: predicts from queries and levels.
            dense_head: a further head that is used in training only.
            kernels: "torch", or "triton" where that runs, for attention and sampling: of every part that has an attribute
                ``kernels``.
            options: see :class:`SetDetector`.
        """
        super().__init__(**options)
        self.feature_projection = feature_projection
        self.encoder = encoder
        self.query_generator = query_generator
        self.decoder = decoder
        self.dense_head = dense_head
        for part in self.modules():
            if hasattr(part, "kernels"):
                part.kernels = kernels

    @classmethod
    def from_config(cls, cfg):
        return {
            **cls.shared_parts(cfg),
            "encoder": build_encoder(cfg),
            "query_generator": build_query_generator(cfg),
            "decoder": Decoder(cfg),
            "dense_head": DenseHead(cfg) if cfg.MODEL.SAMDETR.DENSE_HEAD.ENABLED else None,
        }

    @staticmethod
    def shared_parts(cfg, projection: type[FeatureProjection] = FeatureProjection) -> dict:
        """Return the arguments that detectors with another encoder and decoder have in common with this one.

        Args:
            cfg: the config.
            projection: what turns the backbone's maps into levels.
        """
        node, parts = cfg.MODEL.SAMDETR, SetDetector.shared_parts(cfg)
        features = used_features(cfg, parts["backbone"])
        return {
            **parts,
            "feature_projection": projection(
                in_channels=[feature.channels for feature in features],
                strides=[feature.stride for feature in features],
                dim=node.HIDDEN_DIM,
                num_groups=node.PROJECTION_NUM_GROUPS,
                temperature=node.POSITION_TEMPERATURE,
            ),
            "kernels": node.KERNELS,
        }

    def encode(self, images: Tensor, image_sizes: list[tuple[int, int]] | None) -> list[FeatureLevel]:
        """Turn images into the encoded levels.

        Args:
            images: (B, 3, H, W), normalised and padded.
            image_sizes: height and width of each image, without padding; None if nothing is padded.

        Returns:
            The levels, from the finest to the coarsest.
        """
        features = self.backbone(images.contiguous(memory_format=torch.channels_last))
        levels = self.feature_projection([features[name] for name in self.in_features], image_sizes)
        return self.encoder(levels)

    def decode(
        self, levels: list[FeatureLevel], targets: list[ImageTarget] | None = None
    ) -> tuple[Predictions, QueryBatch]:
        """Predict from the encoded levels.

        Args:
            levels: of :meth:`encode`.
            targets: B targets in training, else None.

        Returns:
            The decoder's predictions, and the queries that it was given.
        """
        queries = self.query_generator(levels, targets)
        return self.decoder(queries, levels), queries


def name_of(inputs: dict) -> str:
    """Return the name of an image for error messages."""
    return f"image {inputs.get('file_name', inputs.get('image_id', '(without file_name)'))}"


def used_features(cfg, backbone: Backbone) -> list[ShapeSpec]:
    """Return channels and strides of the backbone's outputs that ``MODEL.SAMDETR.IN_FEATURES`` names.

    Raises:
        UserError: the backbone has no such outputs, or they are not in order.
    """
    node = cfg.MODEL.SAMDETR
    shapes = backbone.output_shape()
    missing = [name for name in node.IN_FEATURES if name not in shapes]
    if missing or not node.IN_FEATURES:
        raise UserError(
            f"MODEL.SAMDETR.IN_FEATURES is {list(node.IN_FEATURES)}, but the backbone {cfg.MODEL.BACKBONE.NAME} "
            f"gives {sorted(shapes)}: choose from these, or change what the backbone gives "
            "(for a ResNet, MODEL.RESNETS.OUT_FEATURES)."
        )
    features = [shapes[name] for name in node.IN_FEATURES]
    if any(fine.stride >= coarse.stride for fine, coarse in pairwise(features)):
        raise UserError(
            f"MODEL.SAMDETR.IN_FEATURES {list(node.IN_FEATURES)} have strides {[f.stride for f in features]}: "
            "name them from the finest to the coarsest."
        )
    return features


def _in_output_pixels(detections: Instances, inputs: dict) -> Instances:
    """Scale detections to the image's own size, and clip them to it.

    Raises:
        UserError: a box is not finite.
    """
    height, width = detections.image_size
    try:
        return detector_postprocess(detections, inputs.get("height", height), inputs.get("width", width))
    except AssertionError as error:  # detectron2's, which looks at every box in any case
        raise UserError(
            f"The model's predictions for {name_of(inputs)} are not finite: its weights are of no use. Name others."
        ) from error
