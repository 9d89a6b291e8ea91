"""What do layers that share their input gain from one read of it?

python bench/bench_group.py [options]     what `loraxs bench group [options]` does
"""

import sys

from loraxs_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "group", *sys.argv[1:]]))
