"""The data module: by itself, from the command line, and under two processes."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from coco_files import write_coco
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel

from sdprune.data import CocoDataModule, CocoDirectory, TextFile
from sdprune.errors import InputError


@pytest.fixture
def source(tmp_path):
    return CocoDirectory(write_coco(tmp_path / "coco"))


def test_examples_are_drawn_in_drawn_order(source):
    table = source.load()
    expected = [table[int(k)] for k in np.random.RandomState(4).choice(12, 5, replace=False)]
    assert list(CocoDataModule(source, n=5, seed=4).examples) == expected


def test_predict_batches_without_a_trainer(source):
    data = CocoDataModule(source, n=7, batch_size=2)
    batches = list(data.predict_dataloader())
    assert [batch.index for batch in batches] == [0, 1, 2, 3]
    prompts = [prompt for batch in batches for prompt in batch.prompts[: batch.valid]]
    assert prompts == list(data.examples["caption"])
    assert [name for batch in batches for name in batch.file_names][:7] == list(data.examples["file_name"])


def test_calibration_does_not_depend_on_the_draw(source):
    first = list(source.load()["caption"])[:5]
    for n, seed in [(3, 0), (12, 9)]:
        data = CocoDataModule(source, n=n, seed=seed, calibration_n=5, calibration_batch_size=2)
        batches = list(data.calibration_loader())
        assert [prompt for batch in batches for prompt in batch.prompts[: batch.valid]] == first


def test_random_calibration_takes_the_next_seed(source):
    data = CocoDataModule(source, n=3, seed=6, calibration_n=5, calibration_draw="random")
    expected = [list(source.load()["caption"])[k] for k in np.random.RandomState(7).choice(12, 5, replace=False)]
    assert list(data.calibration_examples["caption"]) == expected
    assert data.describe_calibration()["seed"] == 7


def test_calibration_from_a_text_file(source, tmp_path):
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    data = CocoDataModule(source, n=3, calibration=TextFile(tmp_path / "prompts.txt"), calibration_n=2)
    assert list(data.calibration_examples["caption"]) == ["one", "two"]
    assert data.describe_calibration()["source"]["class"] == "TextFile"


def test_calibration_loaders_are_even(source):
    def of(rank):
        data = CocoDataModule(source, calibration_n=5, calibration_batch_size=2)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2)
        return list(data.calibration_loader())

    ranks = [of(rank) for rank in range(2)]
    assert [[batch.index for batch in rank] for rank in ranks] == [[0, 2], [1, -1]]
    assert [batch.valid for rank in ranks for batch in rank] == [2, 1, 2, 0]


def test_reference_images(source):
    drawn = CocoDataModule(source, n=4)
    images = list(drawn.reference_images())
    assert all(image.dtype == torch.uint8 and image.shape == (3, 8, 12) for image in images)
    assert [int(image[0, 0, 0]) for image in images] == list(drawn.examples["id"])
    whole = CocoDataModule(source, n=4, reference="split")
    assert [int(image[0, 0, 0]) for image in whole.reference_images()] == list(source.load()["id"])


def test_check_tells_facts(source):
    data = CocoDataModule(source, n=4, calibration_n=6)
    assert data.check(calibration=True) == {
        "images": 12,
        "prompts": 4,
        "calibration_prompts": 6,
        "reference_images": 4,
    }


def test_check_reads_the_images_of_the_reference_only(source):
    data = CocoDataModule(source, n=4)
    drawn = set(data.examples["file_name"])
    other = next(name for name in source.load()["file_name"] if name not in drawn)
    (source.root / "train2017" / other).write_text("")
    data.check()
    whole = CocoDataModule(source, n=4, reference="split")
    with pytest.raises(InputError, match=f"{other} is damaged"):
        whole.check()
    assert whole.check(images=False) == {"images": 12, "prompts": 4, "reference_images": 12}


def test_too_few_captions(source):
    with pytest.raises(InputError, match=r"--data.n=13 .* at most 12"):
        CocoDataModule(source, n=13).check()
    with pytest.raises(InputError, match=r"--data.calibration_n=128 .* at most 12"):
        CocoDataModule(source, n=4).check(calibration=True)
    with pytest.raises(InputError, match=r"--data.calibration_n=128 .* at most 12"):
        CocoDataModule(source, n=4, calibration_draw="random").check(calibration=True)


def test_check_tells_of_too_many_processes(source):
    data = CocoDataModule(source, n=7, batch_size=2)
    data.trainer = SimpleNamespace(global_rank=0, world_size=5)
    with pytest.raises(InputError, match="4 batches, fewer than the 5 processes"):
        data.check()


def test_statistics_as_the_reference(source, tmp_path):
    file = tmp_path / "reference.npz"
    data = CocoDataModule(source, n=4, reference=str(file))
    with pytest.raises(InputError, match=r"--data.reference is .*, which cannot be read"):
        data.check()
    file.write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"not a readable npz"):
        data.check()
    np.savez(file, mu=np.zeros(2))
    with pytest.raises(InputError, match="has no sigma"):
        data.check()
    np.savez(file, mu=np.zeros(2), sigma=np.eye(2))
    assert data.check() == {"images": 12, "prompts": 4}
    described = data.describe()
    np.savez(file, mu=np.ones(2), sigma=np.eye(2))
    assert described != data.describe()
    assert str(tmp_path) not in json.dumps(described)
    with pytest.raises(InputError, match="has no images"):
        list(data.reference_images())


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ({"n": 0}, "n=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"calibration_n": 0}, "calibration_n=0"),
        ({"calibration_batch_size": -1}, "calibration_batch_size=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"reference": "dawn"}, "Did you mean 'drawn'"),
    ],
)
def test_bad_options(source, option, told):
    with pytest.raises(InputError, match=told):
        CocoDataModule(source, **option)


def test_description_holds_what_counts(source):
    base = {"n": 4, "seed": 0, "batch_size": 2, "reference": "drawn"}
    described = CocoDataModule(source, **base).describe()
    for change in ({"n": 5}, {"seed": 1}, {"batch_size": 3}, {"reference": "split"}):
        assert CocoDataModule(source, **(base | change)).describe() != described
    assert CocoDataModule(source, **base, workers=2, calibration_n=3).describe() == described
    calibration = CocoDataModule(source, **base).describe_calibration()
    assert CocoDataModule(source, n=5, seed=1).describe_calibration() == calibration
    assert CocoDataModule(source, calibration_n=3).describe_calibration() != calibration


def test_prepare_comes_before_load(tmp_path):
    class Rendered(CocoDirectory):
        def prepare(self):
            if not self.root.exists():
                write_coco(self.root)

    assert len(CocoDataModule(Rendered(tmp_path / "a"), n=4).examples) == 4
    assert CocoDataModule(Rendered(tmp_path / "b"), n=4).describe()["source"]["class"] == "Rendered"
    calibration = Rendered(tmp_path / "c")
    CocoDataModule(Rendered(tmp_path / "d"), calibration=calibration).prepare_data()
    assert len(calibration.load()) == 12


def test_truncated_captions_are_counted(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1, "<unk>": 2, "cat": 3}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=5)
    captions = [(7, "cat " * 2), (14, "cat " * 3), (21, "cat " * 4), (28, "cat " * 9)]  # 4, 5, 6 and 11 tokens
    data = CocoDataModule(CocoDirectory(write_coco(tmp_path, n=4, captions=captions)), n=4)
    assert data.count_truncated(tokenizer) == 2
    assert data.check(tokenizer)["truncated"] == 2


def parse(arguments, tmp_path):
    return LightningCLI(
        BoringModel,
        CocoDataModule,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        run=False,
        save_config_callback=None,
        args=arguments,
        trainer_defaults={"logger": False, "default_root_dir": str(tmp_path)},
    ).datamodule


def test_from_yaml_with_dotted_overrides(source, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sdprune"])
    config = tmp_path / "config.yaml"
    config.write_text(f"""
