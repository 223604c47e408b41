"""Splits come from the first folder level, classes from the next; nothing is dropped silently."""

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from tiny import VIT

from hf_dualadam.finetuning import images
from hf_dualadam.finetuning.config import InputError
from hf_dualadam.finetuning.image_folders import read_split_folder, split_folders
from hf_dualadam.finetuning.image_transform import eight_bits
from hf_dualadam.finetuning.models import ModelArguments


def fill(folder, names, count=2):
    """``count`` small images in each of ``names`` (folders), or one where the name has an ending."""
    for name in names:
        paths = (
            [folder / name] if "." in name.rpartition("/")[2] else [folder / name / f"{i}.png" for i in range(count)]
        )
        for number, path in enumerate(paths):
            path.parent.mkdir(parents=True, exist_ok=True)
            color = (number * 40, 0, 0)
            try:
                PILImage.new("RGB", (8, 8), color).save(path)
            except ValueError:
                path.write_text("no image")
    return folder


def built(folder, splits=("train", "validation"), **options):
    arguments = images.ImageArguments(data_dir=str(folder), **options)
    return images.build(arguments, ModelArguments(model_config=VIT), splits=splits)


@pytest.mark.parametrize("held_out", ["validation", "val", "dev"])
@pytest.mark.parametrize("classes", [("bus", "train"), ("bus", "freight train"), ("test", "validation-1")])
def test_words_in_class_names_make_no_splits(tmp_path, held_out, classes):
    fill(tmp_path, [f"{split}/{name}" for split in ("train", held_out) for name in classes])
    task = built(tmp_path)
    assert task.label_names == sorted(classes)
    assert (len(task.train_dataset), len(task.eval_datasets[""])) == (4, 4)
    for dataset, split in ((task.train_dataset, "train"), (task.eval_datasets[""], held_out)):
        paths = [image.filename for image in dataset["image"]]
        assert all(path.startswith(str(tmp_path / split)) for path in paths)


@pytest.mark.parametrize("name", ["cat_train_1.png", "test.png", "val 2.png", "dev-3.PNG"])
def test_words_in_file_names_make_no_splits(tmp_path, name):
    fill(tmp_path, ["cat", "dog", f"cat/{name}"])
    task = built(tmp_path, splits=("train",))
    assert len(task.train_dataset) == 5


@pytest.mark.parametrize("name", ["photos [2024]", "a*b", "what?", "hf__x", "ünï ☃", "train"])
def test_a_path_is_a_path(tmp_path, name):
    fill(tmp_path / name, ["cat", "dog"])
    assert len(built(tmp_path / name, splits=("train",)).train_dataset) == 4
    dataset = built(tmp_path / name, splits=("train",)).train_dataset
    dataset.select_columns(["image"]).to_parquet(str(tmp_path / name / "bare.parquet"))
    parquet = tmp_path / name / "files"
    parquet.mkdir()
    dataset.to_parquet(str(parquet / "train.parquet"))
    assert len(built(parquet, splits=("train",)).train_dataset) == 4


def test_classes_that_differ_by_case_stay_apart(tmp_path):
    fill(tmp_path, ["A", "a", "b"], count=3)
    task = built(tmp_path, splits=("train",))
    assert task.label_names == ["A", "a", "b"]
    assert task.train_dataset["label"][:] == [0] * 3 + [1] * 3 + [2] * 3


def test_numbers_as_folders_are_names(tmp_path):
    for name in ("1.5", "2.5", "10"):
        fill(tmp_path / name, ["0.png", "1.png"])
    assert built(tmp_path, splits=("train",)).label_names == ["1.5", "10", "2.5"]


