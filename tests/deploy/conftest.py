"""The command in the test's own process; and a campaign that is exported once for all, as that takes seconds."""

import shutil
from pathlib import Path

import pytest
from command import Ended, Zeroout
from finished_campaign import TINY, finished, no_failures

from deploy import cli
from deploy.export import export
from deploy.folder import CampaignFolder


@pytest.fixture
def zeroout(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Zeroout:
    """Run the command in this process; returns how it ended."""

    def run(*words: object) -> Ended:
        monkeypatch.setattr("sys.argv", ["zeroout", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capfd.readouterr()
        return Ended(int(ended.value.code or 0), said.err, said.out)

    return run


@pytest.fixture
def campaign(tmp_path: Path) -> CampaignFolder:
    """A finished campaign with points at 0.5 and 0.8, of which nothing is exported."""
    return finished(tmp_path / "out", TINY, (0.5, 0.8))


@pytest.fixture(scope="session")
def exported_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[CampaignFolder, list[str]]:
    """A campaign whose point at 0.8 is exported in every format, and the files' names; not to be changed."""
    folder = finished(tmp_path_factory.mktemp("exported") / "out", TINY, (0.5, 0.8))
    paths = export(folder, compression=0.8, warn=no_failures)
    return folder, [path.name for path in paths]


@pytest.fixture
def exported(exported_once: tuple[CampaignFolder, list[str]], tmp_path: Path) -> tuple[CampaignFolder, list[Path]]:
    """A copy of such a campaign, its point at 0.8 exported in every format, and the files as `export` returned them."""
    folder, names = exported_once
    copy = CampaignFolder(Path(shutil.copytree(folder.path, tmp_path / "exported")))
    return copy, [copy.export / name for name in names]
