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

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, IterableDataset

from sdprune.errors import InputError
from sdprune.files import require_writable, write_json
from sdprune.mini.captions import parse
from sdprune.mini.examiner import Examiner, disturbed, examiner_loss
from sdprune.mini.grounding import Grounded, grounding_loss
from sdprune.mini.models import (
    build_clip,
    build_scheduler,
    build_unet,
    build_vae,
    save_evaluator,
    save_pipeline,
    text_tower,
)  # fmt: skip
from sdprune.mini.tokenizer import MAX_LENGTH, train_tokenizer
from sdprune.mini.world import scenes
from sdprune.pipelines.resolve import SHIPPED


class WorldTrainingData(LightningDataModule):
    """Batches of (uint8 pictures [b, 3, 64, 64], captions), drawn at random from rendered training scenes.

    Args:
        n: scenes rendered at the start and kept in memory (0.4 ms and 12 kB each).
        batch_size: pictures a step.
        seed: of the scenes and of the drawing.
        steps: batches in an epoch; one epoch is the whole training.
    """

    def __init__(self, n: int = 20_000, batch_size: int = 64, seed: int = 0, steps: int = 1_000):
        super().__init__()
        self.n, self.batch_size, self.seed, self.steps = n, batch_size, seed, steps

    def setup(self, stage: str) -> None:
        """Render the scenes."""
        drawn = list(scenes("train", self.n, self.seed))
        self.pictures = torch.stack([torch.tensor(scene.render()).permute(2, 0, 1) for scene in drawn])
        self.scenes, self.captions = drawn, [scene.captions for scene in drawn]

    def train_dataloader(self) -> DataLoader:
        """One epoch of `steps` batches."""
        return DataLoader(_RandomBatches(self), batch_size=None)


class _RandomBatches(IterableDataset):
    def __init__(self, data: WorldTrainingData):
        self.data = data

    def __len__(self) -> int:
        return self.data.steps

    def __iter__(self) -> Iterator[tuple[Tensor, list[str], Tensor]]:
        data = self.data
        done = data.trainer.global_step if data.trainer else 0  # a resumed training draws on, it does not repeat
        generator = torch.Generator().manual_seed((torch.initial_seed() + 7919 * done) % 2**63)
        for _ in range(data.steps):
            index = torch.randint(data.n, (data.batch_size,), generator=generator)
            wording = torch.randint(3, (data.batch_size,), generator=generator)
            captions = [data.captions[i][w] for i, w in zip(index.tolist(), wording.tolist(), strict=True)]
            yield data.pictures[index], captions, index


