"""Figures: of images, of draws, of scores that detect what is unknown, and the protocols that these are measured by."""

from energy_prior.evaluate.detection import Detection, DetectionTask, detection
from energy_prior.evaluate.draws import effective_sample_size, maximum_mean_discrepancy, two_sample_accuracy
from energy_prior.evaluate.images import (
    excess_ratio,
    frechet_distance,
    gap_closed,
    inception_score,
    kernel_distance,
    precision_recall,
)
from energy_prior.evaluate.networks import (
    efficientnet_features,
    efficientnet_probabilities,
    inception_features,
    inception_probabilities,
)
from energy_prior.evaluate.samples import SampleReport, SampleTask, Spread, nearest

__all__ = [
    "Detection",
    "DetectionTask",
    "SampleReport",
    "SampleTask",
    "Spread",
    "detection",
    "effective_sample_size",
    "efficientnet_features",
    "efficientnet_probabilities",
    "excess_ratio",
    "frechet_distance",
    "gap_closed",
    "inception_features",
    "inception_probabilities",
    "inception_score",
    "kernel_distance",
    "maximum_mean_discrepancy",
    "nearest",
    "precision_recall",
    "two_sample_accuracy",
]
