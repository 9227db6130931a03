"""The miniature's recipe: one LightningModule a stage, run by `sdprune fit --config configs/mini/<stage>.yaml`.

Stages: VaeStage; ContrastiveStage twice, with other seeds, for the text encoder and for the evaluator; GroundingStage,
which trains the text encoder further; UNetStage, which needs the VAE and the text encoder; ExaminerStage. An
interrupted stage continues from its last checkpoint when the same command is given again. All files lie under
`weights`; `python -m sdprune.mini.install` puts a finished miniature into the package.

    parts/vae, parts/text_encoder, parts/tokenizer   what the U-Net is trained on
    pipeline/      written by the last stage as a whole, so that its parts always belong together
    evaluator/     the CLIP that scores
    examiner/      the detector that says what a picture shows
    training.json  steps and loss of every finished stage
    checkpoints/   by stage
"""

from sdprune.mini.training.contrastive import ContrastiveStage, renumbered, some_twins
from sdprune.mini.training.data import WorldTrainingData
from sdprune.mini.training.examiner import ExaminerStage
from sdprune.mini.training.grounding import GroundingStage
from sdprune.mini.training.stage import Stage
from sdprune.mini.training.unet import Denoiser, UNetStage, timesteps
from sdprune.mini.training.vae import VaeStage

__all__ = [
    "ContrastiveStage",
    "Denoiser",
    "ExaminerStage",
    "GroundingStage",
    "Stage",
    "UNetStage",
    "VaeStage",
    "WorldTrainingData",
    "renumbered",
    "some_twins",
    "timesteps",
]
