"""DETR, Conditional DETR, DAB-DETR, DN-DETR and Deformable DETR: the networks of the library ``transformers``.

``MODEL.TRANSFORMERS.DETECTOR`` names the network. It stands between this project's own parts: the backbone before it, heads,
matcher, losses and post-processing behind it. DN-DETR is DAB-DETR with this project's ``DenoisingQueryGenerator``. What is
the published detectors' and what is not: docs/baselines.md. ``transformers`` is imported when such a model is built.

Shapes: B images, Q queries, C model width, K classes, L decoder layers; a pixel mask is True at pixels that are not padded.
"""

import contextlib
import warnings
from collections.abc import Iterator

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import import_extra
from ...ops.runtime import upload
from ..deformable_attention import initial_offsets
from ..feature_projection import make_padding_mask
from ..layers import MLP, start_heads_, start_projections_, xavier_uniform_matrices_
from ..meta_arch import SetDetector, used_features
from ..query_generator import DenoisingQueryGenerator
from ..structures import ImageTarget, Predictions, QueryBatch

__all__ = ["ConvEncoder", "TransformersDETR", "build_network", "start_as_published_"]

# How transformers' classes begin, and the detectors' type in its configs.
_PREFIXES = {
    "detr": "Detr",
    "conditional_detr": "ConditionalDetr",
    "dab_detr": "DabDetr",
    "deformable_detr": "DeformableDetr",
}