def test_what_is_no_image_is_counted(tmp_path, caplog):
    fill(
        tmp_path,
        ["cat", "dog", "cat/a.svg", "cat/b.heic", "dog/notes.txt", "dog/.DS_Store", ".git/x.png", "Thumbs.db"],
    )
    found = read_split_folder(tmp_path, labeled=True)
    assert len(found.paths) == 4
    assert "skipped 6 files" in caplog.text
    for kind in ("1 .svg", "1 .heic", "1 .txt", "1 .db", "1 hidden", "1 in hidden folders"):
        assert kind in caplog.text, kind


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["bus", "train"], "'train' may be a split or a class: 'bus' is not a split"),
        (["train/a", "train/b", "other/a"], "'train' may be a split or a class"),
        (["val/a", "val/b", "dev/a", "dev/b"], "both mean validation"),
        (["train/a", "train/b", "loose.png"], "loose.png: is next to the folders of the splits"),
        (["a", "b", "loose.png"], "loose.png: is next to the class folders"),
        (["train"], "is not in a class folder"),
        (["a", "b/deep"], "deep/0.png: is deeper than the folder of class 'b'"),
        (["a"], "only one class folder, 'a'"),
        (["train/a/x.txt"], "holds no images"),
        (["a::b", "c"], "interprets '::' in a path as a chain"),
        ([], "holds no images"),
    ],
)
def test_other_layouts_are_refused_with_the_reason(tmp_path, names, message):
    fill(tmp_path, names)
    with pytest.raises(InputError, match=message):
        built(tmp_path, splits=("train",))


@pytest.mark.parametrize("name", ["validation", "val", "dev"])
@pytest.mark.parametrize("inside", ["", "a", "a/notes.txt"])
def test_a_held_out_folder_without_images_is_refused(tmp_path, name, inside):
    fill(tmp_path, ["train/a", "train/b", *[f"{name}/{inside}"] * ("." in inside)])
    (tmp_path / name / inside.partition("/")[0]).mkdir(parents=True, exist_ok=True)
    with pytest.raises(InputError, match=rf"{name}: holds no images"):
        built(tmp_path)
    assert len(built(tmp_path, splits=("train",)).train_dataset) == 4


def test_class_folders_without_images_are_said(tmp_path, caplog):
    fill(tmp_path, ["train/a", "train/b", "validation/a", "validation/b"])
    for folder in ("train/c", "validation/c"):
        (tmp_path / folder).mkdir()
    assert built(tmp_path).label_names == ["a", "b"]
    for split in ("train", "validation"):
        assert f"{split}: skipped 1 folders without images: 'c'" in caplog.text


