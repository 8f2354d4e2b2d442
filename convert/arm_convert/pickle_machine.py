"""A restricted pickle reader that builds plain data only.

A pickle is a program that may call any function. This reader executes the operations that describe data.
The few functions that a checkpoint needs are replaced by constructors that the caller passes in by name,
and every other name is refused. No object that the file names is called, imported or looked up.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from arm_core.files.errors import BadFileError

MAX_OPERATIONS = 1_000_000
"""Operations and copied items that a pickle may take; the largest official checkpoint takes about 200,000."""


class Readable(Protocol):
    """A source of bytes to read a pickle from."""

    def read(self, size: int, /) -> bytes: ...

    def readline(self) -> bytes: ...


class Attributes(dict[str, Any]):
    """The attributes of an `argparse.Namespace`, as plain data."""


@dataclass(frozen=True)
class Function:
    """A name that the file may call, and the function that is called instead."""

    name: str
    call: Callable[..., Any]


@dataclass(frozen=True)
class Name:
    """A name that the file may reference but not call, such as a storage type."""

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
    """A short description of a value from a file; cheap for any nesting (a value may contain itself)."""
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
    """Read one pickle from the file's position; the file is left at its end.

    source: name of the file in errors.  known: the names that are allowed, as `module.name`.
    persistent: returns the object of a persistent id.  Raises BadFileError for anything else, naming it.
    """
    try:
        return _run(file, known, persistent)
    except _RefusedError as error:
        raise BadFileError(f"{source}: {error}") from None
    except BadFileError:
        raise
    except (ValueError, TypeError, IndexError, KeyError, struct.error, OverflowError) as error:
        # Constructors and pickletools raise these for invalid arguments.
        raise BadFileError(f"{source}: corrupt pickle: {str(error)[:160] or type(error).__name__}") from None


def _run(file: Readable, known: Mapping[str, Function | Name], persistent: Callable[[object], Any]) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        for i in range(len(stack) - 1, -1, -1):
            if stack[i] is _MARK:
                items = stack[i + 1 :]
                del stack[i:]
                return items
        raise _RefusedError("corrupt pickle: no mark on the stack")

    def look_up(module: object, name: object) -> Function | Name:
        found = known.get(f"{module}.{name}") if isinstance(module, str) and isinstance(name, str) else None
        if found is None:
            raise _RefusedError(
                f"the file references {_dotted(module, name)}, which no checkpoint needs: "
                "refused, and nothing was executed"
            )
        return found

    argument: Any
    spent = 0
    for opcode, argument, _ in pickletools.genops(file):  # type: ignore[arg-type]
        spent += 1
        if spent > MAX_OPERATIONS:
            raise _RefusedError(f"takes more than {MAX_OPERATIONS:,} operations")
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
                    raise _RefusedError(f"{brief(key)} appears twice")
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
                raise _RefusedError(f"the file calls {brief(function)}: refused, and nothing was executed")
            stack.append(function.call(*arguments))
        elif operation == "BUILD":
            # A memoized dictionary can be copied again and again: each copied item counts.
            spent += _build(_pop(stack), _top(stack), MAX_OPERATIONS - spent)
        elif operation == "BINPERSID":
            stack.append(persistent(_pop(stack)))
        elif operation == "POP":
            _pop(stack)
        elif operation == "STOP":
            result = _pop(stack)
            if stack:
                raise _RefusedError("corrupt pickle: values left on the stack")
            return result
        elif operation not in ("PROTO", "FRAME"):
            raise _RefusedError(f"the pickle operation {operation} is not used in checkpoints: refused")
    raise _RefusedError("corrupt pickle: it has no end")


def _dotted(module: object, name: object) -> str:
    parts = [part[:60] if isinstance(part, str) else brief(part) for part in (module, name)]
    return ".".join(parts)


def _pop(stack: list[Any]) -> Any:
    if not stack or stack[-1] is _MARK:
        raise _RefusedError("corrupt pickle: the stack is empty")
    return stack.pop()


def _top(stack: list[Any], kind: type[Any] = object) -> Any:
    if not stack or stack[-1] is _MARK or not isinstance(stack[-1], kind):
        raise _RefusedError(f"corrupt pickle: expected a {kind.__name__} on the stack")
    return stack[-1]


def _pairs(items: list[Any]) -> dict[Any, Any]:
    if len(items) % 2:
        raise _RefusedError("corrupt pickle: a key without a value")
    pairs: dict[Any, Any] = {}
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, _KEYS):  # hashing nested tuples can take forever
            raise _RefusedError(f"expected plain keys, found a {type(key).__name__}")
        if key in pairs:
            raise _RefusedError(f"{brief(key)} appears twice")
        pairs[key] = value
    return pairs


def _build(state: object, target: object, budget: int) -> int:
    """Set at most `budget` attributes and return their number; a state dict's `_metadata` is not needed."""
    if not isinstance(state, dict):
        raise _RefusedError(f"expected attributes, found a {type(state).__name__}")
    if len(state) > budget:
        raise _RefusedError(f"takes more than {MAX_OPERATIONS:,} operations")
    if not all(isinstance(key, str) for key in state):
        raise _RefusedError("expected names of attributes")
    if isinstance(target, Attributes):
        target.update(state)
    elif not isinstance(target, dict) or set(state) != {"_metadata"}:
        names = ", ".join(key[:80] for key in list(state)[:3])
        raise _RefusedError(f"the file sets {names} on a {type(target).__name__}: refused")
    return len(state)
