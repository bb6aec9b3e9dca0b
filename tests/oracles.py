"""Plain formulations, written loop by loop or with torchvision's ops, that the tests compare with."""

import contextlib
import io
import math

import torch
import torch.nn.functional as F
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision import ops
from torchvision.ops import generalized_box_iou

from samdetr.modeling.boxes import cxcywh_to_xyxy
from samdetr.modeling.position_encoding import sine_embedding


def plain_attention(module, query, levels, index, beta=None):
    """Cross-attention head by head, pixel by pixel."""
    level = levels[index]
    batch, queries, heads, dim = query.content.shape
    result = torch.zeros(batch, queries, dim)
    value = module.value(level.features)
    key = module.key_content(level.features) + module.key_position(level.position)
    for b in range(batch):
        valid_height, valid_width = (int(x) for x in level.valid_size[b])
        for q in range(queries):
            parts = []
            for m in range(heads):
                vector = module.query_content(query.content[b, q, m]) + module.query_position(query.position[b, q, m])
                logits, values = [], []
                for i in range(valid_height):
                    for j in range(valid_width):
                        logit = vector @ key[b, i, j] / math.sqrt(dim)
                        if beta is not None:
                            cx, cy = query.keypoints[b, q, m] * level.valid_size[b].flip(-1)
                            sx, sy = query.gaussian_scales[b, q, m]
                            logit = logit - (sx**2 * (j + 0.5 - cx) ** 2 + sy**2 * (i + 0.5 - cy) ** 2) / beta
                        logits.append(logit)
                        values.append(value[b, i, j].view(heads, -1)[m])
                parts.append(torch.stack(logits).softmax(0) @ torch.stack(values))
            result[b, q] = module.output(torch.cat(parts))
    return result


def plain_align(aligner, content, boxes, level):
    """The Semantics Aligner written query by query, with torchvision's and torch's ops, and every gradient stop."""
    pooled = torchvision_roi_align(level.features, boxes.detach(), level.valid_size, aligner.pooled_size)
    heads, dim = aligner.num_heads, aligner.dim
    contents, positions, keypoints, scales, residuals = [], [], [], [], []
    for b in range(content.shape[0]):
        for q in range(content.shape[1]):
            cells = pooled[b, q]
            reduced = F.relu(cells @ aligner.reduction.weight.T + aligner.reduction.bias).flatten()
            numbers = aligner.keypoint_head(reduced)
            if aligner.pooled_content is not None:
                for layer in aligner.keypoint_head.layers[:-1]:
                    reduced = F.relu(layer(reduced))
                residuals.append(aligner.pooled_content(reduced))
            local = numbers[: 2 * heads].view(heads, 2).tanh()
            scales.append(numbers[2 * heads :].view(-1, 2))
            sampled = F.grid_sample(cells.permute(2, 0, 1)[None], local[None, None], align_corners=False)[0, :, 0].T
            gate = torch.sigmoid(aligner.content_gate(content[b, q])).view(heads, dim)
            contents.append(sampled * gate)
            place = boxes[b, q, :2] + boxes[b, q, 2:] / 2 * local
            keypoints.append(place)
            gate = torch.sigmoid(aligner.position_gate(content[b, q])).view(heads, dim)
            positions.append(sine_embedding(place.detach(), dim, aligner.temperature) * gate)
    shape = content.shape[:2]
    lists = (contents, positions, keypoints, scales, residuals)
    return [torch.stack(x).unflatten(0, shape) if x else None for x in lists]


def torchvision_roi_align(features, boxes, valid_size, output_size):
    """The plain formulation: torchvision's op on each image's valid part."""
    pooled = []
    for feature, image_boxes, (height, width) in zip(features, boxes, valid_size.long().tolist()):
        corners = cxcywh_to_xyxy(image_boxes) * torch.tensor([width, height, width, height])
        valid = feature[:height, :width].permute(2, 0, 1)[None].contiguous()
        pooled.append(ops.roi_align(valid, [corners], output_size, sampling_ratio=-1, aligned=True))
    return torch.stack(pooled).permute(0, 1, 3, 4, 2)


def bilinear(feature, x, y):
    """Sample (H, W, D) at pixel coordinates, zeros outside."""
    height, width = feature.shape[:2]
    value = torch.zeros(feature.shape[-1])
    for i in (math.floor(y), math.floor(y) + 1):
        for j in (math.floor(x), math.floor(x) + 1):
            if 0 <= i < height and 0 <= j < width:
                value += (1 - abs(y - i)) * (1 - abs(x - j)) * feature[i, j]
    return value


def plain_embedding(x, y, dim, temperature):
    values = []
    for coordinate in (y, x):
        for channel in range(dim // 2):
            angle = 2 * math.pi * coordinate / temperature ** (2 * (channel // 2) / (dim // 2))
            values.append(math.cos(angle) if channel % 2 else math.sin(angle))
    return torch.tensor(values)


def plain_cost(logits, boxes, target):
    cost = torch.zeros(len(logits), len(target))
    for q in range(len(logits)):
        for t in range(len(target)):
            p = logits[q, target.labels[t]].sigmoid().item()
            cost[q, t] += 2 * (0.25 * (1 - p) ** 2 * -math.log(p + 1e-8) - 0.75 * p**2 * -math.log(1 - p + 1e-8))
            cost[q, t] += 5 * (boxes[q] - target.boxes[t]).abs().sum()
            pair = cxcywh_to_xyxy(boxes[q : q + 1]), cxcywh_to_xyxy(target.boxes[t : t + 1])
            cost[q, t] -= 2 * generalized_box_iou(*pair)[0, 0]
    return cost


def plain_focal(logit, positive):
    p = 1 / (1 + math.exp(-logit))
    return 0.25 * (1 - p) ** 2 * -math.log(p) if positive else 0.75 * p**2 * -math.log(1 - p)


def plain_losses(logits, boxes, pairs):
    """Losses of (Q, K) logits and (Q, 4) boxes; ``pairs`` maps a query to its (label, box)."""
    focal = l1 = giou = 0.0
    for query in range(len(logits)):
        label, box = pairs.get(query, (None, None))
        for k in range(logits.shape[1]):
            focal += plain_focal(logits[query, k].item(), label == k)
        if box is not None:
            l1 += (boxes[query] - box).abs().sum()
            giou += 1 - generalized_box_iou(cxcywh_to_xyxy(boxes[query][None]), cxcywh_to_xyxy(box[None]))[0, 0]
    return torch.tensor([2 * focal, 5 * l1, 2 * giou])


def cocoeval(truth, detections):
    """pycocotools' evaluation of ground truth and detections in COCO's formats."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation
