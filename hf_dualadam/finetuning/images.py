"""Image classification with any ``AutoModelForImageClassification``, with Pillow only: arguments -> Task."""

import glob
import io
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from datasets import Dataset, Image, load_dataset
from datasets.exceptions import DatasetsError
from PIL import Image as PILImage
from tqdm.auto import tqdm
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    PretrainedConfig,
    TrainingArguments,
    ViTImageProcessor,
    default_data_collator,
)

from . import data, labels
from .config import InputError
from .data import DataArguments, warn_of_same_source
from .exact_loss import ClassifierTrainer
from .image_folders import FoundImages, read_split_folder, refuse_shared, split_folders
from .image_transform import ImageTransform, ImageView, eight_bits
from .metrics import LocalMetric, compute_metrics_for, majority_baseline
from .models import ModelArguments, load_config, loading, model_builder, model_order, processor_source, set_labels
from .tables import SPLIT_NAMES, Table, class_names, find_split
from .tasks import Task, TaskKind

logger = logging.getLogger(__name__)


@dataclass
class ImageArguments(DataArguments):
    """Options for the images and their augmentation."""

    train_dir: str | None = field(default=None, metadata={"help": "Training images, in one folder per class."})
    validation_dir: str | None = field(default=None, metadata={"help": "Held-out images, in one folder per class."})
    test_dir: str | None = field(default=None, metadata={"help": "Folder of images to predict."})
    image_processor_name: str | None = field(
        default=None, metadata={"help": "Image processor; by default that of the model."}
    )
    image_column_name: str | None = field(
        default=None, metadata={"help": "Image column; by default the first column of images."}
    )
    label_column_name: str = field(default="label", metadata={"help": "Column of the classes."})
    eval_split: str = field(
        default="validation",
        metadata={"help": "Which split to evaluate on; use test for data sets without a validation split (CIFAR)."},
    )
    train_val_split: float = field(
        default=0.15, metadata={"help": "Fraction of the training images to hold out if there is no eval_split."}
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": "Image size in pixels, for a new model whose configuration has none (ResNet)."},
    )
    augment: bool = field(default=True, metadata={"help": "Crop (and flip) training images at random."})
    crop_min_scale: float = field(
        default=0.6, metadata={"help": "Smallest fraction of the image's area in a random crop; 1 for no crop."}
    )
    crop_padding: int = field(
        default=0,
        metadata={"help": "Instead of crop_min_scale: pad by N pixels and crop at random, as is usual for CIFAR (4)."},
    )
    horizontal_flip: bool = field(
        default=False, metadata={"help": "Mirror training images with probability 1/2: for photos, not for digits."}
    )
    check_images: bool = field(
        default=True,
        metadata={"help": "Decode every image before training; otherwise a broken one stops the run later."},
    )

    def __post_init__(self):
        """Check paths and ranges."""
        super().__post_init__()
        for split, folder in self.folders.items():
            if not Path(folder).is_dir():
                raise InputError(f"{split}_dir: no such folder: {folder}")
        warn_of_same_source(self.folders, "dir")
        if self.eval_split == "train":
            logger.warning("eval_split: train, so nothing is held out from training")
        if self.eval_split in SPLIT_NAMES["validation"]:
            self.eval_split = "validation"
        if not 0 < self.train_val_split < 1:
            raise InputError(f"train_val_split: {self.train_val_split} is out of range; should be between 0 and 1")
        if not 0 < self.crop_min_scale <= 1:
            raise InputError(f"crop_min_scale: {self.crop_min_scale} is out of range; should be above 0 and at most 1")
        if self.image_size is not None and self.image_size < 1:
            raise InputError(f"image_size: {self.image_size} is out of range; should be at least 1")
        if self.crop_padding < 0:
            raise InputError(f"crop_padding: {self.crop_padding} is out of range; should be at least 0")

    @property
    def folders(self) -> dict[str, str]:
        """The image folders given as options, by split."""
        given = {"train": self.train_dir, "validation": self.validation_dir, "test": self.test_dir}
        return {split: folder for split, folder in given.items() if folder}

    @property
    def sources(self) -> list[str]:
        """The given options that name a source of images; folders count as one source."""
        return super().sources + [f"{split}_dir" for split in self.folders][:1]

    @property
    def holds_folders(self) -> bool:
        """Whether the images are in folders, whose names are the classes."""
        if self.data_dir:
            return not any(find_split(Path(self.data_dir), split) for split in ("train", "validation", "test"))
        return bool(self.folders)

    @property
    def name(self) -> str:
        """Short name of the task for files and titles."""
        given = [self.dataset_name, self.data_dir, *self.folders.values(), *self.files.values()]
        return next((Path(source).resolve().stem for source in given if source), "images")


class Images(NamedTuple):
    """One split as loaded, with its name for messages."""

    dataset: Dataset
    name: str


