"""A pickle reader that can build plain data and nothing else.

Pickle is a little language whose programs may call any function. This machine runs the part of it that
describes data; the few functions that a checkpoint needs are imitated by constructors handed in by name,
and every other name is refused. No object of the file is ever called, imported or looked up.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from arm_core.files.errors import BadFileError

MAX_OPERATIONS = 5_000_000
"""A checkpoint of the largest official model takes about 200,000."""


class Readable(Protocol):
    """What a pickle is read from."""

    def read(self, size: int, /) -> bytes: ...

    def readline(self) -> bytes: ...


class Attributes(dict[str, Any]):
    """The attributes of an object whose class is not known here (`argparse.Namespace`)."""


@dataclass(frozen=True)
class Function:
    """A name that the file may call, and what is done instead."""

    name: str
    call: Callable[..., Any]


@dataclass(frozen=True)
class Name:
    """A name that the file may mention but not call, such as a storage type."""

    name: str
    value: object


_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_KEYS = (str, int, float, bool, bytes, type(None))


def brief(value: object) -> str:
    """A value of a file in a few words, at little cost however it is nested (it may contain itself)."""
    if isinstance(value, (str, bytes)):
        return repr(value[:60])
    if isinstance(value, int) and abs(value) >= 2**64:
        return "a huge number"  # writing it out takes quadratic time
    if isinstance(value, (int, float, bool, type(None))):
        return repr(value)
    if isinstance(value, (Function, Name)):
        return value.name
    size = f" of {len(value)}" if isinstance(value, (dict, list, tuple)) else ""
    return f"a {type(value).__name__}{size}"


class _RefusedError(Exception):
    pass


def read_pickle(
    file: Readable,
    source: str,
    known: Mapping[str, Function | Name],
    persistent: Callable[[object], Any],
) -> Any:
    """Run one pickle from the file's position, leaving the file behind its end.

    source: what errors call it.  known: what may be named, by `module.name`.  persistent: what a
    persistent id stands for.  Raises BadFileError for anything else, naming it.
    """
    try:
        return _run(file, known, persistent)
    except _RefusedError as error:
        raise BadFileError(f"{source}: {error}") from None
    except BadFileError:
        raise
    except (ValueError, TypeError, IndexError, KeyError, struct.error, OverflowError) as error:
        # Constructors and pickletools meet whatever the file holds; nothing of it has been run.
        raise BadFileError(f"{source}: damaged pickle: {str(error)[:160] or type(error).__name__}") from None


def _run(file: Readable, known: Mapping[str, Function | Name], persistent: Callable[[object], Any]) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        for i in range(len(stack) - 1, -1, -1):
            if stack[i] is _MARK:
                items = stack[i + 1 :]
                del stack[i:]
                return items
        raise _RefusedError("damaged pickle: no mark on the stack")

    def look_up(module: object, name: object) -> Function | Name:
        found = known.get(f"{module}.{name}") if isinstance(module, str) and isinstance(name, str) else None
        if found is None:
            raise _RefusedError(
                f"the file asks for {_dotted(module, name)}, which no checkpoint needs: "
                "refused, and nothing was run"
            )
        return found

    argument: Any
    for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):  # type: ignore[arg-type]
        if number > MAX_OPERATIONS:
            raise _RefusedError(f"more than {MAX_OPERATIONS} operations")
        operation = opcode.name
        if operation in _VALUES:
            if isinstance(argument, str):
                argument.encode()  # half a surrogate pair could not be written again: UnicodeError
            stack.append(argument)
        elif operation in _CONSTANTS:
            stack.append(_CONSTANTS[operation])
        elif operation in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[argument] = _top(stack)
        elif operation == "MEMOIZE":
            memo[len(memo)] = _top(stack)
        elif operation in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[argument])
        elif operation == "MARK":
            stack.append(_MARK)
        elif operation == "TUPLE":
            stack.append(tuple(since_mark()))
        elif operation in _TUPLES:
            items = [_pop(stack) for _ in range(_TUPLES[operation])]
            stack.append(tuple(reversed(items)))
        elif operation in ("EMPTY_LIST", "LIST"):
            stack.append([] if operation == "EMPTY_LIST" else since_mark())
        elif operation in ("APPEND", "APPENDS"):
            items = [_pop(stack)] if operation == "APPEND" else since_mark()
            _top(stack, list).extend(items)
        elif operation in ("EMPTY_DICT", "DICT"):
            stack.append({} if operation == "EMPTY_DICT" else _pairs(since_mark()))
        elif operation in ("SETITEM", "SETITEMS"):
            items = [_pop(stack), _pop(stack)][::-1] if operation == "SETITEM" else since_mark()
            target = _top(stack, dict)
            for key, value in _pairs(items).items():
                if key in target:
                    raise _RefusedError(f"{brief(key)} stands twice")
                target[key] = value
        elif operation == "GLOBAL":
            module, _, name = argument.partition(" ")
            stack.append(look_up(module, name))
        elif operation == "STACK_GLOBAL":
            name, module = _pop(stack), _pop(stack)
            stack.append(look_up(module, name))
        elif operation in ("REDUCE", "NEWOBJ"):
            arguments, function = _pop(stack), _pop(stack)
            if not isinstance(function, Function) or not isinstance(arguments, tuple):
                raise _RefusedError(f"the file calls {brief(function)}: refused, and nothing was run")
            stack.append(function.call(*arguments))
        elif operation == "BUILD":
            _build(_pop(stack), _top(stack))
        elif operation == "BINPERSID":
            stack.append(persistent(_pop(stack)))
        elif operation == "POP":
            _pop(stack)
        elif operation == "STOP":
            result = _pop(stack)
            if stack:
                raise _RefusedError("damaged pickle: values left on the stack")
            return result
        elif operation not in ("PROTO", "FRAME"):
            raise _RefusedError(f"the pickle operation {operation} belongs to no checkpoint: refused")
    raise _RefusedError("damaged pickle: it has no end")


def _dotted(module: object, name: object) -> str:
    parts = [part[:60] if isinstance(part, str) else brief(part) for part in (module, name)]
    return ".".join(parts)


def _pop(stack: list[Any]) -> Any:
    if not stack or stack[-1] is _MARK:
        raise _RefusedError("damaged pickle: the stack is empty")
    return stack.pop()


def _top(stack: list[Any], kind: type[Any] = object) -> Any:
    if not stack or stack[-1] is _MARK or not isinstance(stack[-1], kind):
        raise _RefusedError(f"damaged pickle: expected a {kind.__name__} on the stack")
    return stack[-1]


def _pairs(items: list[Any]) -> dict[Any, Any]:
    if len(items) % 2:
        raise _RefusedError("damaged pickle: a key without a value")
    pairs: dict[Any, Any] = {}
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, _KEYS):  # hashing nested tuples can take forever
            raise _RefusedError(f"expected plain keys, found a {type(key).__name__}")
        if key in pairs:
            raise _RefusedError(f"{brief(key)} stands twice")
        pairs[key] = value
    return pairs


def _build(state: object, target: object) -> None:
    """Set attributes: those of an unknown object are kept, a state dict's `_metadata` is not needed."""
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise _RefusedError(f"expected attributes, found a {type(state).__name__}")
    if isinstance(target, Attributes):
        target.update(state)
    elif not isinstance(target, dict) or set(state) != {"_metadata"}:
        raise _RefusedError(f"the file sets {', '.join(state)[:80]} on a {type(target).__name__}: refused")
