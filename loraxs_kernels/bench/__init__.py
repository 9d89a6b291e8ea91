"""`loraxs bench` and `roofline`: what LoRA-XS costs, measured side by side, and what it must cost at least.

A question is a file, which has its grid, its paths, its rows, its table and its plot, and ends with its QUESTION:

    layer.py chain.py gemm.py group.py host.py choice.py svd.py model.py bank.py
    experiments.py    one that is answered: it shows the rows that reports have of it

What they share, each file above those that it uses:

    command.py        the commands `loraxs bench` and `loraxs roofline`
    page.py           a report as one HTML page
    report.py         the JSON of a run: its fields, writing it safely, reading it
    questions.py      all questions; the tables and plots of a report
    question.py       what a question is, and the check of what it is asked
    tables.py plots.py tax.py      what people read; the adapter tax over a block
    paths.py          the ways to compute one layer, and the check that each is right
    compare.py        the loop: build, check, make ready, time in turn, write a row
    timer.py          timing several calls in turn; the machine's ceilings
    request.py        the options of a run
    roofline.py shapes.py          floors from counted bytes and flops; the linear layers of real models

Nothing here is imported by `import loraxs_kernels`.
"""


class BenchError(RuntimeError):
    """The benchmark cannot run as asked; the message says what to do about it."""