def build(
    args: ImageArguments,
    model_args: ModelArguments,
    *,
    training_args: TrainingArguments | None = None,
    splits: Iterable[str] = ("train", "validation"),
) -> Task:
    """Load and check the images; only caches are written.

    Args:
        args: images and augmentation.
        model_args: the model, pretrained or a configuration.
        training_args: not used; every kind of task receives them.
        splits: which of train, validation and test are needed.

    Raises:
        InputError: images or model cannot be loaded, or hold something unexpected.
    """
    if not (model_args.model_name_or_path or model_args.config_name or model_args.new_config):
        raise InputError(
            "model_name_or_path: missing; the default of Transformers' script is google/vit-base-patch16-224-in21k; "
            "or give model_config, model_type or config_name for a new model"
        )
    sources = _load_splits(args, model_args, set(splits))
    config = load_config(model_args)
    classes = _infer_classes(args, sources, config)
    first = (sources.get("train") or next(iter(sources.values()))).name
    where = "class folders" if args.holds_folders else f"column {args.label_column_name!r}"
    logger.info(f"{first}: {where}: {len(classes)} classes: {labels.listed(classes, 5)}")
    order = model_order(classes, config)
    processor = _load_processor(args.image_processor_name, model_args, config, args.image_size)
    set_labels(config, order)
    prepared = {
        split: _prepare(source, args, classes, order, to_predict=split == "test") for split, source in sources.items()
    }
    if "validation" in set(splits) - set(prepared):
        logger.warning(f"No {args.eval_split} images: {args.train_val_split:.0%} of the training images are held out.")
        parts = prepared["train"].train_test_split(test_size=args.train_val_split, seed=data.SAMPLE_SEED)
        prepared |= {"train": parts["train"], "validation": parts["test"]}
    prepared = {split: _limit(dataset, split, args) for split, dataset in prepared.items()}
    if args.check_images:
        for split, dataset in prepared.items():
            _check_images(dataset, (sources.get(split) or sources["train"]).name)
    train, held_out = prepared.get("train"), prepared.get("validation")
    metric = LocalMetric(["accuracy"])
    plain = ImageTransform(processor, config)
    changed = ImageTransform(processor, config, args.crop_min_scale, args.crop_padding, args.horizontal_flip)
    return Task(
        name=args.name,
        build_model=model_builder(model_args, config, AutoModelForImageClassification),
        train_dataset=train,
        eval_datasets={} if held_out is None else {"": held_out},
        predict_datasets={"": prepared["test"]} if "test" in prepared else {},
        compute_metrics=compute_metrics_for(metric),
        main_metric="accuracy",
        data_collator=default_data_collator,
        processing_class=processor,
        train_view=lambda dataset: ImageView(dataset, changed if args.augment else plain),
        augments=args.augment,
        eval_view=lambda dataset: ImageView(dataset, plain),
        label_names=list(order),
        baseline=majority_baseline(metric, train, held_out),
        card={"tasks": "image-classification", "tags": ["image-classification", "vision"], "dataset": args.name},
        trainer_cls=ClassifierTrainer,
    )


def _load_splits(args: ImageArguments, model_args: ModelArguments, splits: set[str]) -> dict[str, Images]:
    """The requested splits; without held-out images, training images are needed."""
    names = {split: args.eval_split if split == "validation" else split for split in splits}
    datasets = _load_datasets(args, model_args, set(names.values()))
    found = {
        split: Images(datasets[name], _source_name(args, name)) for split, name in names.items() if name in datasets
    }
    for split in splits - set(found):
        if split != "validation" or "train" not in found or args.eval_split != "validation":
            raise InputError(data.missing_split(args, names[split]))
    return found


def _load_datasets(args: ImageArguments, model_args: ModelArguments, splits: set[str]) -> dict[str, Dataset]:
    files = {split: [Path(path)] for split, path in args.files.items()}
    if args.data_dir:
        found = {split: find_split(Path(args.data_dir), split) for split in splits}
        files = {split: paths for split, paths in found.items() if paths}
    folders = {split: Path(folder) for split, folder in args.folders.items()}
    if args.data_dir and not files:
        folders = split_folders(Path(args.data_dir))
    elif args.data_dir:
        beside = set(split_folders(Path(args.data_dir)).values()) - {Path(args.data_dir)}
        if beside:
            raise InputError(
                f"{args.data_dir}: holds split files and the folder {min(beside).name!r}; keep one of them"
            )
    if folders:
        found = {
            split: read_split_folder(folders[split], labeled=split != "test") for split in splits if split in folders
        }
        refuse_shared({split: images.paths for split, images in found.items()})
        return {split: _from_folder(images, args) for split, images in found.items()}
    hub = {"cache_dir": model_args.cache_dir, "token": model_args.token}
    if files:
        return {split: _from_parquet(paths, **hub) for split, paths in files.items()}
    if args.dataset_name is None:
        raise InputError("no images: set data_dir, train_dir and validation_dir, or dataset_name")
    return data.load_hub(args.dataset_name, args.dataset_config_name, **hub)


def _from_folder(found: FoundImages, args: ImageArguments) -> Dataset:
    image = args.image_column_name or "image"
    columns = {image: found.paths} | ({args.label_column_name: found.classes} if found.classes is not None else {})
    return Dataset.from_dict(columns).cast_column(image, Image())