class ConvEncoder(nn.Module):
    """Return a backbone's features as the conv encoders of ``transformers`` do, in whose place this module stands."""

    def __init__(self, backbone: Backbone, in_features: list[str]):
        super().__init__()
        self.not_registered = (backbone,)  # it is a part of the detector, whose state must hold it once
        self.in_features = in_features

    def forward(self, images: Tensor, pixel_mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the maps (B, C_v, H_v, W_v) of (B, 3, H, W) images, and the pixel mask (B, H_v, W_v) of each."""
        features = self.not_registered[0](images.contiguous(memory_format=torch.channels_last))
        maps = [features[name] for name in self.in_features]
        return [(x, F.interpolate(pixel_mask[None].float(), size=x.shape[-2:])[0].bool()) for x in maps]


def build_network(
    *,
    detector: str,
    channels: list[int],
    num_levels: int,
    dim: int,
    num_heads: int,
    num_queries: int,
    num_encoder_layers: int,
    num_decoder_layers: int,
    encoder_feedforward_dim: int,
    decoder_feedforward_dim: int,
    encoder_points: int,
    decoder_points: int,
    dropout: float,
) -> nn.Module:
    """Build a network of ``transformers`` without a backbone, initialised as published.

    Args:
        detector: "detr", "conditional_detr", "dab_detr" or "deformable_detr".
        channels: of each of the backbone's maps; Deformable DETR takes several, the others one.
        num_levels: of Deformable DETR, the backbone's maps and further ones, each at half the size of the one before.
        dim, num_heads, num_queries: width C, attention heads and queries Q.
        num_encoder_layers, num_decoder_layers, encoder_feedforward_dim, decoder_feedforward_dim: of both transformers.
        encoder_points, decoder_points: of Deformable DETR, the points that each head samples in each level.
        dropout: probability, for what attention and feed-forward layers put out, for attention's weights, and inside the
            feed-forward layers.

    Raises:
        UserError: ``transformers`` is not installed.
    """
    transformers = import_extra("transformers", "transformers")
    # Its networks build a backbone of their own, which is replaced; a small one, and without ``timm``.
    stand_in = transformers.ResNetConfig(
        embedding_size=1,
        hidden_sizes=[1] * len(channels),
        depths=[1] * len(channels),
        layer_type="basic",
        out_features=[f"stage{i + 1}" for i in range(len(channels))],
    )
    options = {
        "backbone_config": stand_in,
        "num_queries": num_queries,
        "encoder_layers": num_encoder_layers,
        "decoder_layers": num_decoder_layers,
        "encoder_ffn_dim": encoder_feedforward_dim,
        "decoder_ffn_dim": decoder_feedforward_dim,
        "encoder_attention_heads": num_heads,
        "decoder_attention_heads": num_heads,
        "hidden_size" if detector == "dab_detr" else "d_model": dim,
        "dropout": dropout,
        "attention_dropout": dropout,
        "activation_dropout": dropout,
    }
    if detector == "deformable_detr":
        options |= {
            "num_feature_levels": num_levels,
            "encoder_n_points": encoder_points,
            "decoder_n_points": decoder_points,
        }
    prefix = _PREFIXES[detector]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You'd better set embed_dim")  # for kernels that are not used here
        network = getattr(transformers, f"{prefix}Model")(getattr(transformers, f"{prefix}Config")(**options))
    _set_conv_encoder(network, None)
    if detector != "dab_detr":
        network.encoder.dropout = 0.0  # of the encoder's input, which the authors leave whole
    if detector == "deformable_detr":
        for projection, number in zip(network.input_proj, [*channels, channels[-1]]):
            conv = projection[0]
            projection[0] = nn.Conv2d(number, dim, conv.kernel_size, conv.stride, conv.padding)
        network.level_embed = nn.Parameter(torch.empty(num_levels, dim))
    else:
        network.input_projection = nn.Conv2d(channels[-1], dim, kernel_size=1)
    start_as_published_(network)
    return network


def _set_conv_encoder(network: nn.Module, encoder: nn.Module | None) -> None:
    """Replace what turns images into feature maps."""
    if network.config.model_type == "dab-detr":
        network.backbone.conv_encoder = encoder
    else:
        network.backbone = encoder


@torch.no_grad()
def start_as_published_(network: nn.Module) -> None:
    """Initialise a network as the detectors' authors do; ``transformers`` draws everything from N(0, 0.02).

    Layers start as torch's own do, embeddings with it from N(0, 1); matrices of encoder and decoder are Xavier-uniform.
    """
    for module in network.modules():
        if callable(getattr(module, "reset_parameters", None)):
            module.reset_parameters()
    for part in (network.encoder, network.decoder):
        xavier_uniform_matrices_(part)
        for module in part.modules():
            if hasattr(module, "sampling_offsets"):
                _start_deformable_attention_(module)
            elif hasattr(module, "q_proj"):
                start_projections_(module.q_proj, module.k_proj, module.v_proj)
            for name in ("o_proj", "out_proj", "output_proj"):
                if hasattr(module, name):
                    nn.init.zeros_(getattr(module, name).bias)
    if network.config.model_type == "deformable_detr":
        nn.init.normal_(network.level_embed)
        for layer in (network.reference_points, *(projection[0] for projection in network.input_proj)):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


def _start_deformable_attention_(module: nn.Module) -> None:
    """Let each head look in a direction of its own, at its n-th point n pixels away, with equal weights."""
    module.sampling_offsets.bias.copy_(initial_offsets(module.n_heads, module.n_levels, module.n_points))
    for parameter in (module.sampling_offsets.weight, *module.attention_weights.parameters(), module.value_proj.bias):
        nn.init.zeros_(parameter)


@contextlib.contextmanager
def _decoding(decoder: nn.Module, queries: QueryBatch) -> Iterator[None]:
    """Let DAB-DETR's decoder decode these queries in place of its own, and mask its self-attention, within this context."""
    mask = queries.attention_bias(torch.float32)

    def replace_queries(module, arguments, options):
        replaced = {"inputs_embeds": queries.content, "query_position_embeddings": queries.reference_logits}
        return arguments, {**options, **replaced}

    def replace_mask(module, arguments):
        content, _, *others = arguments
        return content, mask, *others

    handles = [decoder.register_forward_pre_hook(replace_queries, with_kwargs=True)]
    handles += [layer.register_forward_pre_hook(replace_mask) for layer in decoder.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@META_ARCH_REGISTRY.register()
class TransformersDETR(SetDetector):
    """A DETR whose encoder and decoder are those of ``transformers``, and everything else this project's."""

    @configurable
    def __init__(
        self,
        *,
        network: nn.Module,
        dim: int,
        num_classes: int,
        prior_prob: float,
        query_generator: DenoisingQueryGenerator | None = None,
        **options,
    ):
        """
        Args:
            network: of :func:`build_network`.
            dim: model width C.
            num_classes: number of classes K.
            prior_prob: the score that every class starts with.
            query_generator: adds DN-DETR's denoising queries to a DAB-DETR, whose own reference boxes it then uses.
            options: see :class:`SetDetector`.
        """
        super().__init__(num_classes=num_classes, **options)
        self.network = network
        self.class_head = nn.Linear(dim, num_classes)
        self.box_head = MLP([dim, dim, dim, 4])
        self.query_generator = query_generator
        self.dense_head = None
        self.kind = network.config.model_type.replace("-", "_")
        start_heads_(self.class_head, self.box_head, prior_prob)
        _set_conv_encoder(network, ConvEncoder(self.backbone, self.in_features))
        if self.kind == "dab_detr":
            network.decoder.bbox_embed = self.box_change  # a method, so that the state holds the head once
        elif self.kind == "detr":  # its boxes are relative to nothing, and not to be the same for all queries
            self.box_head.layers[-1].reset_parameters()
        elif self.kind == "deformable_detr":
            nn.init.constant_(self.box_head.layers[-1].bias[2:], -2.0)  # boxes of 12 % of the image's sides
        if query_generator is not None:
            query_generator.reference_logits = None

    def lr_factor(self, name: str) -> float:
        """Return a tenth for Deformable DETR's sampling offsets and reference points, as in its paper."""
        slow = self.kind == "deformable_detr" and ("sampling_offsets." in name or "reference_points." in name)
        return 0.1 if slow else 1.0

    @classmethod
    def from_config(cls, cfg):
        node = cfg.MODEL.SAMDETR
        parts = cls.shared_parts(cfg)
        features = used_features(cfg, parts["backbone"])
        return {
            **parts,
            "network": build_network(
                detector=cfg.MODEL.TRANSFORMERS.DETECTOR,
                channels=[feature.channels for feature in features],
                num_levels=cfg.MODEL.TRANSFORMERS.NUM_LEVELS,
                dim=node.HIDDEN_DIM,
                num_heads=node.NUM_HEADS,
                num_queries=node.NUM_QUERIES,
                num_encoder_layers=node.ENCODER.NUM_LAYERS,
                num_decoder_layers=node.DECODER.NUM_LAYERS,
                encoder_feedforward_dim=node.ENCODER.FEEDFORWARD_DIM,
                decoder_feedforward_dim=node.DECODER.FEEDFORWARD_DIM,
                encoder_points=node.ENCODER.NUM_POINTS,
                decoder_points=node.CROSS_ATTENTION.NUM_POINTS,
                dropout=cfg.MODEL.TRANSFORMERS.DROPOUT,
            ),
            "dim": node.HIDDEN_DIM,
            "prior_prob": node.PRIOR_PROB,
            "query_generator": (
                DenoisingQueryGenerator(cfg) if node.QUERY_GENERATOR.NAME == "DenoisingQueryGenerator" else None
            ),
        }

    def encode(self, images: Tensor, image_sizes: list[tuple[int, int]] | None) -> tuple[Tensor, Tensor]:
        """Return the images and their pixel mask (B, H, W); :meth:`decode` runs the whole network.

        Args:
            images: (B, 3, H, W), normalised and padded.
            image_sizes: height and width of each image, without padding; None if nothing is padded.
        """
        size = tuple(images.shape[-2:])
        sizes = upload(image_sizes or [size] * len(images), images.device)
        return images, ~make_padding_mask(size, sizes)

    def decode(
        self, encoded: tuple[Tensor, Tensor], targets: list[ImageTarget] | None = None
    ) -> tuple[Predictions, QueryBatch | None]:
        """Predict.

        Args:
            encoded: of :meth:`encode`.
            targets: B targets in training, else None.

        Returns:
            The predictions of all layers, and of DN-DETR the queries that they were made from.
        """
        images, pixel_mask = encoded
        queries = self.make_queries(len(images), targets)
        with contextlib.nullcontext() if queries is None else _decoding(self.network.decoder, queries):
            content, reference = self.layer_outputs(images, pixel_mask)
        box_logits = self.box_change(content)
        if reference is not None:
            reference = reference.float().logit(eps=1e-5)
            box_logits = box_logits + F.pad(reference, (0, 4 - reference.shape[-1]))
        return Predictions(self.class_head(content).float(), box_logits.sigmoid()), queries

    def make_queries(self, batch_size: int, targets: list[ImageTarget] | None) -> QueryBatch | None:
        """Make DN-DETR's queries, as a part of ``QUERY_GENERATOR_REGISTRY`` does; None for the others, which have their own."""
        generator = self.query_generator
        if generator is None:
            return None
        reference_logits = self.network.query_refpoint_embeddings.weight
        queries = QueryBatch(*(x.expand(batch_size, -1, -1) for x in (generator.content, reference_logits)))
        return queries if targets is None else generator.add_denoising(queries, targets)

    def layer_outputs(self, images: Tensor, pixel_mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run the network.

        Returns:
            What each decoder layer makes of the queries, (L, B, Q, C), and what boxes are relative to, in [0, 1]: nothing
            (None), points (B, Q, 2), or boxes of each layer (L, B, Q, 4).
        """
        if self.kind == "dab_detr":
            outputs = self.network(images, pixel_mask=pixel_mask)
            return outputs.intermediate_hidden_states, outputs.reference_points
        if self.kind == "deformable_detr":
            outputs = self.network(images, pixel_mask=pixel_mask)
            return outputs.intermediate_hidden_states.transpose(0, 1), outputs.init_reference_points
        # Its switch for the outputs of all layers, auxiliary_loss, would put a norm between the layers, which is not published.
        outputs = self.network(images, pixel_mask=pixel_mask, output_hidden_states=True)
        earlier = [self.network.decoder.layernorm(x) for x in outputs.decoder_hidden_states[1:-1]]
        content = torch.stack([*earlier, outputs.last_hidden_state])
        return content, outputs.reference_points.transpose(0, 1) if self.kind == "conditional_detr" else None

    def box_change(self, content: Tensor) -> Tensor:
        """Return how boxes differ from what they are relative to, (..., 4) as float32 logits, from (..., C)."""
        return self.box_head(content).float()
