"""placeholder"""


def missing():
    return "not built"


def architectures():
    return ("90a",)


def load():
    raise ImportError
