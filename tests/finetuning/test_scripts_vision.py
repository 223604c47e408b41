"""run_image_classification.py on a tiny random ViT, with Pillow alone."""

import io

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from tiny import FAST, VIT, load_script, read_json
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig, ViTImageProcessor

from hf_dualadam.finetuning import images
from hf_dualadam.finetuning.config import InputError, run_main
from hf_dualadam.finetuning.models import ModelArguments

script = load_script("run_image_classification")
MODEL = ["--model_config", str(VIT)]


def picture(seed, size=(10, 12), mode="RGB"):
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], len(mode))
    return PILImage.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode)


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def image_folder(root, splits=("train", "validation"), modes=("RGB", "L", "RGBA")):
    for split in splits:
        for label in ("cat", "dog"):
            (root / split / label).mkdir(parents=True)
            for i in range(6):
                mode = modes[i % len(modes)]
                picture(i, mode=mode).save(root / split / label / f"{i}.png")
    return root


def parquet(path, count, labels=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"image": [{"bytes": png(picture(i)), "path": None} for i in range(count)]}
    if labels is not None:
        columns["label"] = labels
    Dataset.from_dict(columns).to_parquet(str(path))
    return path


def test_image_folder_trains_evaluates_and_predicts(tmp_path):
    data, output = image_folder(tmp_path / "data", ("train", "validation", "test")), tmp_path / "out"
    options = ["--data_dir", str(data), "--output_dir", str(output), "--do_train", "--do_eval", "--do_predict"]
    finished = script.main([*options, *MODEL, *FAST])
    results = read_json(output / "all_results.json")
    assert results["generalization_gap_accuracy"] == pytest.approx(
        results["train_eval_accuracy"] - results["eval_accuracy"]
    )
    assert results["generalization_gap_loss"] == pytest.approx(results["eval_loss"] - results["train_eval_loss"])
    assert {"predict_accuracy", "predict_loss"} <= set(results) and finished.task.baseline == 0.5
    lines = (output / "predict_results_data.txt").read_text().splitlines()
    assert len(lines) == 13 and {line.split("\t")[1] for line in lines[1:]} <= {"cat", "dog"}
    assert {"README.md", "learning_curves.png", "preprocessor_config.json"} <= {p.name for p in output.iterdir()}
    model = AutoModelForImageClassification.from_pretrained(output)
    assert model.config.id2label == {0: "cat", 1: "dog"}
    inputs = AutoImageProcessor.from_pretrained(output)(picture(1), return_tensors="pt")
    own = finished.task.eval_view(finished.task.eval_datasets[""]).transform(picture(1))
    assert torch.allclose(inputs["pixel_values"][0], own, atol=1e-5)
    assert model(**inputs).logits.shape == (1, 2)


def test_parquet_without_validation_is_split_and_starts_from_a_saved_model(tmp_path):
    parquet(tmp_path / "data" / "train.parquet", 20, [i % 3 for i in range(20)])
    options = ["--data_dir", str(tmp_path / "data"), *FAST]
    first = script.main([*options, *MODEL, "--train_val_split", "0.25", "--output_dir", str(tmp_path / "first")])
    assert (first.metrics["train_samples"], first.metrics["eval_samples"]) == (15, 5)
    assert first.trainer.model.config.num_labels == 3
    again = ["--model_name_or_path", str(tmp_path / "first"), "--output_dir", str(tmp_path / "second")]
    assert script.main([*options, *again, "--optim", "adamw_torch"]).metrics["eval_samples"] == 3


def test_any_split_can_be_held_out(tmp_path):
    for split, count in (("train", 9), ("test", 6)):
        parquet(tmp_path / "data" / f"{split}.parquet", count, [i % 3 for i in range(count)])
    arguments = images.ImageArguments(data_dir=str(tmp_path / "data"), eval_split="test")
    task = images.build(arguments, ModelArguments(model_config=VIT))
    assert (len(task.train_dataset), len(task.eval_datasets[""])) == (9, 6)


def test_only_training_images_are_augmented(tmp_path):
    task = images.build(
        images.ImageArguments(data_dir=str(image_folder(tmp_path)), crop_min_scale=0.3, horizontal_flip=True),
        ModelArguments(model_config=VIT),
    )
    train, plain = task.train_view(task.train_dataset), task.eval_view(task.train_dataset)
    torch.manual_seed(0)
    first, second = train[0]["pixel_values"], train[0]["pixel_values"]
    assert first.shape == (3, 8, 8) and not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(train[0]["pixel_values"], first)
    assert torch.equal(plain[0]["pixel_values"], plain[0]["pixel_values"])


def test_flip_mirrors_and_the_full_crop_changes_nothing():
    processor, config = ViTImageProcessor(size={"height": 8, "width": 8}), ViTConfig(**VIT)
    plain = images.ImageTransform(processor, config)
    flipping = images.ImageTransform(processor, config, horizontal_flip=True)
    image = picture(0, (8, 8))
    torch.manual_seed(0)
    seen = [flipping(image) for _ in range(20)]
    flipped = [torch.equal(pixels, plain(image).flip(-1)) for pixels in seen]
    assert all(torch.equal(p, plain(image)) or f for p, f in zip(seen, flipped, strict=True)) and 0 < sum(flipped) < 20


