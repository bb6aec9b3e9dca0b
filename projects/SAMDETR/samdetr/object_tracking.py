"""Follow objects through the frames of a video, by ByteTrack (Zhang et al., ECCV 2022) of the package ``trackers``."""

import numpy as np
import torch
from detectron2.structures import Instances

from .errors import import_extra

__all__ = ["ObjectTracker"]

_LOWEST_SCORE = 0.1  # as in the paper


class ObjectTracker:
    """Give the detections of one object the same number in every frame of one video; a video needs a tracker of its own.

    An object is first matched with detections above the threshold, and if none fits, with one below it. Classes are not
    compared. An object that is not found is remembered for a second.

    Args:
        score_threshold: in (0, 1), the score with which a detection may begin a track. Scores of focal loss are lower than
            those ByteTrack was made for.
        frame_rate: frames per second.

    Raises:
        UserError: a package is missing.
    """

    def __init__(self, *, score_threshold: float, frame_rate: float):
        self.supervision = import_extra("supervision", "supervision")
        self.score_threshold = score_threshold
        self.tracker = import_extra("trackers", "trackers").ByteTrackTracker(
            frame_rate=frame_rate,
            track_activation_threshold=score_threshold,
            high_conf_det_threshold=score_threshold,
        )

    def __call__(self, instances: Instances) -> Instances:
        """Match the detections of the next frame with the objects so far.

        Args:
            instances: N detections on the CPU, as :class:`samdetr.Predictor` returns them.

        Returns:
            Those above the threshold, and those below it that continue a track, in the same order, with ``track_ids`` (n,)
            int64: the object's number from 0, the same for all classes of a query, or -1 for a detection in no track, as every
            one in its first frame.
        """
        instances = instances[instances.scores >= min(_LOWEST_SCORE, self.score_threshold)]
        # A query may be of several classes, in one box: the best one stands for all.
        queries = instances.query_indices.tolist()
        best = {query: index for index, query in reversed(list(enumerate(queries)))}
        firsts = sorted(best.values())
        tracked = self.tracker.update(
            self.supervision.Detections(
                xyxy=instances.pred_boxes.tensor[firsts].numpy(),
                confidence=instances.scores[firsts].numpy(),
                data={"index": np.array(firsts, np.int64)},
            )
        )
        ids = torch.full((len(instances),), -1)
        if len(tracked):
            ids[torch.from_numpy(tracked.data["index"])] = torch.from_numpy(tracked.tracker_id)
        instances.track_ids = ids[[best[query] for query in queries]]
        return instances[(instances.scores >= self.score_threshold) | (ids >= 0)]