def _from_parquet(paths: list[Path], **kwargs: Any) -> Dataset:
    """Load the images of parquet files, whose names are not interpreted as patterns."""
    for path in paths:
        if path.suffix.lower() != ".parquet":
            raise InputError(f"{path}: images can be read from .parquet files and folders")
    try:
        return load_dataset("parquet", data_files=[glob.escape(str(path)) for path in paths], **kwargs)["train"]
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise InputError(f"{paths[0]}: cannot be read: {reason}") from error


def _source_name(args: ImageArguments, split: str) -> str:
    return args.files.get(split) or args.folders.get(split) or f"{args.data_dir or args.dataset_name} {split}"


def _infer_classes(args: ImageArguments, sources: dict[str, Images], config: PretrainedConfig) -> tuple[str, ...]:
    """Class names from the training images (stored names or labels), else from the model."""
    column = args.label_column_name
    if "train" not in sources:
        return tuple(config.id2label[index] for index in range(config.num_labels))
    dataset = sources["train"].dataset
    if names := class_names(dataset.features).get(column):
        return tuple(names)
    if args.holds_folders:
        labels.refuse_lookalikes(sources["train"].name, dataset[column])
        return tuple(sorted(set(dataset[column])))
    found = labels.infer_classes(_label_table(sources["train"], column), column)
    if found is None:
        raise InputError(f"{sources['train'].name}: column {column!r} holds scores; should be classes")
    return tuple(found)


def _label_table(source: Images, column: str) -> Table:
    """The labels, and only the names of the other columns, since reading them would decode every image."""
    dataset = source.dataset
    columns = {name: dataset[name][:] if name == column else range(len(dataset)) for name in dataset.column_names}
    return Table(source.name, columns, class_names(dataset.features))


def _load_processor(name: str | None, args: ModelArguments, config: PretrainedConfig, image_size: int | None) -> Any:
    """The one named, the pretrained model's, or for a new model a plain one: its size, values from -1 to 1."""
    own_size = getattr(config, "image_size", None)
    if image_size is not None and (args.model_name_or_path or own_size is not None):
        raise InputError("image_size: allowed only for a new model whose configuration has no image size")
    if name:
        with loading("image_processor_name", name):
            return AutoImageProcessor.from_pretrained(name, **args.hub_kwargs)
    if args.model_name_or_path:
        with loading("model_name_or_path", args.model_name_or_path):
            source = processor_source(args, "preprocessor_config.json")
            return AutoImageProcessor.from_pretrained(source, **args.hub_kwargs)
    size = own_size or image_size
    if size is None:
        raise InputError(f"image_size: required, since the configuration of {config.model_type} has none")
    size = size if isinstance(size, list | tuple) else (size, size)
    halves = [0.5] * config.num_channels
    return ViTImageProcessor(size={"height": size[0], "width": size[1]}, image_mean=halves, image_std=halves)


def _prepare(
    source: Images, args: ImageArguments, classes: tuple[str, ...], order: tuple[str, ...], *, to_predict: bool
) -> Dataset:
    """Columns ``image``, ``row`` and, if there are labels, ``label`` in the model's order."""
    table = _label_table(source, args.label_column_name)
    column = _image_column(source, args)
    table.require([column] if to_predict else [column, args.label_column_name])
    targets = labels.class_labels(table, args.label_column_name, classes, optional=to_predict)
    dataset = source.dataset.select_columns([column]).cast_column(column, Image())
    dataset = dataset.rename_column(column, "image") if column != "image" else dataset
    if targets is not None:
        indices = pa.array([order.index(classes[label]) for label in targets], pa.int64())
        dataset = dataset.add_column("label", indices)
    return dataset.add_column("row", pa.array(range(len(dataset)), pa.int64()))  # of the file, for messages


def _limit(dataset: Dataset, split: str, args: ImageArguments) -> Dataset:
    if split == "test":
        return dataset.select(range(min(len(dataset), args.max_predict_samples or len(dataset))))
    return data.sample(dataset, args.max_train_samples if split == "train" else args.max_eval_samples)


def _image_column(source: Images, args: ImageArguments) -> str:
    """The image column: the named one, else the first of image type, else ``image`` or ``img``."""
    if args.image_column_name:
        return args.image_column_name
    features = source.dataset.features
    return next(
        (name for name, feature in features.items() if isinstance(feature, Image)),
        next((name for name in ("image", "img") if name in features), "image"),
    )


def _check_images(dataset: Dataset, name: str) -> None:
    """Decode every image once.

    Raises:
        InputError: one is missing or broken.
    """
    encoded = dataset.cast_column("image", Image(decode=False))
    for example in tqdm(encoded, desc=f"Checking the images of {name}", leave=False):
        image = example["image"]
        try:
            opened = PILImage.open(io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"])
            opened.load()
            eight_bits(opened)
        except Exception as error:  # Pillow's decoders raise many types
            where = " ".join(filter(None, [image and image["path"], f"(row {example['row']})"]))
            raise InputError(f"{name}: the image {where} cannot be decoded: {error}") from error


KIND = TaskKind((ImageArguments, ModelArguments), build)
