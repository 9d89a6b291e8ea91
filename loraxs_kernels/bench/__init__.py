"""`loraxs bench`, `roofline` and `tune`: what LoRA-XS costs, measured side by side, and what it must cost at least.

    command.py    the two commands: arguments, checks, the run, what is printed
    shapes.py     the linear layers of real models
    paths.py      the ways to compute one layer, and the check that each is right
    layer.py chain.py gemm.py group.py host.py choice.py model.py svd.py bank.py   the questions: what yields rows
    experiments.py                     what decides the design of the kernels, beside what was predicted of it
    timer.py      timing several calls in turn; the machine's ceilings
    roofline.py   floors from counted bytes and flops
    tax.py        the adapter tax over a block, from a report's rows
    report.py     the JSON of a run: its fields, writing it safely, reading it
    tables.py plots.py page.py         what people read: text and Markdown, figures, one HTML page
    tune.py       `loraxs tune` and `lx.tune`: the fastest backend for each kind of call, on the user's own GPU
    tiles.py      the fastest tiles of the Triton kernels

Nothing here is imported by `import loraxs_kernels`.
"""


class BenchError(RuntimeError):
    """The benchmark cannot run as asked; the message says what to do about it."""
