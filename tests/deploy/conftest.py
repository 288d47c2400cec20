"""Fixtures for tests of what is exported: exporting takes seconds, so that one campaign is exported for all."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from finished_campaign import TINY, finished, no_failures

from deploy.export import export
from deploy.folder import CampaignFolder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch on one thread: with more, tiny networks take many times longer on shared cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def campaign(tmp_path: Path) -> CampaignFolder:
    """A finished campaign with points at 0.5 and 0.8, of which nothing is exported."""
    return finished(tmp_path / "out", TINY, (0.5, 0.8))


@pytest.fixture(scope="session")
def exported_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[CampaignFolder, list[str]]:
    """A campaign whose point at 0.8 is exported in every format, and the files' names; not to be changed."""
    folder = finished(tmp_path_factory.mktemp("exported") / "out", TINY, (0.5, 0.8))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    paths = export(folder, compression=0.8, warn=no_failures)
    torch.set_num_threads(before)
    return folder, [path.name for path in paths]


@pytest.fixture
def exported(exported_once: tuple[CampaignFolder, list[str]], tmp_path: Path) -> tuple[CampaignFolder, list[Path]]:
    """A copy of such a campaign, its point at 0.8 exported in every format, and the files as `export` returned them."""
    folder, names = exported_once
    copy = CampaignFolder(Path(shutil.copytree(folder.path, tmp_path / "exported")))
    return copy, [copy.export / name for name in names]
