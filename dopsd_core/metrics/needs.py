"""What a metric needs: a package and weights. What is missing is one sentence that says what to do.

Weights are a folder or file on this machine, or the id of a repository on the Hugging Face hub. Nothing is downloaded
unless the caller asks for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class MetricUnavailable(ValueError):
    """A metric cannot be computed here; the message names what is missing and says what to do."""


@dataclass(frozen=True)
class Needs:
    """What a metric needs.

    Attributes:
        metric: the metric's name.
        packages: what to install, as for pip.
        hub_id: the repository on the hub with the weights of the paper's protocol.
        files: patterns of the files that are read from the repository.
    """

    metric: str
    packages: str
    hub_id: str
    files: tuple[str, ...] = ("*.json", "*.txt", "*.jinja", "*.safetensors")

    @contextmanager
    def imported(self) -> Iterator[None]:
        """Imports of the packages go inside the `with` block.

        Raises:
            MetricUnavailable: a package is missing or does not fit the installed torch.
        """
        try:
            yield
        except (ImportError, RuntimeError, OSError) as error:  # torchvision's are of any of these kinds
            raise MetricUnavailable(
                f"{self.metric} needs packages that cannot be imported here ({error}): pip install {self.packages}"
            ) from error

    def weights(self, source: str | Path, download: bool = False) -> Path:
        """The folder or file of the weights.

        Args:
            source: a folder, a file, or a hub id; a repository that was downloaded before is found without a network.
            download: whether a hub id may be downloaded.

        Raises:
            MetricUnavailable: the weights are not on this machine, or cannot be downloaded.
        """
        path = Path(source).expanduser()
        if path.exists():
            return path
        if not _HUB_ID.fullmatch(str(source)):
            raise MetricUnavailable(
                f"{self.metric}: there are no weights at {source}; give the folder or file of {self.hub_id}"
            )
        with self.imported():
            from huggingface_hub import snapshot_download
        try:
            found = snapshot_download(str(source), local_files_only=not download, allow_patterns=list(self.files))
        except Exception as error:  # the hub's client raises nearly anything without a network
            way = "cannot be downloaded" if download else "are not on this machine"
            raise MetricUnavailable(
                f"{self.metric}: the weights {source} {way}; run `hf download {source}` where there is a network and "
                "give the folder"
            ) from error
        return Path(found)

    def file_in(self, path: Path, *patterns: str) -> Path:
        """The path if it is a file, else the first file in that folder that matches a pattern.

        Raises:
            MetricUnavailable: the folder has no such file.
        """
        if path.is_file():
            return path
        for pattern in patterns:
            for found in sorted(path.glob(pattern)):
                return found
        raise MetricUnavailable(
            f"{self.metric}: the folder {path} has no file {' or '.join(patterns)}; download {self.hub_id} again"
        )

    def folder(self, path: Path) -> Path:
        """The path, which must be a folder with config.json.

        Raises:
            MetricUnavailable: it is not.
        """
        if not (path / "config.json").is_file():
            raise MetricUnavailable(
                f"{self.metric}: {path} has no config.json; give the whole folder of {self.hub_id}, with its JSON files"
            )
        return path
