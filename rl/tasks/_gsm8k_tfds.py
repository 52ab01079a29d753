"""The TensorFlow data set `gsm8k_jsonl`: gsm8k from local files.

TFDS has a `gsm8k` of its own, but that one downloads, and needs the "socratic" files beside the two of the data set.
Preparing writes ArrayRecord files and reading takes NumPy arrays, so neither TensorFlow nor a network is needed.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from rl.tasks import gsm8k
from rl.tasks.types import TaskError


class Gsm8kJsonl(tfds.core.GeneratorBasedBuilder):
    """Questions and worked answers; the config's name is a digest of the files, so other files are prepared anew."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Put train.jsonl and test.jsonl of openai/grade-school-math into one folder."

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Grade school math word problems with worked answers.",
            features=tfds.features.FeaturesDict({field: tfds.features.Text() for field in gsm8k.Record._fields}),
            homepage="https://github.com/openai/grade-school-math",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {split: self._generate_examples(dl_manager.manual_dir / f"{split}.jsonl") for split in gsm8k.SPLITS}

    def _generate_examples(self, path: Path) -> Iterator[tuple[int, dict[str, str]]]:
        for i, record in enumerate(gsm8k.read(Path(path)).records):
            yield i, record._asdict()


def read(path: Path, data_dir: str | None = None) -> dict[str, list[gsm8k.Record]]:
    """Prepares the data set if that has not been done, and reads both splits.

    Args:
      path: the folder with `train.jsonl` and `test.jsonl`.
      data_dir: where TFDS keeps prepared data sets; None for its default.

    Returns:
      The records of "train" and "test", in the order TFDS stores them.

    Raises:
      TaskError: a file is missing or has a broken line (with its number).
    """
    digest = hashlib.sha256()
    for split in gsm8k.SPLITS:
        try:
            digest.update((path / f"{split}.jsonl").read_bytes())
        except OSError as error:
            raise TaskError(f"gsm8k needs {split}.jsonl in {path} ({error.strerror})") from error
    config = tfds.core.BuilderConfig(name=f"files_{digest.hexdigest()[:16]}")
    builder = Gsm8kJsonl(config=config, data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=path))
    return {
        split: [gsm8k.Record(row["question"].decode(), row["answer"].decode()) for row in builder.as_data_source(split)]
        for split in gsm8k.SPLITS
    }
