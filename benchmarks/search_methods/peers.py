"""A peer of the search alone, without a campaign: Torch-Pruning's criteria, or a smaller network trained from scratch.

`python -m benchmarks.search_methods.peers torch-pruning|uniform CONFIG.toml --out DIR` makes its network as
`zeroout run` does with `peers` (deploy/peers.py), recovers it, and leaves a result in the form that every campaign has;
called by benchmarks/search.py and benchmarks/tables.py.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.campaigns import ended_as_a_command
from deploy.candidates import candidate_path
from deploy.config import dump, load, resolved
from deploy.folder import CampaignFolder, read_json, write_json
from deploy.frontier import PEERS
from deploy.peers import left_out, make_peers
from deploy.prepare import default_device, preflight, prepare
from deploy.progress import Progress, make_progress
from deploy.recover import Recovery
from env.compact_file import network_from_file
from env.errors import ZerooutError


def run(method: str, config_path: Path, out: Path, progress: Progress) -> None:
    """Make the network, recover it, open the test split once; what is there already is kept."""
    if (out / "result.json").is_file():
        return
    config = load(config_path)
    dataset = preflight(config).to(default_device())
    folder = CampaignFolder.create(out, dump(config), resolved)
    baseline = prepare(folder, config, dataset, progress)
    target = config.episode.targets[-1]
    asked = replace(config, peers=(method,))
    make_peers(folder, asked, dataset, baseline, progress)
    if failed := left_out(folder, asked):
        raise ZerooutError(f"{method}: {failed[0]['reason']}; to try again, delete {folder.path}")
    made, model = candidate_path(folder, method, target), folder.recovered / f"{method}-{target}.safetensors"
    recovery = Recovery(folder, config, dataset, baseline, progress)
    origin = {"group": method, "target": target, **read_json(made.with_suffix(".json"))}
    facts = recovery.recovered(network_from_file(str(made)), model, origin)
    point = {**facts, **recovery.point(model)}
    write_json(folder.result_json, {"baseline": recovery.as_given(), "points": [point], "images": facts["images"]})


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search_methods.peers", description=__doc__)
    parser.add_argument("method", choices=PEERS)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with ended_as_a_command():
        run(given.method, given.config, given.out, make_progress(Console(stderr=True)))


if __name__ == "__main__":
    main()
