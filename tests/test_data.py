"""Sources of captions: what they return, and what they say when something is wrong."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from coco_files import FILE_NAMES, edit, picture, write_coco
from PIL import Image

from sdprune.data import CocoDirectory, HubDataset, TextFile
from sdprune.errors import InputError


def naive_first_captions(root, split):
    """Quadratic on purpose: the images of the annotations in order, each with the first caption that names it."""
    content = json.loads((root / "annotations" / f"captions_{split}.json").read_text())
    rows = []
    for annotation in content["annotations"]:
        if annotation["image_id"] in [row[0] for row in rows]:
            continue
        name = next(image["file_name"] for image in content["images"] if image["id"] == annotation["image_id"])
        rows.append((annotation["image_id"], name, annotation["caption"]))
    return rows


@pytest.mark.parametrize("split", FILE_NAMES)
def test_coco_rows_follow_first_appearance_in_the_annotations(tmp_path, split):
    root = write_coco(tmp_path, split=split)
    table = CocoDirectory(root, split).load()
    rows = [(row["id"], row["file_name"], row["caption"]) for row in table]
    assert rows == naive_first_captions(root, split)
    assert [row[0] for row in rows] != sorted(row[0] for row in rows)  # the file's order differs from that of `images`
    assert table.features["id"].dtype == "int64"
    assert [row["path"] for row in table] == [str(tmp_path / split / row["file_name"]) for row in table]


def test_coco_image_without_caption_is_no_row(tmp_path):
    root = write_coco(tmp_path, n=3, captions=[(21, "c"), (7, "a")])
    assert list(CocoDirectory(root).load()["id"]) == [21, 7]


def test_coco_text_ids_stay_text(tmp_path):
    root = write_coco(tmp_path, n=2, captions=[(14, "b"), (7, "a")])

    def as_text(content):
        for image in content["images"]:
            image["id"] = f"x{image['id']}"
        for annotation in content["annotations"]:
            annotation["image_id"] = f"x{annotation['image_id']}"

    edit(root, as_text)
    assert list(CocoDirectory(root).load()["id"]) == ["x14", "x7"]


def test_coco_images_are_rgb_and_their_own(tmp_path):
    root = write_coco(tmp_path, n=3)
    Image.new("L", (12, 8), 200).save(root / "train2017" / "000000000007.jpg")
    source = CocoDirectory(root)
    images = {row["id"]: np.array(source.image(row)) for row in source.load()}
    assert images[7].shape == (8, 12, 3)
    assert {image_id: image.mean() for image_id, image in images.items()} == {7: 200, 14: 14, 21: 21}


def test_description_follows_content_and_not_place(tmp_path):
    first, second = write_coco(tmp_path / "a"), write_coco(tmp_path / "b")
    described = CocoDirectory(first).describe()
    assert described == CocoDirectory(second).describe()
    assert described["class"] == "CocoDirectory"
    assert str(tmp_path) not in json.dumps(described)
    edit(second, lambda content: content["annotations"][0].update(caption="another"))
    assert described != CocoDirectory(second).describe()


def message(call, *arguments):
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_parts_are_named(tmp_path):
    assert "nowhere does not exist" in message(CocoDirectory(tmp_path / "nowhere").load)
    assert "no annotations/captions_train2017.json" in message(CocoDirectory(tmp_path).load)
    write_coco(tmp_path)
    told = message(CocoDirectory(tmp_path, "train2071").load)
    assert "'train2071'" in told
    assert "Did you mean 'train2017'? Choices: train2017." in told
    (tmp_path / "train2017").rename(tmp_path / "elsewhere")
    source = CocoDirectory(tmp_path)
    assert message(source.check, source.load()).startswith(f"{tmp_path} has no image directory train2017/")


DAMAGE = {
    "unknown image ids: 99": lambda content: content["annotations"][0].update(image_id=99),
    "empty captions for 000000000007.jpg": lambda content: [
        annotation.update(caption=" \n") for annotation in content["annotations"] if annotation["image_id"] == 7
    ],
    "KeyError: 'images'": lambda content: content.pop("images"),
    "KeyError: 'caption'": lambda content: content["annotations"][3].pop("caption"),
    "KeyError: 'file_name'": lambda content: content["images"][3].pop("file_name"),
    "lists file names of images twice: 000000000014.jpg": lambda content: content["images"][0].update(
        file_name="000000000014.jpg"
    ),
    "lists ids of images twice: 7": lambda content: content["images"].append(content["images"][0]),
    "holds no captions": lambda content: content["annotations"].clear(),
    "ids of type int, str": lambda content: [
        content["images"].append({"id": "x", "file_name": "x.jpg"}),
        content["annotations"].append({"image_id": "x", "caption": "x"}),
    ],
}


@pytest.mark.parametrize("told", DAMAGE)
def test_damaged_annotations_are_told(tmp_path, told):
    root = write_coco(tmp_path, n=4)
    edit(root, DAMAGE[told])
    assert told in message(CocoDirectory(root).load)


def test_damaged_json_is_told(tmp_path):
    file = write_coco(tmp_path) / "annotations" / "captions_train2017.json"
    file.write_bytes(file.read_bytes()[:-40])
    assert "captions_train2017.json is damaged" in message(CocoDirectory(tmp_path).load)


@pytest.mark.parametrize(
    "name", ["/etc/x.jpg", "../x.jpg", "a/../../x.jpg", "..", "\\x.jpg", "a\\..\\x.jpg", "C:x.jpg", "", ".", "a\0b", 3]
)
def test_file_names_that_leave_the_directory_are_refused(tmp_path, name):
    root = write_coco(tmp_path)
    edit(root, lambda content: content["images"][2].update(file_name=name))
    told = message(CocoDirectory(root).load)
    assert "leave the image directory" in told
    assert repr(name) in told


@pytest.mark.parametrize("name", ["a..b.jpg", "..x.jpg", "sub/x.jpg", ".x.jpg"])
def test_file_names_with_dots_or_folders_are_fine(tmp_path, name):
    root = write_coco(tmp_path)
    edit(root, lambda content: content["images"][2].update(file_name=name))
    assert name in list(CocoDirectory(root).load()["file_name"])


def test_symbolic_links_out_of_the_directory_are_refused(tmp_path):
    root = write_coco(tmp_path / "coco", n=3)
    outside = tmp_path / "secret.jpg"
    picture(9).save(outside)
    (root / "train2017" / "000000000014.jpg").unlink()
    (root / "train2017" / "000000000014.jpg").symlink_to(outside)
    source = CocoDirectory(root)
    assert "000000000014.jpg leaves the image directory" in message(source.check, source.load())


def test_the_image_directory_itself_may_be_a_link(tmp_path):
    root = write_coco(tmp_path / "coco", n=3)
    (root / "train2017").rename(tmp_path / "disk")
    (root / "train2017").symlink_to(tmp_path / "disk")
    source = CocoDirectory(root)
    source.check(source.load())
    assert source.image(source.load()[0]).size == (12, 8)


def test_missing_and_corrupt_images_are_all_named(tmp_path):
    root = write_coco(tmp_path, n=5)
    images = root / "train2017"
    (images / "000000000007.jpg").unlink()
    (images / "000000000014.jpg").write_text("no picture")
    whole = (images / "000000000021.jpg").read_bytes()
    (images / "000000000021.jpg").write_bytes(whole[:-30])  # the header is intact, the pixels are not
    source = CocoDirectory(root)
    told = message(source.check, source.load())
    assert told.startswith("3 real images cannot be used")
    assert "000000000007.jpg is missing" in told
    assert "000000000014.jpg is damaged" in told
    assert "000000000021.jpg is damaged" in told
    assert re.findall(r"(?<=\. )[A-Z].*", told) == ["Replace them."], "one next step"
    source.check([row for row in source.load() if row["id"] > 21])


def test_text_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat \r\nein Hündchen\n\n", encoding="utf-8")
    source = TextFile(file)
    assert list(source.load()["caption"]) == ["a cat", "ein Hündchen"]
    assert source.describe() != TextFile(write_lines(tmp_path / "b", "a cat")).describe()
    assert "no real images" in message(source.image, source.load()[0])
    assert "no real images" in message(source.check, source.load())


def write_lines(path, text):
    path.write_text(text)
    return path


def test_text_file_errors(tmp_path):
    assert "Cannot read prompts" in message(TextFile(tmp_path / "none").load)
    assert "empty captions for line 1." in message(TextFile(write_lines(tmp_path / "empty", "\n")).load)
    told = message(TextFile(write_lines(tmp_path / "gaps", "a\n\nb\n \nc\n")).load)
    assert "empty captions for line 2, line 4." in told
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    assert "not UTF-8" in message(TextFile(tmp_path / "latin").load)


@pytest.fixture
def parquet(tmp_path, monkeypatch):
    """A local dataset: two captions of image b, one of a, with a list column beside; b's picture is grey 30."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    columns = {
        "key": ["b", "b", "a"],
        "text": ["b one", "b two", "a one"],
        "texts": [["b one", "b two"], ["x"], ["a one"]],
        "picture": [picture(30), picture(40), picture(50)],
        "size": [0.5, 1.5, 2.5],
    }
    features = datasets.Features(
        {
            "key": datasets.Value("string"),
            "text": datasets.Value("string"),
            "texts": datasets.Sequence(datasets.Value("string")),
            "picture": datasets.Image(),
            "size": datasets.Value("float32"),
        }
    )
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / "set" / "train.parquet")
    return str(tmp_path / "set")


