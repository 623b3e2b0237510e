"""The options of ``clipfast train`` that say which pairs a run sees, and how they are read."""

import dataclasses

from .option_checks import option


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """The options of :class:`clipfast.train.TrainConfig` about the source of the pairs."""

    train_data: str = option(
        "", "pairs: WebDataset shards (.tar, .tar.gz), Parquet or Arrow files, tables (.csv, .tsv, .jsonl) whose lines "
        "name image files, or folders of these or of images with texts beside them; {000..099} and *.tar expand, "
        "'::' joins patterns, 'bundled:emoji/noto' ships with the package, and 'synthetic:65536' are so many drawn "
        "shapes with captions, which need no files ('synthetic:65536@1' others); alone, they are drawn on the device, "
        "without crops",
    )  # fmt: skip
    image_key: str | None = option(
        None, "extension of the image in a tar file, or column of a table that names its file; ';' separates "
        "alternatives (default: jpg, jpeg, png, webp, gif, bmp, image, img, filepath, file_name or path); in "
        "--val-data, the default ones follow",
        aliases=("--csv-img-key",),
    )  # fmt: skip
    text_key: str | None = option(
        None, "extension of the caption in a tar file, or column of a table or key of a json; ';' separates "
        "alternatives; of a list of captions, one is drawn (default: txt, caption, text or title); in --val-data, "
        "the default ones follow",
        aliases=("--csv-caption-key",),
    )  # fmt: skip
    json_text_key: tuple[str, ...] = option(
        (), "take the caption from the first of these keys of the json that is there and not empty, whatever "
        "--text-key says",
    )  # fmt: skip
    json_text_key_probs: tuple[float, ...] = option(
        (), "draw which of the keys of --json-text-key comes first, each by its probability; those with 0 come last",
        float,
    )  # fmt: skip
    csv_separator: str | None = option(
        None,
        "separator of fields in .csv and .tsv files whose header has it (default: what the name and the header say)",
    )
    train_data_upsampling_factors: tuple[float, ...] = option(
        (), "for each part of --train-data that '::' joins, how often its pairs are seen while those of a part with "
        "factor 1 are seen once", float, positive=True, separator="::",
    )  # fmt: skip
    dataset_resampled: bool = option(
        False,
        "draw runs of neighbouring pairs at random, with replacement; otherwise each pair is seen once before one "
        "is seen again",
        bool,
    )
    train_num_samples: int | None = option(None, "pairs per epoch (default: all)", int, positive=True, most=10**15)