def test_crops_keep_the_share_asked_for():
    transform = images.ImageTransform(
        ViTImageProcessor(size={"height": 8, "width": 8}), ViTConfig(**VIT), crop_min_scale=0.5
    )
    image = picture(0, (40, 40))
    torch.manual_seed(0)
    boxes = np.array([transform._random_box(image) for _ in range(200)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0 and boxes.max() <= 40 + 1e-9
    assert (width / height).max() <= 16 / 9 and (width * height).max() <= 1600 + 1e-6
    assert (width * height).min() >= 0.5 * 1600 * 0.85  # a crop at the border can be a little smaller


def test_padded_crops_shift_the_image_and_fill_with_black():
    processor, config = ViTImageProcessor(size={"height": 8, "width": 8}), ViTConfig(**VIT)
    plain = images.ImageTransform(processor, config)
    shifting = images.ImageTransform(processor, config, crop_padding=2)
    image = picture(0, (8, 8))
    padded = torch.full((3, 12, 12), -1.0)
    padded[:, 2:10, 2:10] = plain(image)
    allowed = [padded[:, top : top + 8, left : left + 8] for top in range(5) for left in range(5)]
    torch.manual_seed(0)
    crops = [shifting(image) for _ in range(200)]
    seen = {next(i for i, part in enumerate(allowed) if torch.equal(part, crop)) for crop in crops}
    assert seen == set(range(25))


def test_shortest_edge_processors_crop_the_center():
    processor = ViTImageProcessor(size={"shortest_edge": 8})
    transform = images.ImageTransform(processor, ViTConfig(**VIT))
    image = PILImage.new("RGB", (24, 8), "black")
    image.paste((255, 255, 255), (8, 0, 16, 8))
    assert torch.equal(transform(image), torch.ones(3, 8, 8))


def test_grey_models_get_one_channel(tmp_path):
    parquet(tmp_path / "train.parquet", 8, [0, 1] * 4)
    arguments = images.ImageArguments(data_dir=str(tmp_path), image_column_name="image")
    task = images.build(arguments, ModelArguments(model_config=VIT | {"num_channels": 1}))
    assert task.eval_view(task.eval_datasets[""])[0]["pixel_values"].shape == (1, 8, 8)
    assert task.build_model().config.num_channels == 1


def test_broken_image_is_named_before_anything_is_written(tmp_path, capsys):
    data, output = image_folder(tmp_path / "data"), tmp_path / "out"
    content = (data / "train" / "dog" / "3.png").read_bytes()
    (data / "train" / "dog" / "3.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(SystemExit) as caught:
        run_main(lambda: script.main(["--data_dir", str(data), "--output_dir", str(output), *MODEL, *FAST]))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert caught.value.code == 2 and "dog/3.png" in error and "cannot be decoded" in error
    assert not output.exists()


def test_broken_bytes_are_named_by_row(tmp_path):
    path = tmp_path / "train.parquet"
    rows = {"image": [png(picture(0)), b"no image"], "label": [0, 1]}
    Dataset.from_dict(rows, Features({"image": Value("binary"), "label": Value("int64")})).to_parquet(str(path))
    arguments = images.ImageArguments(train_file=str(path), validation_file=str(path))
    with pytest.raises(InputError, match=r"train.parquet: the image \(row 1\) cannot be decoded"):
        images.build(arguments, ModelArguments(model_config=VIT))


@pytest.mark.parametrize(
    ("labels", "message"),
    [([0, 1, -1, 1], "-1 in row 2"), ([0, None, 1, 1], "None in row 1"), (None, "column 'label' is missing")],
)
def test_unexpected_labels_are_named(tmp_path, labels, message):
    parquet(tmp_path / "train.parquet", 4, labels)
    with pytest.raises(InputError, match=message):
        images.build(images.ImageArguments(data_dir=str(tmp_path)), ModelArguments(model_config=VIT))


def test_options_out_of_range_are_refused(tmp_path):
    for options in ({"train_val_split": 1.0}, {"crop_min_scale": 0.0}, {"train_dir": "no/such"}):
        with pytest.raises(InputError, match=next(iter(options))):
            images.ImageArguments(**options)
    with pytest.raises(InputError, match="no images"):
        images.build(images.ImageArguments(), ModelArguments(model_config=VIT))
    with pytest.raises(InputError, match="model_type 'vitt'"):
        parquet(tmp_path / "train.parquet", 4, [0, 1, 0, 1])
        images.build(
            images.ImageArguments(data_dir=str(tmp_path)), ModelArguments(model_config={"model_type": "vitt"})
        )


def test_image_features_are_kept_from_parquet(tmp_path):
    rows = {"picture": [picture(i) for i in range(4)], "label": ["a", "b", "a", "b"]}
    Dataset.from_dict(rows, Features({"picture": Image(), "label": Value("string")})).to_parquet(
        str(tmp_path / "train.parquet")
    )
    task = images.build(images.ImageArguments(data_dir=str(tmp_path)), ModelArguments(model_config=VIT))
    assert task.label_names == ["a", "b"]