class Stage(LightningModule):
    """AdamW with warm-up and cosine decay over the trainer's steps, an exponential average of the weights, a record.

    Args:
        weights: the directory that receives the finished weights and checkpoints, and holds those of earlier stages.
        lr: peak learning rate.
        warmup: steps of linear warm-up.
        ema: decay of the exponential average that is saved.
        resume: start from the weights that are there already, instead of at random.

    Raises:
        InputError: `weights` lies in the installed package, or cannot be written.
    """

    name: str
    model: nn.Module

    def __init__(
        self, weights: str = "runs/miniature", lr: float = 1e-3, warmup: int = 100, ema: float = 0.999,
        resume: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.weights, self.lr, self.warmup, self.resume = Path(weights), lr, warmup, resume
        self.ema_decay = ema
        self.losses: list[float] = []
        self.started = time.monotonic()
        if self.weights.resolve().is_relative_to(SHIPPED.resolve()):
            raise InputError(
                f"weights is {weights}, the miniature that comes with sdprune: train into another directory, such as "
                "runs/miniature, and put it into the package with python -m sdprune.mini.install runs/miniature."
            )

    def keep_checkpoints(self, trainer: Trainer) -> None:
        """Put the checkpoints under `weights`, so that trainings into two directories never continue each other."""
        require_writable(self.weights, "--model.weights")
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str((self.weights / "checkpoints" / self.name).absolute())

    def build(self, model: nn.Module) -> None:
        """Take the model to train and start its average."""
        self.model = model
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(self.ema_decay), use_buffers=True)

    def loss(self, pictures: Tensor, captions: list[str], index: Tensor) -> Tensor:
        """The stage's training loss; pictures in [-1, 1]."""
        raise NotImplementedError

    def save(self, model: nn.Module) -> Path:
        """Write the averaged model under `weights` and return where."""
        raise NotImplementedError

    def training_step(self, batch: tuple[Tensor, list[str], Tensor]) -> Tensor:
        """Loss of one batch."""
        pictures, captions, index = batch
        loss = self.loss(pictures.float() / 127.5 - 1, captions, index)
        self.losses.append(float(loss.detach()))
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict[str, Any]:  # type: ignore[override]
        """AdamW; one learning-rate step a batch."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.lr, betas=(0.9, 0.99), weight_decay=0.01)
        total = int(self.trainer.estimated_stepping_batches)

        def factor(step: int) -> float:
            decay = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * min(1.0, step / total))).item())
            return min(1.0, (step + 1) / max(1, self.warmup)) * max(decay, 0.01)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_end(self, *args: Any) -> None:
        """Update the average."""
        if self.global_step == self.warmup:  # forget the random start
            self.average.module.load_state_dict(self.model.state_dict())
        else:
            self.average.update_parameters(self.model)
        total = int(self.trainer.estimated_stepping_batches)
        if self.global_step % min(100, max(1, total // 10)) == 0:
            recent = self.losses[-100:]
            spent = time.monotonic() - self.started
            left = spent / len(self.losses) * (total - self.global_step)
            print(
                f"{self.name}: step {self.global_step} of {total}, loss {sum(recent) / len(recent):.5f}, "
                f"{spent / 60:.1f} min, about {left / 60:.1f} min to go",
                flush=True,
            )

    def on_train_end(self) -> None:
        """Save the average in fp16 and note the losses beside it."""
        if not self.trainer.is_global_zero:
            return
        saved = self.save(self.average.module.half().eval())
        path = self.weights / "training.json"
        record = json.loads(path.read_text()) if path.exists() else {}
        recent = self.losses[-200:]
        before = record.get(self.name, {}).get("steps", 0) if self.resume else 0
        record[self.name] = {
            "final_loss": round(sum(recent) / len(recent), 6),
            "steps": before + self.global_step,
            "minutes": round((time.monotonic() - self.started) / 60, 1),
            "resumed": self.resume,
        }
        write_json(path, dict(sorted(record.items())))
        print(f"Saved: {saved}, after {self.global_step} steps", flush=True)

    def on_fit_end(self) -> None:
        """Say so when the last checkpoint was that of a finished training, so that nothing was done."""
        if not self.losses and self.trainer.is_global_zero:
            print(f"{self.name}: already trained, {self.global_step} steps: {self.weights}", flush=True)

    def part(self, *names: str) -> Path:
        """A directory under `weights` that an earlier stage wrote.

        Raises:
            InputError: it is not there.
        """
        path = self.weights.joinpath(*names)
        if not path.is_dir():
            raise InputError(f"{path} is missing: run the stage that writes it first (configs/mini/).")
        return path


class VaeStage(Stage):
    """AutoencoderKL, 64 x 64 x 3 to 8 x 8 x 8: squared and absolute error and a small KL term.

    Args:
        kl: weight of the KL term.
        decoder_only: leave the encoder as it is, so that a U-Net trained on its latents still fits.
    """

    name = "vae"

    def __init__(self, kl: float = 2e-4, decoder_only: bool = False, **options: Any):
        super().__init__(**options)
        self.kl, self.decoder_only = kl, decoder_only

    def configure_model(self) -> None:
        """Build it, or read the one to resume."""
        from diffusers import AutoencoderKL

        if hasattr(self, "model"):
            return
        vae = AutoencoderKL.from_pretrained(self.part("parts", "vae")) if self.resume else build_vae()
        for encoder in (vae.encoder, vae.quant_conv) if self.decoder_only else ():
            encoder.requires_grad_(False)
        self.build(vae)

    def loss(self, pictures: Tensor, captions: list[str], index: Tensor) -> Tensor:
        """mse + 0.5 mae + kl * (nats a latent number)."""
        posterior = self.model.encode(pictures).latent_dist  # type: ignore[operator]
        output = self.model.decode(posterior.sample()).sample.float()  # type: ignore[operator]
        error = output - pictures
        nats = posterior.kl().float().mean() / posterior.mean[0].numel()
        return error.square().mean() + 0.5 * error.abs().mean() + self.kl * nats

    @torch.no_grad()
    def save(self, model: Any) -> Path:
        """Save with the scaling factor that gives the latents unit variance (Rombach et al. 2022, G.1)."""
        pictures = self.trainer.datamodule.pictures[:512].float() / 127.5 - 1  # type: ignore[attr-defined]
        latents = model.float().encode(pictures.to(model.device)).latent_dist.mean
        model.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
        model.half().save_pretrained(self.weights / "parts" / "vae")
        return self.weights / "parts" / "vae"


class ContrastiveStage(Stage):
    """A CLIP trained on (picture, caption) pairs by the symmetric contrastive loss (Radford et al. 2021).

    Each caption brings some of its twins, texts of the same words in another order, as further texts that its picture
    does not show (Yuksekgonul et al. 2023): without them a CLIP reads a bag of words.

    Args:
        keep: `text_encoder` saves the text tower and the tokenizer for the pipeline; `evaluator` saves all.
        twins: of each caption.
    """

    def __init__(
        self, keep: str = "text_encoder", text_layers: int = 6, image_layers: int = 4, image_width: int = 128,
        twins: int = 2, **options: Any,
    ):  # fmt: skip
        super().__init__(**options)
        self.name = self.keep = keep
        self.text_layers, self.image_layers, self.image_width = text_layers, image_layers, image_width
        self.twins = twins

    def configure_model(self) -> None:
        """Build both towers and the tokenizer, or read those to resume."""
        from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

        if hasattr(self, "model"):
            return
        self.tokenizer = train_tokenizer()
        evaluator = self.keep == "evaluator"
        clip: Any = build_clip(self.tokenizer, self.text_layers, self.image_layers, self.image_width)
        if self.resume:
            before = self.part("evaluator") if evaluator else self.part("parts", "text_encoder")
            known = CLIPTokenizer.from_pretrained(before if evaluator else self.part("parts", "tokenizer"))
            state = (CLIPModel if evaluator else CLIPTextModel).from_pretrained(before).float().state_dict()
            state = {name if evaluator else f"text_model.{name}": value for name, value in state.items()}
            table = "text_model.embeddings.token_embedding.weight"
            state[table] = renumbered(state[table], known, clip.state_dict()[table], self.tokenizer)
            clip.load_state_dict(state, strict=evaluator)
        clip.set_attn_implementation("eager")  # on CPUs the backward pass takes half the time
        self.build(clip)

    def loss(self, pictures: Tensor, captions: list[str], index: Tensor) -> Tensor:
        """Cross-entropy over the batch, both ways; texts that are true of a picture are no negatives of it."""
        contents = [self.trainer.datamodule.scenes[i].content for i in index.tolist()]  # type: ignore[attr-defined]
        texts = [*captions, *(text for caption in captions for text in some_twins(caption, self.twins))]
        tokens = self.tokenizer(texts, padding="max_length", max_length=MAX_LENGTH, return_tensors="pt")
        output = self.model(input_ids=tokens["input_ids"].to(self.device), pixel_values=pictures)
        said = [parse(text) for text in texts]
        true = torch.tensor([[content.shows(text) for text in said] for content in contents], device=self.device)
        true.fill_diagonal_(False)
        logits = output.logits_per_image.float().masked_fill(true, -1e4)
        target = torch.arange(len(contents), device=self.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, : len(target)].T, target)) / 2

    def save(self, model: Any) -> Path:
        """Save the tower that is kept, with the tokenizer."""
        if self.keep == "evaluator":
            save_evaluator(self.weights / "evaluator", model, self.tokenizer)
            return self.weights / "evaluator"
        text_tower(model).half().save_pretrained(self.weights / "parts" / "text_encoder")
        self.tokenizer.save_pretrained(self.weights / "parts" / "tokenizer")
        return self.weights / "parts" / "text_encoder"


def some_twins(caption: str, n: int) -> list[str]:
    """n of the caption's twins at random, in the same wording."""
    content = parse(caption)
    assert content
    wording, twins = content.captions.index(caption), content.twins()
    return [twins[i].captions[wording] for i in torch.randint(len(twins), (n,)).tolist()]


