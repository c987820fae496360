"""Training objectives; each works in anybody's own loop."""

from respiro.losses.classification import CrossEntropy, MixedCrossEntropy, cross_entropy, mixed_cross_entropy
from respiro.losses.contrastive import PatchMixContrastiveLoss, patch_mix_contrastive_loss
from respiro.losses.metric_learning import CenterLoss, TripletLoss, center_loss, triplet_loss
from respiro.losses.multi_objective import MultiObjectiveLoss
from respiro.losses.multi_sup_con import HybridSupConLoss, MultiSupConLoss, hybrid_sup_con_loss, multi_sup_con_loss
from respiro.losses.sup_con import NTXentLoss, SupConLoss, nt_xent_loss, sup_con_loss

__all__ = [
    "CenterLoss",
    "CrossEntropy",
    "HybridSupConLoss",
    "MixedCrossEntropy",
    "MultiObjectiveLoss",
    "MultiSupConLoss",
    "NTXentLoss",
    "PatchMixContrastiveLoss",
    "SupConLoss",
    "TripletLoss",
    "center_loss",
    "cross_entropy",
    "hybrid_sup_con_loss",
    "mixed_cross_entropy",
    "multi_sup_con_loss",
    "nt_xent_loss",
    "patch_mix_contrastive_loss",
    "sup_con_loss",
    "triplet_loss",
]
