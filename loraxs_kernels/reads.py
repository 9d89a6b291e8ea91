"""Layers that take no adapter because of the code around them: it reads their weight without calling them, so that an
adapter there has no effect, or asks whether they are an nn.Linear, which a layer with an adapter is not.

Told from the source of the methods: `F.linear(x, self.qkv.weight)` reads the weight of `self.qkv`, and so does

    head = self.get_output_embeddings()
    weight = head.weight
    return fused_loss(x, weight)

What only asks for the dtype, the device or the shape of a weight reads nothing, nor does what initialises, ties or
loads weights.  A read below an `if` that the module's settings rule out is none.  Code without source is not known.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import operator
import re
import textwrap
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

# From a module to one inside it; "[]" is any of its children, "name()" what a method returns, "(...)" at the end any of
# several modules in a tuple or list.
Path = tuple[str, ...]
Names = dict[str, list[Path]]  # a function's names for parts of its module

READS, ASKS = "which reads its weight without calling it", "which asks whether it is an nn.Linear"
_EFFECTS = {READS: "an adapter there has no effect", ASKS: "with an adapter it would not be one"}
MOST_PATHS = 9  # for one name of a function, which a loop might give more and more


@dataclass(frozen=True)
class Read:
    """One place where a function of a module does something with a layer, and the conditions on the way there.

    what: READS or ASKS.
    """

    layer: Path
    what: str
    conditions: tuple[tuple[ast.expr, bool], ...]
    settings: Names  # the names that have one value only


def read_or_asked(model: nn.Module) -> dict[int, str]:
    """{id of a module: whose code reads its weight, or asks for its type, and what of that, as the end of a sentence},
    for every part of a model."""
    found: dict[int, str] = {}
    functions = {kind: _functions(kind) for kind in {type(m) for m in model.modules()}}
    for module in model.modules():
        own = _unwrapped(vars(module).get("forward"))  # one that replaces that of the class
        replaced = [(f.__globals__.get("__name__", "a function"), f) for each in own for f in (each, *_helpers(each))]
        for where, function in (*replaced, *functions[type(module)]):
            for read in _reads(function.__code__):
                if all(_value(test, module, read.settings) in (wanted, None) for test, wanted in read.conditions):
                    why = f"of a {type(module).__name__}, {read.what} (in {where}): {_EFFECTS[read.what]}"
                    found |= {id(layer): why for layer in _at(module, read.layer) if id(layer) not in found}
    for module in model.modules():  # who reads the `weight` of a wrapper reads that of the layer in it
        if READS in found.get(id(module), "") and isinstance(getattr(type(module), "weight", None), property):
            found |= {id(layer): found[id(module)] for layer in module.children() if id(layer) not in found}
    return found


def held_beside(model: nn.Module) -> dict[int, str]:
    """{id of a module: which other one holds it, in an attribute that is no child, as the end of a sentence}.

    Code that calls what is in a plain list, say, would go on calling the layer itself.
    """
    return {
        id(held): f"of a {type(module).__name__}, which also holds it in its attribute {name!r}: "
        "an adapter would be missing there"
        for module in model.modules()
        for name, value in vars(module).items()
        for held in (() if name in _OF_TORCH else _modules_in(value))
        if held is not module
    }


# The children, and what torch.compile of a layer by itself keeps of the layer, which `attach` refuses with advice.
_OF_TORCH = ("_modules", "_torchdynamo_orig_callable")


def _modules_in(value: Any, depth: int = 4) -> Iterator[nn.Module]:
    """The modules in the values, lists and dicts that an attribute is made of, and those whose methods it has."""
    kind = type(value)  # as isinstance would ask proxies for what they stand for, which may be gone
    if issubclass(kind, nn.Module):
        yield value
    elif issubclass(kind, MethodType):
        yield from _modules_in(value.__self__, depth)
    elif depth and issubclass(kind, functools.partial):
        yield from _modules_in([value.func, *value.args, *value.keywords.values()], depth - 1)
    elif depth and issubclass(kind, (list, tuple, set, dict)):
        for each in value.values() if issubclass(kind, dict) else value:
            if type(each) not in _PLAIN:  # a vocabulary may have a million
                yield from _modules_in(each, depth - 1)


_PLAIN = (str, int, float)


def _functions(kind: type) -> list[tuple[str, FunctionType]]:
    """The functions of a class that run when its modules do and have a weight, or the class Linear, in them.

    None for a wrapper around a layer that only has the layer's weight as a property of its own.
    """
    functions = [*_all_functions(kind)]
    return [] if [where.rpartition(".")[2] for where, _ in functions] == ["weight"] else functions


def _all_functions(kind: type) -> Iterator[tuple[str, FunctionType]]:
    seen: set[str] = set()
    for owner in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, value in vars(owner).items():
            where = f"{owner.__qualname__}.{name}"
            if name in seen or NOT_WHILE_IT_RUNS.match(name) or f"{owner.__module__}.{where}" in _CALLED:
                continue
            functions = _unwrapped(value)
            if not any("super" in f.__code__.co_names for f in functions):
                seen.add(name)
            for function in functions:
                yield from ((where, f) for f in (function, *_helpers(function)) if _mentions(f.__code__))


# Methods that make, tie, load, convert or freeze weights, collect them for an optimizer, or scale them after its step
# (x-transformers' qk_clip_).
NOT_WHILE_IT_RUNS = re.compile(
    r".*(init|param(eter)?_groups)"
    r"|_*(tie|set|reset|resize|load|save|convert|reparam|fuse|freeze|unfreeze|(get_)?optim|configure_optim|qk_clip)"
)

# Methods in which only arguments that models do not pass, or a fast path that fast_path.py closes, lead to a read.
_CALLED = {
    "torch.nn.modules.transformer.TransformerEncoder.forward",
    "torch.nn.modules.transformer.TransformerEncoderLayer.forward",
    "transformers.models.deberta.modeling_deberta.DisentangledSelfAttention.forward",
}


def _unwrapped(value: Any) -> list[FunctionType]:
    """The functions of a method, a property or a partial, with those that decorators have wrapped."""
    found: list[FunctionType] = []
    while value is not None and value not in found:
        if isinstance(value, FunctionType):
            found.append(value)
            value = vars(value).get("__wrapped__")
        else:
            inside = next((name for kind, name in _INSIDE.items() if isinstance(value, kind)), None)
            value = inside and getattr(value, inside)
    return found


_INSIDE = {property: "fget", functools.cached_property: "func", functools.partial: "func", MethodType: "__func__"}


def _helpers(function: FunctionType) -> Iterator[FunctionType]:
    """Functions that a method may call and that take the module as `self`, as Liger's losses do."""
    for name in function.__code__.co_names:
        helper = function.__globals__.get(name)
        if isinstance(helper, FunctionType) and helper.__code__.co_varnames[:1] == ("self",):
            yield helper


