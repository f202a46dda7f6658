"""Cutting functions out of a module's text and putting others in: what the exercises do to source code, and nothing else.

Owns the way from a text to another text. Never opens a file and runs nothing. Functions are found with `ast`, by dotted name,
and replaced as lines, so that everything around them, comments and spaces too, stays as somebody wrote it.

    def touch(self, block_ids):                          def touch(self, block_ids):
        \"\"\"Add one reference to each block.\"\"\"              \"\"\"Add one reference to each block.\"\"\"
        for block_id in block_ids:              ->           raise NotImplementedError("your turn: BlockPool.touch, about 4 lines")
            ...
"""

from __future__ import annotations

import ast
import hashlib
import io
import tokenize
from collections.abc import Iterable

Function = ast.FunctionDef | ast.AsyncFunctionDef
YOUR_TURN = "your turn: "
NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


class SourceError(Exception):
    """A text that cannot be worked on: it is no Python, or a function is not in it."""


def parse(source: str, where: str) -> ast.Module:
    """The tree of a text; `SourceError` names the file and the line that is no Python."""
    try:
        return ast.parse(source)
    except SyntaxError as error:
        raise SourceError(f"{where}, line {error.lineno}: {error.msg}") from None
    except ValueError as error:  # a null byte
        raise SourceError(f"{where}: {error}") from None


def find(source: str, name: str, where: str) -> Function:
    """The function `name` of a module: "rope", or "BlockPool.touch" for a method. Of two with one name Python runs the last."""
    scope: list[ast.stmt] = parse(source, where).body
    *owners, last = name.split(".")
    for owner in owners:
        classes = [node for node in scope if isinstance(node, ast.ClassDef) and node.name == owner]
        scope = classes[-1].body if classes else []
    functions = [node for node in scope if isinstance(node, Function) and node.name == last]
    if not functions:
        raise SourceError(f"{where} has no {name}")
    return functions[-1]


def body_of(node: Function) -> list[ast.stmt]:
    """The statements of a function behind its docstring."""
    return node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body


def lines_of(source: str, node: Function) -> list[str]:
    """A function's own lines, decorators first. Split as `ast` counts: at line feeds alone."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return source.split("\n")[first - 1:node.end_lineno]


def code_of(node: Function) -> str:
    """What a function does, as text that neither comments, spaces nor its docstring change."""
    return "\n".join(ast.unparse(statement) for statement in body_of(node))


def is_blank(node: Function) -> bool:
    """Whether its last line still says whose turn it is; somebody's first lines may stand before it."""
    return bool(body_of(node)) and f"raise NotImplementedError('{YOUR_TURN}" in ast.unparse(body_of(node)[-1])


def is_untouched(node: Function) -> bool:
    """Whether it is as `blank` left it."""
    return is_blank(node) and len(body_of(node)) == 1


def forgets_return(node: Function) -> bool:
    """Whether its signature promises a value, and it can end without a `return`: whoever called it has None then."""
    promised = ast.unparse(node.returns) if node.returns else "None"
    if promised == "None" or is_blank(node) or any(isinstance(part, ast.Yield | ast.YieldFrom) for part in ast.walk(node)):
        return False
    gives = any(isinstance(part, ast.Return) and part.value is not None for part in ast.walk(node))
    return goes_on(node.body) and not (gives and "None" in promised)


def goes_on(body: list[ast.stmt]) -> bool:
    """Whether a run can come out at the end of these statements; where that is not plain, no."""
    last = body[-1]
    if isinstance(last, ast.If):
        return not last.orelse or goes_on(last.body) or goes_on(last.orelse)
    if isinstance(last, ast.With):
        return goes_on(last.body)
    if isinstance(last, ast.While) and isinstance(last.test, ast.Constant):
        return any(isinstance(part, ast.Break) for part in ast.walk(last))
    return not isinstance(last, ast.Return | ast.Raise | ast.Try | ast.Match)


def count_code_lines(lines: list[str]) -> int:
    """Lines that hold code: no blank ones and no comments."""
    tokens = tokenize.generate_tokens(io.StringIO("\n".join(["if True:", *lines]) + "\n").readline)
    return len({line for token in tokens if token.type not in NO_CODE
                for line in range(token.start[0], token.end[0] + 1)}) - 1


def blank(source: str, name: str, where: str) -> str:
    """The text with the function's body replaced by one line that raises; signature, docstring and all else stay."""
    node = find(source, name, where)
    lines, documented = source.split("\n"), len(body_of(node)) < len(node.body)
    assert documented and body_of(node), f"{name} has no docstring or no body: there is nothing to implement it from"
    start, end = node.body[0].end_lineno, node.end_lineno
    assert start is not None and end is not None and start < body_of(node)[0].lineno, f"{name} has its body on one line with it"
    count = count_code_lines(lines[start:end])
    ending = "\r" if lines[start].endswith("\r") else ""
    message = f"{YOUR_TURN}{name}, about {count} {'line' if count == 1 else 'lines'}"
    raises = f'{" " * node.body[0].col_offset}raise NotImplementedError("{message}"){ending}'
    return "\n".join([*lines[:start], raises, *lines[end:]])


def splice(source: str, name: str, other: str, where: str, other_where: str) -> str:
    """The text with its function `name` replaced by the one that `other` has, whole: signature, docstring and body."""
    old, new = find(source, name, where), find(other, name, other_where)
    lines, taken = source.split("\n"), lines_of(other, new)
    end = old.end_lineno
    assert end is not None, "ast knows where a function ends"
    result = "\n".join([*lines[:end - len(lines_of(source, old))], *taken, *lines[end:]])
    if code_of(find(result, name, other_where)) != code_of(new):
        raise SourceError(f"{name} of {other_where} does not fit into {where}")
    return result


def fingerprint(source: str, names: Iterable[str], where: str) -> str:
    """Twelve digits that change when the code outside these functions does; comments and docstrings do not count."""
    tree = parse(source, where)
    blanked = {find(source, name, where).lineno for name in names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | Function) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        if isinstance(node, Function) and node.lineno in blanked:
            node.body = [ast.Pass()]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:12]
