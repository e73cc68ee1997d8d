"""PTX text to a list of instructions. Calls are inlined; scopes and labels keep their own names."""

import re
from collections import ChainMap
from typing import NamedTuple

from .faults import Unsupported
from .formats import FORMATS, Format, format_of

COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
LINE_DIRECTIVE = re.compile(r"^\s*\.(version|target|address_size|loc|file)\b[^\n]*$", re.M)
LABEL = re.compile(r"\s*([\w$]+)\s*:(?!:)")
INSTRUCTION = re.compile(r"(?:@(!?)\s*([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
SPACE = re.compile(r"\.(shared|local|const|global|param)\b")
ALIGNMENT = re.compile(r"\.align\s+(\d+)")
NAME = re.compile(r"([\w$]+)\s*(?:\[(\d*)\])?\s*$")
FUNCTION = re.compile(
    r"\.(entry|func)\s*(?:\((?P<out>[^)]*)\))?\s*(?P<name>[\w$]+)\s*(?:\((?P<in>[^)]*)\))?", re.S
)
CALL = re.compile(r"(?:\((?P<out>[^)]*)\)\s*,\s*)?(?P<name>[\w$]+)\s*(?:,\s*\((?P<in>[^)]*)\))?")


class Register(NamedTuple):
    index: int
    format: Format


class Label(NamedTuple):
    position: int


class Variable(NamedTuple):
    """A place in one of the spaces of memory."""

    space: str
    offset: int
    format: Format
    size: int


class Instruction(NamedTuple):
    """One instruction; `names` says what the words among its operands mean."""

    text: str
    opcode: str
    modifiers: tuple
    operands: tuple
    guard: str
    negated: bool
    names: ChainMap

    def lookup(self, word):
        """What a name stands for, or None."""
        return self.names.get(word)


class Declaration(NamedTuple):
    head: str
    body: str


def split(text):
    """What commas divide, outside of brackets."""
    parts, depth, start = [], 0, 0
    for position, letter in enumerate(text):
        depth += (letter in "{[(") - (letter in "}])")
        if letter == "," and not depth:
            parts.append(text[start:position].strip())
            start = position + 1
    rest = text[start:].strip()
    return [*parts, rest] if rest else parts


def closing(text, start):
    """Where the brace that opens at `start` is closed."""
    depth = 0
    for found in re.finditer("[{}]", text[start:]):
        depth += 1 if found.group() == "{" else -1
        if not depth:
            return start + found.start()
    raise Unsupported("a brace that is never closed")


def declarations(text):
    """The module's variables and functions."""
    start = at = 0
    while found := re.compile("[;{]").search(text, at):
        at = found.end()
        if found.group() == ";":
            yield Declaration(text[start : at - 1].strip(), "")
            start = at
        elif text[start : at - 1].rstrip().endswith("="):
            at = closing(text, at - 1) + 1
        else:
            end = closing(text, at - 1)
            yield Declaration(text[start : at - 1].strip(), text[at:end])
            start = at = end + 1


def statements(body):
    """The statements of a body one by one; "{" and "}" where a scope begins and ends."""
    at = 0
    while at < len(body):
        if body[at].isspace() or body[at] == ";":
            at += 1
        elif body[at] in "{}":
            yield body[at]
            at += 1
        elif label := LABEL.match(body, at):
            yield label.group(1) + ":"
            at = label.end()
        else:
            end = body.index(";", at)
            yield body[at:end].strip()
            at = end + 1


def variable_parts(text):
    """Space, type, name, count of elements (None: as many as the launch says) and alignment."""
    space, name = SPACE.search(text), NAME.search(text)
    kind = next((word for word in re.findall(r"\.(\w+)", text) if word in FORMATS), None)
    if not (space and name and kind):
        raise Unsupported(f"directive {text[:80]}")
    alignment = ALIGNMENT.search(text)
    known = FORMATS[kind]
    count = {None: 1, "": None}.get(name.group(2), name.group(2))
    pointer = ".ptr" in text  # what is aligned is what the parameter points to
    return (
        space.group(1),
        known,
        name.group(1),
        count and int(count),
        int(alignment.group(1)) if alignment and not pointer else known.size,
    )


class Layout:
    """Room for the variables of one space."""

    def __init__(self):
        self.size = 0

    def place(self, size, alignment):
        """The offset of a new variable."""
        offset = -(-self.size // alignment) * alignment
        self.size = offset + size
        return offset


class Module:
    """The declarations of a PTX text."""

    def __init__(self, text):
        text = LINE_DIRECTIVE.sub("", COMMENT.sub("", text))
        self.functions, self.entries = {}, {}
        self.names = {}
        self.spaces = {name: Layout() for name in ("shared", "local", "module", "entry")}
        self.data = []
        self.dynamic = []
        for declared in declarations(text):
            self._declare(declared)

    def _declare(self, declared):
        function = FUNCTION.search(declared.head)
        if function and declared.body:
            kept = self.entries if function.group(1) == "entry" else self.functions
            kept[function["name"]] = (function, declared)
        elif not function:
            self.variable(declared.head, self.names)

    def variable(self, text, names):
        """Place the variable that `text` declares."""
        declared, _, values = text.partition("=")
        space, known, name, count, alignment = variable_parts(declared)
        if count is None:
            self.dynamic.append(name)
        layout = {"const": "module", "global": "module", "param": "local"}.get(space, space)
        size = known.size * (count or 0)
        offset = self.spaces[layout].place(size, alignment)
        names[name] = Variable(layout, offset, known, size)
        if values:
            self.data.append((offset, known, [int(v, 0) for v in split(values.strip("{} \n\t"))]))


class Code:
    """The instructions of one entry, its calls inlined."""

    def __init__(self, module, name=None):
        self.module = module
        self.name = name or next(iter(module.entries))
        self.instructions, self.registers, self.parameters = [], [], []
        self.depth = 0
        function, declared = module.entries[self.name]
        limit = re.search(r"\.(?:maxntid|reqntid)\s+([\d, ]+)", declared.head)
        self.most_threads = _product(limit.group(1)) if limit else 1024
        scope = ChainMap({}, module.names)
        for parameter in split(function["in"] or ""):
            self._entry_parameter(parameter, scope)
        self._body(declared.body, scope, None)
        self._place_dynamic()

    def _place_dynamic(self):
        """All shared arrays of no fixed size begin where the others end."""
        known = format_of("b8")
        start = self.module.spaces["shared"].place(0, 16)
        for name in self.module.dynamic:
            self.module.names[name] = Variable("shared", start, known, 0)

    def _entry_parameter(self, text, scope):
        """A kernel parameter, the same for every thread."""
        _, known, name, count, alignment = variable_parts(text)
        size = known.size * count
        offset = self.module.spaces["entry"].place(size, alignment)
        self.parameters.append(Variable("entry", offset, known, size))
        scope[name] = self.parameters[-1]

    def _body(self, text, scope, end):
        """Append a body's instructions. `end` is the label that a return goes to, if any."""
        for statement in statements(text):
            if statement == "{":
                scope = scope.new_child()
            elif statement == "}":
                scope = scope.parents
            elif statement.endswith(":"):
                scope[statement[:-1]] = Label(len(self.instructions))
            elif statement.startswith(".reg"):
                self._registers(statement, scope)
            elif statement.startswith((".local", ".shared", ".param")):
                self.module.variable(statement, scope)
            elif not statement.startswith(".pragma"):
                self._instruction(statement, scope, end)

    def _registers(self, text, scope):
        """`.reg .f32 %f<5>, %x;`"""
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S).groups()
        known = format_of(kind)
        for name in split(names):
            family = re.fullmatch(r"(.*)<(\d+)>", name)
            each = [name]
            if family:
                each = [f"{family.group(1)}{number}" for number in range(int(family.group(2)))]
            for one in each:
                scope[one] = Register(len(self.registers), known)
                self.registers.append(known)

    def _instruction(self, text, scope, end):
        found = INSTRUCTION.fullmatch(text)
        if not found:
            raise Unsupported(f"statement {text[:80]}")
        negated, guard, words, rest = found.groups()
        opcode, *modifiers = words.split(".")
        if opcode == "call":
            self._call(rest, scope)
            return
        operands = tuple(split(rest))
        if opcode == "ret" and end:
            opcode, operands = "bra", (end,)
        shown = " ".join(text.split())
        self.instructions.append(
            Instruction(shown, opcode, tuple(modifiers), operands, guard, bool(negated), scope)
        )

    def _call(self, text, scope):
        """The body of the function that is called, its parameters being the caller's variables."""
        found = CALL.fullmatch(" ".join(text.split()))
        if not found or found["name"] not in self.module.functions:
            raise Unsupported(f"call {text}")
        if self.depth > 20:
            raise Unsupported("recursion")
        function, declared = self.module.functions[found["name"]]
        inner = ChainMap({}, self.module.names)
        for group in ("out", "in"):
            formal, actual = split(function[group] or ""), split(found[group] or "")
            for parameter, given in zip(formal, actual, strict=True):
                inner[variable_parts(parameter)[2]] = scope[given]
        self.depth += 1
        self._body(declared.body, inner, "%end")
        inner["%end"] = Label(len(self.instructions))
        self.depth -= 1


def _product(text):
    """Threads of a block, of a limit's up to three numbers."""
    product = 1
    for number in text.replace(",", " ").split():
        product *= int(number)
    return product