def renumbered(table: Tensor, known: Any, start: Tensor, tokenizer: Any) -> Tensor:
    """A table of token embeddings in the order of another tokenizer; tokens that are new get their row of `start`."""
    rows, new = known.get_vocab(), start.clone()
    for token, row in tokenizer.get_vocab().items():
        if token in rows:
            new[row] = table[rows[token]]
    return new


class GroundingStage(Stage):
    """The text encoder learns to say in its states what stands where, from captions and pictures' layouts alone."""

    name = "grounding"

    def configure_model(self) -> None:
        """Read the text encoder that the contrastive stage left."""
        from transformers import CLIPTextModel, CLIPTokenizer

        if hasattr(self, "model"):
            return
        text = CLIPTextModel.from_pretrained(self.part("parts", "text_encoder")).float()
        text.set_attn_implementation("eager")  # on CPUs the backward pass takes half the time
        self.tokenizer = CLIPTokenizer.from_pretrained(self.part("parts", "tokenizer"))
        self.build(Grounded(text))

    def loss(self, pictures: Tensor, captions: list[str], index: Tensor) -> Tensor:
        """Of both heads."""
        tokens = self.tokenizer(captions, padding="max_length", max_length=MAX_LENGTH, return_tensors="pt")
        contents = [self.trainer.datamodule.scenes[i].content for i in index.tolist()]  # type: ignore[attr-defined]
        return grounding_loss(self.model(tokens["input_ids"].to(self.device)), pictures, contents)

    def save(self, model: Any) -> Path:
        """Save the text encoder in place of the one it began as."""
        model.text.half().save_pretrained(self.weights / "parts" / "text_encoder")
        return self.weights / "parts" / "text_encoder"


