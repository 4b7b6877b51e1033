"""Models by name: a path, or a repository of the Hugging Face Hub, of which only what is used is fetched."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pbe.checkpoints.folders import (
    ANY,
    CHECKER,
    SHARD,
    STRANGERS,
    SUFFIXES,
    FileChoice,
    is_pickle,
    variant_of,
)
from pbe.editing.settings import existing_path
from pbe.errors import UserError
from pbe.files import expand_home

NATIVE_FILES = ("unet.safetensors", "autoencoder.safetensors", "exemplar_encoder.safetensors")
COMPONENTS = ("unet", "vae", "image_encoder", "feature_extractor", "scheduler")
SMALL = (".json", ".yaml", ".yml")
# Whatever goes wrong on the way to the Hub: errors of the system, and those of the HTTP library underneath.
TRANSPORT: tuple[type[BaseException], ...] = (OSError, *HfHubHTTPError.__bases__)
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hub:
    """How the Hub is asked; the address is ``$HF_ENDPOINT``, ``HF_HUB_OFFLINE=1`` keeps every call offline.

    Attributes:
        revision: branch, tag or commit; None is ``main``.
        cache_dir: where downloads go; None is huggingface_hub's cache.
        local_files_only: take what is cached and do not connect.
        token: for private repositories; None is the one that ``hf auth login`` stored.
        files: which copies of the weights are fetched.
        force_download: fetch files that are cached, too.
    """

    revision: str | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    token: str | bool | None = None
    files: FileChoice = ANY
    force_download: bool = False

    def find(self, path_or_hub_id: str | Path) -> Path:
        """Return the path of a model: the one given, or that of a download.

        A path that exists comes before a repository of the same name.
        """
        path = existing_path(path_or_hub_id)
        return self._download(str(path_or_hub_id)) if path is None else path

    def _download(self, name: str) -> Path:
        if self.local_files_only:
            return self._cached(
                name, f"'{name}' is neither a path here nor in the cache, and the call stays offline"
            )
        try:
            files = self._list(name)
        except RevisionNotFoundError as error:
            raise UserError(f"'{name}' on the Hub has no revision '{self.revision}'") from error
        except HFValidationError as error:
            raise UserError(f"'{name}' cannot be the name of a repository: {_first_line(error)}") from error
        except TRANSPORT as error:
            problem = _explain(name, error)
            logger.warning("%s; taking the cached copy, if there is one", problem)
            return self._cached(name, problem, error)
        try:
            return self._snapshot(name, select_files(files, name, self.files))
        except TRANSPORT as error:
            raise UserError(f"downloading '{name}' failed: {_first_line(error)}") from error

    def _list(self, name: str) -> list[str]:
        api, revision = HfApi(token=self.token), self.revision or "main"
        info = api.model_info(name, revision=revision)
        if info.siblings:
            return [each.rfilename for each in info.siblings]
        return list(api.list_repo_files(name, revision=info.sha))

    def _cached(self, name: str, problem: str, cause: BaseException | None = None) -> Path:
        """Return the folder of an earlier download, whatever it holds: loading finds what is missing."""
        try:
            return self._snapshot(name, [], offline=True)
        except TRANSPORT as error:
            raise UserError(problem) from cause or error

    def _snapshot(self, name: str, files: list[str], offline: bool = False) -> Path:
        folder = snapshot_download(
            name,
            revision=self.revision,
            cache_dir=None if self.cache_dir is None else expand_home(str(self.cache_dir)),
            token=self.token,
            force_download=self.force_download,
            local_files_only=offline,
            allow_patterns=[re.sub(r"([*?\[])", r"[\1]", file) for file in files],
        )
        return Path(folder)


def _explain(name: str, error: BaseException) -> str:
    if isinstance(error, GatedRepoError):
        return f"'{name}' on the Hub is gated: accept its terms there and give a token"
    if isinstance(error, RepositoryNotFoundError):
        return f"'{name}' is neither a path here nor a model on the Hub (a private one needs a token)"
    return f"'{name}' is no path here, and the Hub cannot be reached: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def upload(
    folder: Path,
    repo_id: str,
    message: str,
    *,
    private: bool | None,
    token: str | bool | None,
    create_pr: bool,
) -> str:
    """Put a folder's files into a repository, made when missing; return the commit's address."""
    api = HfApi(token=token)
    try:
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=name, folder_path=folder, commit_message=message, create_pr=create_pr
        )
    except HFValidationError as error:
        raise UserError(f"'{repo_id}' cannot be the name of a repository: {_first_line(error)}") from error
    except TRANSPORT as error:
        raise UserError(f"uploading to '{repo_id}' failed: {_first_line(error)}") from error
    return str(commit.commit_url)


def select_files(files: Iterable[str], name: str, choice: FileChoice = ANY) -> list[str]:
    """Choose what to download of a repository: settings, and the weights of every network once.

    A model in diffusers' layout is taken before a native one, and that before a checkpoint: repositories hold
    the same weights several times. Where ``choice`` leaves it open, safetensors come before pickles and
    variants last.
    """
    listed = sorted(files)
    if "model_index.json" in listed:
        folders = [
            folder
            for folder in (*COMPONENTS, CHECKER)
            if any(each.startswith(f"{folder}/") for each in listed)
        ]
        chosen = [each for folder in folders for each in _folder_files(listed, folder, name, choice)]
        return ["model_index.json", *chosen]
    beside = any(each.startswith(f"{CHECKER}/") for each in listed)
    checker = _folder_files(listed, CHECKER, name, choice) if beside else []
    if all(each in listed for each in NATIVE_FILES):
        choice.narrow([PurePosixPath(each) for each in NATIVE_FILES], f"'{name}' on the Hub")
        return ["config.json", *NATIVE_FILES, *checker]
    return [*_folder_files(listed, "", name, choice), *checker]


def _folder_files(listed: list[str], folder: str, name: str, choice: FileChoice) -> list[str]:
    """Return the settings and the best weights that lie in a folder itself."""
    inside = [PurePosixPath(each) for each in listed if str(PurePosixPath(each).parent) == (folder or ".")]
    settings = [str(path) for path in inside if path.suffix in SMALL]
    weights = [path for path in inside if path.suffix in SUFFIXES and path.name not in STRANGERS]
    if not weights:
        if folder in ("feature_extractor", "scheduler"):
            return settings
        raise UserError(f"'{name}' on the Hub holds no weights{f' in {folder}/' if folder else ''}")
    weights = choice.narrow(weights, f"'{name}' on the Hub{f': {folder}/' if folder else ''}")
    ranks = [(bool(variant_of(path)), is_pickle(path)) for path in weights]
    best = [path for path, rank in zip(weights, ranks, strict=True) if rank == min(ranks)]
    if len(best) > 1 and not all(SHARD.search(path.stem) for path in best):
        found = ", ".join(path.name for path in best)
        raise UserError(f"'{name}' on the Hub holds several models ({found}); download one and give its path")
    return settings + [str(path) for path in best]