def test_hub_dataset_rows_are_images(parquet):
    source = HubDataset(parquet, "train", caption="text", image="picture", id="key")
    table = source.load()
    assert [(row["id"], row["caption"], row["path"]) for row in table] == [("b", "b one", ""), ("a", "a one", "")]
    assert [np.array(source.image(row)).mean() for row in table] == [30, 50]
    assert len(set(table["file_name"])) == 2
    source.check(table)


def test_hub_dataset_without_ids_and_with_lists(parquet):
    source = HubDataset(parquet, "train", caption="texts", image="picture")
    assert [(row["id"], row["caption"]) for row in source.load()] == [(0, "b one"), (1, "x"), (2, "a one")]
    described = source.describe()
    assert parquet not in json.dumps(described)
    assert described != HubDataset(parquet, "train[:2]", caption="texts", image="picture").describe()
    assert described["captions"] != HubDataset(parquet, "train", caption="text").describe()["captions"]


def test_hub_dataset_names_the_rows_of_empty_captions(parquet, tmp_path):
    import datasets

    captions = {"text": ["a", "again", "", "c"], "key": ["a", "a", "b", "c"]}
    datasets.Dataset.from_dict(captions).to_parquet(tmp_path / "set" / "train.parquet")
    told = message(HubDataset(parquet, "train", caption="text", id="key").load)
    assert "empty captions for row 2." in told


def test_hub_dataset_errors(parquet, tmp_path):
    assert "Unknown caption column" in message(HubDataset(parquet, "train").load)
    assert "Choices: key, text, texts, picture, size" in message(HubDataset(parquet, "train").load)
    assert "ids of type float" in message(HubDataset(parquet, "train", caption="text", id="size").load)
    assert "Split 'test' of dataset" in message(HubDataset(parquet, "test", caption="text").load)
    assert "none-here" in message(HubDataset(str(tmp_path / "none-here"), "train").load)
    no_pictures = HubDataset(parquet, "train", caption="text")
    assert "Unknown image column" in message(no_pictures.check, no_pictures.load())
    words = HubDataset(parquet, "train", caption="text", image="key")
    assert "holds no picture" in message(words.check, words.load())


def test_import_is_light():
    code = (
        "import sys, sdprune.data; print({'torch', 'datasets', 'lightning', 'PIL', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