def test_dead_links_and_loops_are_counted(tmp_path, caplog):
    fill(tmp_path, ["train/a", "train/b", "validation/a", "validation/b"])
    (tmp_path / "train" / "a" / "dead.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "train" / "a" / "up").symlink_to(tmp_path / "train")
    (tmp_path / "train" / "b" / "itself").symlink_to(tmp_path / "train" / "b")
    assert len(built(tmp_path).train_dataset) == 4
    assert "skipped 3 files" in caplog.text
    assert "1 dead links" in caplog.text and "2 links to a folder that is read already" in caplog.text


def test_class_folders_may_all_be_links(tmp_path):
    fill(tmp_path / "store", ["a", "b", "c", "d"])
    for split, names in (("train", "ab"), ("validation", "cd")):
        (tmp_path / "data" / split).mkdir(parents=True)
        for name, target in zip("ab", names, strict=True):
            (tmp_path / "data" / split / name).symlink_to(tmp_path / "store" / target)
    task = built(tmp_path / "data")
    assert (len(task.train_dataset), len(task.eval_datasets[""])) == (4, 4)


@pytest.mark.parametrize("link", ["symbolic", "hard", "folder"])
def test_a_held_out_image_must_not_be_a_training_image(tmp_path, link):
    fill(tmp_path, ["train/a", "train/b", "validation/a", *["validation/b"] * (link != "folder")])
    trained, held_out = tmp_path / "train" / "b", tmp_path / "validation" / "b"
    if link == "folder":
        held_out.symlink_to(trained)
    elif link == "hard":
        (held_out / "9.png").hardlink_to(trained / "0.png")
    else:
        (held_out / "9.png").symlink_to(trained / "0.png")
    with pytest.raises(InputError, match=r"validation/b/[09].png: the validation image is also a training image"):
        built(tmp_path)


def test_class_folders_that_look_alike_are_refused(tmp_path):
    fill(tmp_path, ["train/caf\u00e9", "train/cafe\u0301"])
    with pytest.raises(InputError, match="differ only in"):
        built(tmp_path, splits=("train",))


@pytest.mark.parametrize("eval_split", ["validation", "val", "dev"])
def test_the_held_out_split_has_three_names(tmp_path, eval_split):
    fill(tmp_path, ["train/a", "train/b", "val/a", "val/b"])
    task = built(tmp_path, eval_split=eval_split)
    assert (len(task.train_dataset), len(task.eval_datasets[""])) == (4, 4)
    with pytest.raises(InputError, match="test"):
        built(tmp_path, eval_split="test")


def test_split_files_beside_split_folders_are_refused(tmp_path):
    fill(tmp_path, ["train/a", "train/b"])
    (tmp_path / "validation.parquet").write_text("x")
    with pytest.raises(InputError, match="split files and the folder 'train'"):
        built(tmp_path)


def test_held_out_classes_must_be_known(tmp_path):
    fill(tmp_path, ["train/bus", "train/car", "validation/bus", "validation/truck"])
    with pytest.raises(InputError, match="unexpected value 'truck'"):
        built(tmp_path)


def test_images_to_predict_need_no_class_folders(tmp_path):
    fill(tmp_path, ["train/a", "train/b", "test/1.png", "test/2.png"])
    assert split_folders(tmp_path).keys() == {"train", "test"}
    predicted = built(tmp_path, splits=("train", "test")).predict_datasets[""]
    assert len(predicted) == 2 and "label" not in predicted.column_names


def test_sources_are_named_once(tmp_path):
    with pytest.raises(InputError, match="data_dir and train_dir: set only one source"):
        images.ImageArguments(data_dir=str(tmp_path), train_dir=str(tmp_path))


def test_evaluating_on_training_images_is_said(tmp_path, caplog):
    images.ImageArguments(train_dir=str(tmp_path), validation_dir=str(tmp_path))
    assert f"train_dir and validation_dir: both are {tmp_path}, so nothing is held out" in caplog.text
    images.ImageArguments(data_dir=str(tmp_path), eval_split="train")
    assert "eval_split: train, so nothing is held out" in caplog.text


@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_sixteen_bits_are_scaled(tmp_path, ending):
    values = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    PILImage.fromarray(values).save(tmp_path / f"a.{ending}")
    image = PILImage.open(tmp_path / f"a.{ending}")
    image.load()
    assert np.abs(np.asarray(eight_bits(image), dtype=int) - np.linspace(0, 255, 64).reshape(8, 8)).max() <= 1


def test_sixteen_bits_reach_the_model_scaled(tmp_path):
    fill(tmp_path, ["a", "b"])
    PILImage.fromarray(np.full((8, 8), 32768, dtype=np.uint16)).save(tmp_path / "a" / "deep.png")
    task = built(tmp_path, splits=("train",), augment=False)
    pixels = [row["pixel_values"] for row in task.train_view(task.train_dataset)]
    assert any(torch.allclose(pixel, torch.zeros(()), atol=0.01) for pixel in pixels)  # half of the range


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_pixels_of_unknown_range_are_refused(tmp_path, kind):
    fill(tmp_path, ["a", "b"])
    PILImage.fromarray(np.full((8, 8), 1000, dtype=kind)).save(tmp_path / "a" / "odd.tiff")
    with pytest.raises(InputError, match="odd.tiff .* unknown range"):
        built(tmp_path, splits=("train",))


def test_a_missing_model_names_the_default_of_transformers():
    with pytest.raises(InputError, match="google/vit-base-patch16-224-in21k"):
        images.build(images.ImageArguments(), ModelArguments())
