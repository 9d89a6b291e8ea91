"""Make the committed table of Triton configurations, loraxs_kernels/backends/triton/configs.json.

python bench/tune.py --counted     without a GPU: the tiles of loraxs_kernels/bench/tiles.py, compiled ahead of time
python bench/tune.py [options]     on a GPU: the rows of its kind are measured, and replaced in the committed table
"""

from __future__ import annotations

import argparse
import sys
from datetime import datetime, timezone

import torch
from tqdm import tqdm

from loraxs_kernels import backends
from loraxs_kernels.backends.device import facts
from loraxs_kernels.backends.triton.config import TABLE, WIDEST, padded, read
from loraxs_kernels.bench.compare import release
from loraxs_kernels.bench.request import model_or_shapes
from loraxs_kernels.bench.shapes import MODELS
from loraxs_kernels.tuning import tiles


def main() -> None:
    """Measure, and write after every row, so that a run that is stopped has not been in vain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--counted", action="store_true", help="needs no GPU")
    add("--model", help=f"whose shapes: {', '.join(MODELS)}; default: mistral-7b")
    add("--shape", nargs="+", default=[], metavar="NxK", help="shapes instead of a model's, such as 4096x14336")
    add("--rank", nargs="+", type=int, default=[16, 32, 64, 128], metavar="r", help="default: 16 32 64 128")
    add("--seconds", type=float, default=0.02, help="for each size tried; default 0.02")
    arguments = parser.parse_args()
    if arguments.counted:
        measured = [row for row in read(TABLE) if row.source.startswith("measured")] if TABLE.exists() else []
        tiles.write(tiles.merged(measured, tiles.counted()), TABLE)
        return
    if reason := backends.unavailable("triton") or (None if torch.cuda.is_available() else "there is no GPU"):
        sys.exit(reason)
    _, shapes = model_or_shapes(arguments.model, arguments.shape)
    if not all(1 <= r <= WIDEST["half"] for r in arguments.rank):
        sys.exit(f"rank: got {arguments.rank}, must be from 1 to {WIDEST['half']}")
    device = torch.device("cuda", torch.cuda.current_device())
    source = f"measured on {torch.cuda.get_device_name(device)}, {datetime.now(timezone.utc):%Y-%m-%d}"
    ranks, layouts = sorted({padded(r) for r in arguments.rank}), ("forward", "backward")
    points = [(rank, tokens, layout) for rank in ranks for tokens in tiles.TYPICAL for layout in layouts]
    for rank, tokens, layout in tqdm(points, unit="row"):
        row = tiles.measured(shapes, rank, tokens, layout, device, facts(device), source, arguments.seconds)
        tiles.write(tiles.merged([row], read(TABLE)), TABLE)
        tqdm.write(f"r {rank}, T >= {tokens}, {layout}: {row.tiles}")
        release()


if __name__ == "__main__":
    main()