class ExaminerStage(Stage):
    """The detector that reads pictures, on disturbed ones, so that it reads those of a decoder too."""

    name = "examiner"

    def configure_model(self) -> None:
        """Build it, or read the one to resume."""
        if hasattr(self, "model"):
            return
        self.build(Examiner.load(self.part("examiner")).requires_grad_() if self.resume else Examiner())

    def loss(self, pictures: Tensor, captions: list[str], index: Tensor) -> Tensor:
        """The detector's own, on disturbed pictures."""
        seen = [self.trainer.datamodule.scenes[i] for i in index.tolist()]  # type: ignore[attr-defined]
        return examiner_loss(self.model(disturbed(pictures)), seen)

    def save(self, model: Any) -> Path:
        """Save it alone."""
        model.save(self.weights / "examiner")
        return self.weights / "examiner"


class Denoiser(nn.Module):
    """U-Net and text encoder as one model: tokens in, v out."""

    def __init__(self, unet: nn.Module, text: nn.Module):
        super().__init__()
        self.unet, self.text = unet, text

    def forward(self, noisy: Tensor, step: Tensor, tokens: Tensor) -> Tensor:
        """v [b, c, h, w] of noisy latents [b, c, h, w] at steps [b] under tokens [b, length]."""
        return self.unet(noisy, step, self.text(tokens)[0]).sample


class UNetStage(Stage):
    """U-Net on the VAE's latents, v-prediction (Salimans & Ho 2022), 10 % empty captions for guidance.

    The text encoder is trained further: after the contrastive stage colours make up half of its variance, shapes a
    tenth, and a U-Net on top of it frozen still ignored the shape when it had long followed the colour.
    """

    name = "unet"

    def configure_model(self) -> None:
        """Read the finished parts, build the U-Net or read the one to resume."""
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from diffusers.models.attention_processor import AttnProcessor
        from transformers import CLIPTextModel, CLIPTokenizer

        if hasattr(self, "model"):
            return
        parts = "pipeline" if self.resume else "parts"  # the text encoder is trained further with the U-Net
        vae = AutoencoderKL.from_pretrained(self.part(parts, "vae")).float().eval()
        self.frozen = [vae.requires_grad_(False)]  # in a list: neither saved nor averaged
        self.tokenizer = CLIPTokenizer.from_pretrained(self.part(parts, "tokenizer"))
        self.scheduler = build_scheduler()
        text = CLIPTextModel.from_pretrained(self.part(parts, "text_encoder")).float()
        resumed = self.resume and UNet2DConditionModel.from_pretrained(self.part("pipeline", "unet")).float()
        unet = resumed or build_unet()
        text.set_attn_implementation("eager")  # on CPUs the backward pass takes half the time
        unet.set_attn_processor(AttnProcessor())
        self.build(Denoiser(unet, text))

    @torch.no_grad()
    def on_train_start(self) -> None:
        """Encode every training picture and tokenize every caption once."""
        vae = self.frozen[0].to(self.device)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        chunks = [vae.encode(p.to(self.device).float() / 127.5 - 1).latent_dist for p in data.pictures.split(256)]
        self.latents = torch.cat([chunk.mean for chunk in chunks]) * vae.config.scaling_factor
        self.spread = torch.cat([chunk.std for chunk in chunks]) * vae.config.scaling_factor

    def loss(self, pictures: Tensor, captions: list[str], index: Tensor) -> Tensor:
        """Mean squared error of v."""
        index = index.to(self.device)
        latents = self.latents[index] + self.spread[index] * torch.randn_like(self.latents[index])
        empty = (torch.rand(len(captions)) < 0.1).tolist()
        texts = ["" if drop else caption for caption, drop in zip(captions, empty, strict=True)]
        tokens = self.tokenizer(texts, padding="max_length", max_length=MAX_LENGTH, return_tensors="pt")["input_ids"]
        noise, step = torch.randn_like(latents), timesteps(len(latents)).to(self.device)
        noisy = self.scheduler.add_noise(latents, noise, step)
        target = self.scheduler.get_velocity(latents, noise, step)
        return F.mse_loss(self.model(noisy, step, tokens.to(self.device)).float(), target.float())

    def save(self, model: Any) -> Path:
        """Save the whole pipeline."""
        save_pipeline(self.weights / "pipeline", self.frozen[0], model.text, self.tokenizer, model.unet)
        return self.weights / "pipeline"


def timesteps(n: int) -> Tensor:
    """Steps in 0 .. 999, logit-normal (Esser et al. 2024) for three in four, else uniform.

    The mode lies where the noise hides where the objects stand: there the caption has to be read.
    """
    noisy = torch.sigmoid(torch.randn(n) + 1.0)
    return (torch.where(torch.rand(n) < 0.75, noisy, torch.rand(n)) * 1000).long().clamp(max=999)