data:
  class_path: CocoDataModule
  init_args:
    source: {{class_path: CocoDirectory, init_args: {{root: {source.root}, split: train2017}}}}
    n: 8
""")
    data = parse(["--config", str(config)], tmp_path)
    assert (data.n, len(data.examples)) == (8, 8)
    other = write_coco(tmp_path / "other", n=3)
    data = parse(["--config", str(config), "--data.n=2", f"--data.source.root={other}"], tmp_path)
    assert (data.n, data.source.root, len(data.examples)) == (2, other, 2)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo")
    calibration = ["--data.calibration=TextFile", f"--data.calibration.path={prompts}", "--data.calibration_n=2"]
    assert len(parse(["--config", str(config), *calibration], tmp_path).calibration_examples) == 2


TWO_PROCESSES = """
import json, sys
from lightning.pytorch import LightningModule, Trainer
from sdprune.data import CocoDataModule, CocoDirectory

class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.seen = {"calibration": [], "predict": []}
    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        if self.trainer.datamodule.passes is None:
            self.seen["predict"].append([batch.index, batch.ids[:batch.valid]])
        else:
            self.seen["calibration"].append([dataloader_idx, batch.index, batch.valid])
        return batch.ids

root, out = sys.argv[1:]
data = CocoDataModule(CocoDirectory(root), n=7, batch_size=2, calibration_n=5, calibration_batch_size=2)
model = Recorder()
quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, use_distributed_sampler=False,
                  default_root_dir=out, **quiet)
data.passes = 2
trainer.predict(model, datamodule=data)
data.passes = None
trainer.predict(model, datamodule=data)
with open(f"{out}/{trainer.global_rank}.json", "w") as file:
    json.dump(model.seen, file)
"""


def test_two_processes(source, tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    command = [sys.executable, str(script), str(source.root), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["calibration"] == [[0, 0, 2], [0, 2, 1], [1, 0, 2], [1, 2, 1]]
    assert second["calibration"] == [[0, 1, 2], [0, -1, 0], [1, 1, 2], [1, -1, 0]]
    assert [index for index, _ in first["predict"]] == [0, 2]
    assert [index for index, _ in second["predict"]] == [1, 3]
    batches = dict(first["predict"] + second["predict"])
    drawn = list(CocoDataModule(source, n=7).examples["id"])
    assert [image_id for index in range(4) for image_id in batches[index]] == drawn
