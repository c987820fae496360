"""Training objectives; each works in anybody's own loop."""

from respiro.losses.class_margin import (
    DualFactorAngularMarginLoss,
    LDAMLoss,
    dual_factor_angular_margin_loss,
    ldam_loss,
)
from respiro.losses.classification import CrossEntropy, MixedCrossEntropy, cross_entropy, mixed_cross_entropy
from respiro.losses.contrastive import PatchMixContrastiveLoss, patch_mix_contrastive_loss
from respiro.losses.logit_adjustment import LogitAdjustedCrossEntropy, logit_adjusted_cross_entropy
from respiro.losses.margin import (
    AdaFaceLoss,
    ArcFaceLoss,
    CosFaceLoss,
    ada_face_loss,
    arc_face_loss,
    cos_face_loss,
)
from respiro.losses.metric_learning import CenterLoss, TripletLoss, center_loss, triplet_loss
from respiro.losses.multi_objective import MultiObjectiveLoss
from respiro.losses.multi_sup_con import HybridSupConLoss, MultiSupConLoss, hybrid_sup_con_loss, multi_sup_con_loss
from respiro.losses.sup_con import NTXentLoss, SupConLoss, nt_xent_loss, sup_con_loss

__all__ = [
    "AdaFaceLoss",
    "ArcFaceLoss",
    "CenterLoss",
    "CosFaceLoss",
    "CrossEntropy",
    "DualFactorAngularMarginLoss",
    "HybridSupConLoss",
    "LDAMLoss",
    "LogitAdjustedCrossEntropy",
    "MixedCrossEntropy",
    "MultiObjectiveLoss",
    "MultiSupConLoss",
    "NTXentLoss",
    "PatchMixContrastiveLoss",
    "SupConLoss",
    "TripletLoss",
    "ada_face_loss",
    "arc_face_loss",
    "center_loss",
    "cos_face_loss",
    "cross_entropy",
    "dual_factor_angular_margin_loss",
    "hybrid_sup_con_loss",
    "ldam_loss",
    "logit_adjusted_cross_entropy",
    "mixed_cross_entropy",
    "multi_sup_con_loss",
    "nt_xent_loss",
    "patch_mix_contrastive_loss",
    "sup_con_loss",
    "triplet_loss",
]