def _mentions(code: CodeType) -> bool:
    inside = (c for c in code.co_consts if isinstance(c, CodeType))
    return not {"weight", "Linear"}.isdisjoint(code.co_names) or any(map(_mentions, inside))


@functools.cache
def _reads(code: CodeType) -> tuple[Read, ...]:
    if not _mentions(code):
        return ()
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    # There is no source, it is part of a line, or its file has been edited since.
    except (OSError, TypeError, SyntaxError, ValueError, tokenize.TokenError):
        return ()
    function = tree.body[0]
    return tuple(reads_of(function)) if isinstance(function, ast.FunctionDef) else ()


def reads_of(function: ast.FunctionDef) -> Iterator[Read]:
    """The reads in the source of one function, whose first argument is the module."""
    arguments = [*function.args.posonlyargs, *function.args.args]
    if not arguments:
        return
    known: Names = {arguments[0].arg: [()]}
    weights: Names = {}  # names of weights
    nodes = [*ast.walk(function)]
    stored = Counter(node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
    for target, value in 3 * [binding for node in nodes for binding in _bindings(node)]:
        for path in [*_paths(value, known)]:  # again, as nested blocks come after what may follow them
            of_weight = path[-1:] == ("weight",)
            paths = (weights if of_weight else known).setdefault(target, [])
            if len(paths) < MOST_PATHS and (layer := path[:-1] if of_weight else path) not in paths:
                paths.append(layer)
    settings = {name: paths for name, paths in known.items() if stored[name] < 2}
    for layer, what, conditions in _visit(function, (), False, known, weights):
        yield Read(layer, what, conditions, settings)


def _bindings(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """The names and values of `name = value`, `(name := value)` and `for name in value`, whose value it is one of."""
    pairs: list[tuple[ast.expr, ast.expr]] = []
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        pairs = [(node.targets[0], node.value)]
    elif isinstance(node, ast.NamedExpr):
        pairs = [(node.target, node.value)]
    elif isinstance(node, (ast.For, ast.comprehension)):
        iterated = [node.iter]
        if isinstance(node.iter, ast.Call) and (arguments := node.iter.args):  # of enumerate, reversed, zip
            iterated = arguments if getattr(node.iter.func, "id", "") == "zip" else arguments[:1]
        targets = node.target.elts[-len(iterated) :] if isinstance(node.target, ast.Tuple) else [node.target]
        pairs = [
            (to, ast.Subscript(of, ast.Constant(0), ast.Load())) for to, of in zip(targets, iterated, strict=False)
        ]
    yield from ((target.id, value) for target, value in pairs if isinstance(target, ast.Name))


def _paths(node: ast.AST | None, known: Names) -> list[Path]:
    """Where an expression may point to, from the module that is `self`."""
    if isinstance(node, ast.Name):
        return known.get(node.id, [])
    if isinstance(node, ast.Attribute):
        return [(*owner, node.attr) for owner in _paths(node.value, known)]
    if isinstance(node, (ast.Tuple, ast.List)):
        return [(*path, "(...)") for each in node.elts for path in _paths(each, known)]
    if isinstance(node, ast.Subscript):
        owners = _paths(node.value, known)
        if isinstance(node.slice, ast.Slice):
            return owners
        return [owner[:-1] if owner[-1:] == ("(...)",) else (*owner, "[]") for owner in owners]
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr" and len(node.args) > 1:
        name = node.args[1].value if isinstance(node.args[1], ast.Constant) else "[]"  # made at run time: any child's
        return [(*owner, name) for owner in _paths(node.args[0], known) if name != "weight"]
    if isinstance(node, ast.Call) and not (node.args or node.keywords):
        called = _paths(node.func, known)
        children = [path[:-1] for path in called if path[-1:] in (("children",), ("values",), ("items",))]
        made = [(*path[:-1], f"{path[-1]}()") for path in called if path[-1:] == ("get_output_embeddings",)]
        return children + made
    return []


def _visit(
    node: ast.AST, conditions: tuple[tuple[ast.expr, bool], ...], harmless: bool, known: Names, weights: Names
) -> Iterator[tuple[Path, str, tuple[tuple[ast.expr, bool], ...]]]:
    """The layers read or asked for in and below a node, and what is done with them; `harmless`: what stands here is
    only asked for what it is like."""
    if isinstance(node, (ast.Attribute, ast.Name)) and isinstance(node.ctx, ast.Load) and not harmless:
        layers = weights.get(node.id, []) if isinstance(node, ast.Name) else []
        layers = layers or [path[:-1] for path in _paths(node, known) if path[-1:] == ("weight",)]
        yield from ((layer, READS, conditions) for layer in layers if layer)
    yield from ((layer, ASKS, conditions) for layer in _paths(_asked_for_its_type(node), known) if layer)
    if isinstance(node, (ast.If, ast.IfExp)):
        yield from _visit(node.test, conditions, False, known, weights)
        for wanted, part in ((True, node.body), (False, node.orelse)):
            for child in part if isinstance(part, list) else [part]:
                yield from _visit(child, (*conditions, (node.test, wanted)), False, known, weights)
        return
    bound = [value for name, value in _bindings(node) if name in weights and _paths(value, known)]
    same = harmless and isinstance(node, ast.Attribute) and node.attr in ("data", "T", "mT", "detach", "float")
    for child in ast.iter_child_nodes(node):
        called = harmless and isinstance(node, ast.Call) and child is node.func
        asked = same or called or child in bound or _only_asks(node, child)
        yield from _visit(child, conditions, asked, known, weights)


def _asked_for_its_type(node: ast.AST) -> ast.expr | None:
    """What an expression compares with the class Linear, as isinstance(it, Linear) and type(it) is Linear do."""
    asked = kinds = None
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance" and len(node.args) == 2:
        asked, kinds = node.args
    elif (
        isinstance(node, ast.Compare)
        and isinstance(node.left, ast.Call)
        and getattr(node.left.func, "id", "") == "type"
        and node.left.args
    ):
        (asked, *_), (kinds, *_) = node.left.args, node.comparators
    named = {getattr(each, "attr", getattr(each, "id", "")) for each in (ast.walk(kinds) if kinds else ())}
    return asked if "Linear" in named and "LoraXSLinear" not in named else None


def _only_asks(node: ast.AST, child: ast.AST) -> bool:
    """Whether an expression asks what a tensor, which it has as a child, is like, and does not compute with it."""
    if isinstance(node, ast.Attribute):
        return node.attr in _LIKE
    if isinstance(node, ast.Assign):  # ties one weight to another
        return all(isinstance(each, ast.Attribute) and each.attr == "weight" for each in node.targets)
    if isinstance(node, ast.Compare):
        return all(isinstance(each, (ast.Is, ast.IsNot)) for each in node.ops)
    if isinstance(node, ast.Call) and child is not node.func:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        return name in _ASKING or name.endswith("_like")
    return False


# Attributes of a tensor, and functions and methods of a tensor as an argument, that do not compute with its values, or
# only measure them, as for a log.
_LIKE = {
    *("dtype", "device", "shape", "ndim", "size", "dim", "numel", "nelement", "element_size", "itemsize", "nbytes"),
    *("stride", "layout", "requires_grad", "requires_grad_", "is_meta", "is_cuda", "is_leaf", "is_contiguous"),
    *("is_floating_point", "is_complex", "is_sparse", "get_device", "device_mesh", "new_zeros", "new_ones"),
    *("new_empty", "new_full", "new_tensor", "grad", "grad_fn", "data_ptr", "untyped_storage", "quant_state"),
    *("norm", "std", "var", "isnan", "isfinite"),
}
_ASKING = {
    *("isinstance", "hasattr", "callable", "id", "type", "len", "print", "to", "type_as", "is_tensor"),
    *("norm", "vector_norm", "matrix_norm", "isnan", "isfinite"),
}

_COMPARED = {
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Eq: operator.eq,
    ast.NotEq: operator.ne, ast.Is: operator.is_, ast.IsNot: operator.is_not,
}  # fmt: skip


def _value(test: ast.expr, module: nn.Module, known: Names) -> bool | None:
    """Whether a condition holds, from the settings of a module; None: it depends on more."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        value = _value(test.operand, module, known)
        return None if value is None else not value
    if isinstance(test, ast.BoolOp):
        values, decides = [_value(each, module, known) for each in test.values], isinstance(test.op, ast.Or)
        return decides if decides in values else None if None in values else not decides
    if isinstance(test, ast.Compare) and len(test.ops) == 1 and type(test.ops[0]) in _COMPARED:
        left, right = (_setting(each, module, known) for each in (test.left, test.comparators[0]))
        try:
            return None if _UNKNOWN in (left, right) else bool(_COMPARED[type(test.ops[0])](left, right))
        except TypeError:
            return None
    value = _setting(test, module, known)
    return None if value is _UNKNOWN else bool(value)


_UNKNOWN = object()


def _setting(node: ast.expr, module: nn.Module, known: Names) -> Any:
    """A constant, or a number, a word, a bool or None that a module or its configuration has."""
    if isinstance(node, ast.Constant):
        return node.value
    paths = _paths(node, known)
    if len(paths) != 1 or not (path := paths[0]) or path == ("training",) or _changes(type(module), path[0]):
        return _UNKNOWN
    value: Any = module
    for name in path:
        if isinstance(value, nn.Module):
            value = vars(value).get(name, value._modules.get(name, _UNKNOWN))
        else:
            value = getattr(value, name, _UNKNOWN) if hasattr(value, "to_dict") else _UNKNOWN  # a configuration
    return value if value is None or isinstance(value, (bool, int, float, str)) else _UNKNOWN


@functools.cache
def _changes(kind: type, name: str) -> bool:
    """Whether a method of a class, other than __init__, sets this attribute."""
    methods = (f for owner in kind.__mro__ for n, v in vars(owner).items() if n != "__init__" for f in _unwrapped(v))
    stores = (each for f in methods if name in f.__code__.co_names for each in dis.get_instructions(f))
    return any(each.opname == "STORE_ATTR" and each.argval == name for each in stores)


def _at(module: nn.Module, path: Path) -> list[nn.Module]:
    """The modules that a path leads to."""
    found = [module]
    for name in path:
        if name == "[]":
            found = [child for m in found for child in m._modules.values() if child is not None]
        elif name.endswith("()"):
            made = [getattr(m, name[:-2], None) for m in found]
            found = [m for m in (make() for make in made if callable(make)) if isinstance(m, nn.Module)]
        else:
            children = [m._modules.get(name, vars(m).get(name)) for m in found]
            found = [m for m in children if isinstance(m, nn.Module)]
    return found
