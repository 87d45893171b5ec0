"""Run a small part of Python on a budget, so that a model's answer can be tested without trusting it.

The source is never given to Python's own evaluator: a tree walk knows the node types, functions and methods below and
nothing else. Every node visited uses up fuel, and values that grow too large are refused, so an answer can neither
hang nor fill the memory.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .words import listed

__all__ = ["ProgramError", "run_function"]

_FUEL = 20_000
_LONGEST = 2_000
_LARGEST = 10**40

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
_PLAIN = (abs, all, any, bool, float, int, len, max, min, sum)
_MAKERS = (enumerate, list, range, reversed, set, sorted, str, zip)
_FUNCTIONS: dict[str, Callable[..., Any]] = {function.__name__: function for function in (*_PLAIN, *_MAKERS)}
_METHODS: dict[type, set[str]] = {
    str: set(
        listed(
            "capitalize count endswith find index isalpha isdigit islower isupper join lower replace split startswith "
            "strip title upper"
        )
    ),
    list: set(listed("append count extend index insert pop remove reverse sort")),
    set: {"add"},
}
_VALUES = (bool, int, float, str, list, tuple, set, range, type(None))


class ProgramError(Exception):
    """The program cannot be run: not of the language, out of budget, or it failed."""


class _Return(Exception):
    def __init__(self, value: Any) -> None:
        self.value = value


class _Loop(Exception):
    def __init__(self, ends: bool) -> None:
        self.ends = ends


def run_function(source: str, name: str, arguments: Sequence[Any]) -> Any:
    """What a function of a program returns.

    Args:
        source: the program; only its function definitions play a part.
        name: the function to call.
        arguments: its positional arguments: numbers, strings, lists of them.

    Raises:
        ProgramError: whatever keeps the call from returning a value, told in the message.

    >>> run_function("def f(xs):\\n    return [x * 2 for x in xs if x > 1]", "f", [[1, 2, 3]])
    [4, 6]
    >>> run_function("def f():\\n    return ().__class__", "f", [])
    Traceback (most recent call last):
    benchmarks.quality.tasks.interpreter.ProgramError: Attribute is not allowed here
    """
    try:
        tree = ast.parse(source)
        functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        if name not in functions:
            raise ProgramError(f"there is no function {name}")
        return _Run().call(functions[name], arguments)
    except ProgramError:
        raise
    # Whatever the program does wrong, ends up here: a type that does not fit, a division by zero, a parse error.
    except (SyntaxError, RecursionError, MemoryError, _Loop, Exception) as error:
        raise ProgramError(f"{type(error).__name__}: {error}") from error


class _Run:
    """One call: the fuel that is left, and the names that are bound."""

    def __init__(self) -> None:
        self.fuel = _FUEL

    def call(self, function: ast.FunctionDef, arguments: Sequence[Any]) -> Any:
        names = [argument.arg for argument in function.args.args]
        plain = not (function.args.vararg or function.args.kwarg or function.args.kwonlyargs or function.args.defaults)
        if not plain or len(names) != len(arguments):
            raise ProgramError(f"{function.name} takes other arguments than it is given")
        try:
            self.block(function.body, dict(zip(names, arguments, strict=True)))
        except _Return as returned:
            return returned.value
        return None

    def use(self, amount: int = 1) -> None:
        self.fuel -= amount
        if self.fuel < 0:
            raise ProgramError("the program takes too long")

    def checked(self, value: Any) -> Any:
        """The value, if it is of a known type and not too large."""
        if isinstance(value, int | float) and not abs(value) < _LARGEST:
            raise ProgramError("a number becomes too large")
        if hasattr(value, "__len__") and len(value) > _LONGEST:
            raise ProgramError("a value becomes too long")
        return value

    def items(self, value: Any) -> Iterable[Any]:
        for item in value:
            self.use()
            yield item

    def block(self, body: list[ast.stmt], names: dict[str, Any]) -> None:
        for statement in body:
            self.statement(statement, names)

    def statement(self, node: ast.stmt, names: dict[str, Any]) -> None:
        self.use()
        match node:
            case ast.Return():
                raise _Return(None if node.value is None else self.value(node.value, names))
            case ast.Assign(targets=[target]):
                self.bind(target, self.value(node.value, names), names)
            case ast.AugAssign(target=ast.Name(id=name)):
                names[name] = self.binary(node.op, self.lookup(name, names), self.value(node.value, names))
            case ast.If():
                self.block(node.body if self.value(node.test, names) else node.orelse, names)
            case ast.For(orelse=[]):
                self.loop(node, names)
            case ast.While(orelse=[]):
                while self.value(node.test, names) and not self.ends(node.body, names):
                    self.use()
            case ast.Expr():
                self.value(node.value, names)
            case ast.Break() | ast.Continue():
                raise _Loop(isinstance(node, ast.Break))
            case ast.Pass():
                pass
            case _:
                raise ProgramError(f"{type(node).__name__} is not allowed here")

    def loop(self, node: ast.For, names: dict[str, Any]) -> None:
        for item in self.items(self.value(node.iter, names)):
            self.bind(node.target, item, names)
            if self.ends(node.body, names):
                return

    def ends(self, body: list[ast.stmt], names: dict[str, Any]) -> bool:
        """Run a loop's body once; whether it breaks out of the loop."""
        try:
            self.block(body, names)
        except _Loop as loop:
            return loop.ends
        return False

    def bind(self, target: ast.expr, value: Any, names: dict[str, Any]) -> None:
        match target:
            case ast.Name():
                names[target.id] = value
            case ast.Tuple():
                for part, item in zip(target.elts, list(self.items(value)), strict=True):
                    self.bind(part, item, names)
            case ast.Subscript() if not isinstance(target.slice, ast.Slice):
                self.value(target.value, names)[self.value(target.slice, names)] = value
            case _:
                raise ProgramError(f"{type(target).__name__} cannot be assigned to here")

    def lookup(self, name: str, names: Mapping[str, Any]) -> Any:
        if name in names:
            return names[name]
        raise ProgramError(f"there is no name {name}")

    def binary(self, operation: ast.operator, left: Any, right: Any) -> Any:
        if type(operation) not in _BINARY:
            raise ProgramError(f"{type(operation).__name__} is not allowed here")
        if isinstance(operation, ast.Mod) and isinstance(left, str):
            raise ProgramError("% on a string is not allowed here")
        if isinstance(operation, ast.Pow) and not (abs(left) < 10**6 and abs(right) < 64):
            raise ProgramError("a number becomes too large")
        if isinstance(operation, ast.Mult):
            for values, times in ((left, right), (right, left)):
                if hasattr(values, "__len__") and len(values) * times > _LONGEST:
                    raise ProgramError("a value becomes too long")
        return self.checked(_BINARY[type(operation)](left, right))

    def value(self, node: ast.expr | None, names: dict[str, Any]) -> Any:
        self.use()
        match node:
            case None:
                return None
            case ast.Constant() if isinstance(node.value, _VALUES):
                return self.checked(node.value)
            case ast.Name():
                return self.lookup(node.id, names)
            case ast.BinOp():
                return self.binary(node.op, self.value(node.left, names), self.value(node.right, names))
            case ast.UnaryOp() if type(node.op) in _UNARY:
                return _UNARY[type(node.op)](self.value(node.operand, names))
            case ast.BoolOp():
                return self.logic(node, names)
            case ast.Compare():
                return self.compare(node, names)
            case ast.IfExp():
                return self.value(node.body if self.value(node.test, names) else node.orelse, names)
            case ast.List():
                return self.checked([self.value(part, names) for part in node.elts])
            case ast.Tuple():
                return tuple(self.value(part, names) for part in node.elts)
            case ast.Set():
                return {self.value(part, names) for part in node.elts}
            case ast.Slice():
                return slice(*(self.value(part, names) for part in (node.lower, node.upper, node.step)))
            case ast.Subscript():
                return self.checked(self.value(node.value, names)[self.value(node.slice, names)])
            case ast.ListComp() | ast.GeneratorExp():
                return self.comprehension(node, names)
            case ast.SetComp():
                return set(self.comprehension(node, names))
            case ast.Call():
                return self.checked(self.called(node, names))
            case _:
                raise ProgramError(f"{type(node).__name__} is not allowed here")

    def logic(self, node: ast.BoolOp, names: dict[str, Any]) -> Any:
        value = None
        for part in node.values:
            value = self.value(part, names)
            if bool(value) is isinstance(node.op, ast.Or):
                break
        return value

    def compare(self, node: ast.Compare, names: dict[str, Any]) -> bool:
        left = self.value(node.left, names)
        for operation, part in zip(node.ops, node.comparators, strict=True):
            right = self.value(part, names)
            if not _COMPARE[type(operation)](left, right):
                return False
            left = right
        return True

    def comprehension(self, node: ast.ListComp | ast.GeneratorExp | ast.SetComp, names: dict[str, Any]) -> list[Any]:
        found: list[Any] = []
        inner = dict(names)

        def nest(depth: int) -> None:
            if depth == len(node.generators):
                found.append(self.value(node.elt, inner))
                return
            generator = node.generators[depth]
            for item in self.items(self.value(generator.iter, inner)):
                self.bind(generator.target, item, inner)
                if all(self.value(test, inner) for test in generator.ifs):
                    nest(depth + 1)

        nest(0)
        return found

    def called(self, node: ast.Call, names: dict[str, Any]) -> Any:
        if isinstance(node.func, ast.Attribute):
            owner, method = self.value(node.func.value, names), node.func.attr
            if method not in _METHODS.get(type(owner), ()):
                raise ProgramError(f"{type(owner).__name__}.{method} is not allowed here")
            function = getattr(owner, method)
        elif isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS and node.func.id not in names:
            function = _FUNCTIONS[node.func.id]
        else:
            raise ProgramError(f"{type(node.func).__name__} is not allowed here")
        arguments = [self.value(argument, names) for argument in node.args]
        # A lambda is allowed where it orders things and nowhere else, so no function is ever a value.
        keywords = {str(word.arg): self.keyword(word, names) for word in node.keywords}
        if keywords.keys() - {"key", "reverse", "default", "start"}:
            raise ProgramError(f"{', '.join(keywords)} is not allowed here")
        for argument in arguments:
            if hasattr(argument, "__len__"):
                self.use(len(argument) if len(argument) <= _LONGEST else _FUEL + 1)
        result = function(*arguments, **keywords)
        return list(self.items(result)) if isinstance(result, enumerate | zip | reversed) else result

    def keyword(self, word: ast.keyword, names: dict[str, Any]) -> Any:
        if word.arg != "key":
            return self.value(word.value, names)
        match word.value:
            case ast.Name(id=name) if name in _FUNCTIONS:
                return _FUNCTIONS[name]
            case ast.Lambda(args=ast.arguments(args=[argument]), body=body):
                return lambda item: self.value(body, {**names, argument.arg: item})
        raise ProgramError("this key is not allowed here")
