"""Make the committed table of Triton configurations, loraxs_kernels/backends/triton/configs.json.

python bench/tune.py --counted     without a GPU: the tiles of loraxs_kernels/bench/tune.py, compiled ahead of time
python bench/tune.py [options]     on a GPU: what `loraxs tune [options]` does, rows replaced in the committed table
"""

import sys

from loraxs_kernels.backends.triton.config import TABLE, read
from loraxs_kernels.bench import tune
from loraxs_kernels.cli import main

if __name__ == "__main__":
    if sys.argv[1:] == ["--counted"]:
        measured = [row for row in read(TABLE) if row.source.startswith("measured")] if TABLE.exists() else []
        tune.write(tune.merged(measured, tune.counted()), TABLE)
        sys.exit(0)
    sys.exit(main(["tune", "--out", str(TABLE), *sys.argv[1:]]))
