"""PTX of nvcc as C++ that the CUDA emulator runs: each instruction becomes a statement, each register a variable.

The host's half of a `.cu` file is compiled by g++ with its kernels declared only. Their definitions are what this
module makes of the PTX, with the same names, so that launches call them. Loads, stores, barriers, exchanges, flags,
mbarriers and matrix instructions are those of the emulator, with its orders and its race detector;
tests/cuda/emulator/ptx.h has the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

TYPES = {
    "pred": "bool",
    **{f"{kind}{bits}": f"uint{bits}_t" for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": f"int{bits}_t" for bits in (8, 16, 32, 64)},
    "f32": "float",
    "f64": "double",
    "f16": "uint16_t",
    "bf16": "uint16_t",
    "tf32": "uint32_t",
}
SPECIAL = {
    "%tid.x": "position().index",
    "%ctaid.x": "position().block_x",
    "%ctaid.y": "position().block_y",
    "%ctaid.z": "position().block_z",
    "%ntid.x": "launch().threads",
    "%nctaid.x": "launch().grid_x",
    "%nctaid.y": "launch().grid_y",
    "%nctaid.z": "launch().grid_z",
}
# Modifiers that say nothing about the result here: the cache to use, flushing of subnormal numbers, uniform branches.
IGNORED = {"ftz", "nc", "uni", "aligned", "L2", "cg", "ca", "cta", "weak"}
# Operands of another type than that of the instruction, by position.
OTHER_TYPES = {
    "shl": {1: "u32"},
    "shr": {1: "u32"},
    "bfi": {2: "u32", 3: "u32"},
    "prmt": {2: "u32"},
}
ARITHMETIC = (
    *("add", "sub", "mul", "mad", "fma", "div", "rem", "neg", "abs", "min", "max", "and", "or", "xor", "not"),
    *("shl", "shr", "bfi", "prmt", "rcp", "ex2", "copysign"),
)


class UnknownPtxError(Exception):
    """An instruction or operand that this module does not know."""


@dataclass
class Kernel:
    """A kernel: its name, its parameter in bytes, and its body."""

    name: str
    bytes: int
    align: int
    line: int  # of the body's beginning in the file
    body: str


@dataclass
class Translation:
    """The statements of a kernel as C++."""

    kernel: Kernel
    file: str
    symbols: dict[str, str] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)  # of registers; `r<>` of r0, r1 and so on

    # ---- operands

    def type_of(self, operand: str) -> str | None:
        """The type of a register; None if it is not known."""
        name = register(operand)
        return self.types.get(name) or self.types.get(name.rstrip("0123456789") + "<>")

    def put(self, name: str, value: str, kind: str = "") -> str:
        """The assignment of a value, of this kind if one is given, to a register."""
        if name == "_":
            return f"{value};"
        if kind and self.type_of(name) == TYPES[kind]:
            return f"{register(name)} = {value};"
        return f"{register(name)} = as<decltype({register(name)})>({value});"

    def value(self, operand: str, kind: str) -> str:
        """An operand as an expression of the type."""
        as_type = f"as<{TYPES[kind]}>"
        if operand in SPECIAL:
            return f"{as_type}(static_cast<uint32_t>({SPECIAL[operand]}))"
        if operand in self.symbols:
            return f"{as_type}({self.symbols[operand]})"
        if number := re.fullmatch(r"0([fd])([0-9A-Fa-f]{8,16})", operand):
            bits = 32 if number[1] == "f" else 64
            return f"{as_type}(uint{bits}_t{{0x{number[2]}u}})"
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", operand):
            number_ = int(operand.rstrip("U"), 0)
            return f"static_cast<{TYPES[kind]}>({number_}{'ull' if number_ >= 2**63 else 'll'})"
        if self.type_of(operand) == TYPES[kind]:
            return register(operand)
        return f"{as_type}({register(operand)})"

    def address(self, operand: str, space: str) -> str:
        """An address in brackets, as a pointer."""
        inside = re.fullmatch(r"\[([^+\]]+)(?:\+(-?\w+))?\]", operand)
        if inside is None:
            raise UnknownPtxError(operand)
        if space.startswith("shared"):
            return f"shared({self.value(inside[1], 'u32')} + ({inside[2] or 0}))"
        return f"pointer({self.value(inside[1], 'u64')} + ({inside[2] or 0}))"

    def number_in(self, operand: str) -> str:
        """An address of shared memory in brackets, as a number."""
        inside = re.fullmatch(r"\[([^+\]]+)(?:\+(-?\w+))?\]", operand)
        if inside is None:
            raise UnknownPtxError(operand)
        return f"({self.value(inside[1], 'u32')} + ({inside[2] or 0}))"

    # ---- statements

    def statement(self, text: str, line: int) -> str:
        """A statement as C++."""
        if declared := re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text, re.DOTALL):
            names, kind = [], TYPES[declared[1]]
            for name in re.split(r",\s*", declared[2]):
                many = re.fullmatch(r"(%\w+)<(\d+)>", name)
                self.types[f"{register(many[1])}<>" if many else register(name)] = kind
                names += [f"{register(many[1])}{i}" for i in range(int(many[2]))] if many else [register(name)]
            return f"{kind} " + ", ".join(f"{name} = 0" for name in names) + ";"
        if text.startswith((".pragma", ".loc")):
            return ""
        guard = ""
        if guarded := re.match(r"@(!?)(%?\w+)\s+", text):
            guard = f"if ({guarded[1]}{register(guarded[2])}) "
            text = text[guarded.end() :]
        name, _, rest = text.partition(" ") if " " in text else text.partition("\t")
        site = f'CallSite{{"{name[:40]}", "{self.file}", {line}}}'
        return f"{guard}{{ {self.instruction(name.split('.'), operands(rest), site)} }}"

    def instruction(self, name: list[str], a: list[str], site: str) -> str:
        """An instruction as C++."""
        root, kind = name[0], name[-1]
        words = [word for word in name[1:] if word not in IGNORED]
        special = getattr(self, f"_{root}", None)
        if special is not None:
            done = special(name, a, site)
            if done is not None:
                return str(done)
        if root in ARITHMETIC and kind in TYPES:
            others = OTHER_TYPES.get(root, {})
            values = [self.value(operand, others.get(i, kind)) for i, operand in enumerate(a[1:])]
            function = "_".join([root, *words[:-1]]) + "_" * (root in ("and", "or", "xor", "not"))
            if (root, kind) == ("rcp", "f64") and "approx" in words:
                return self.put(a[0], f"rcp_approx_f64({values[0]})")
            return self.put(a[0], f"{function}<{TYPES[kind]}>({', '.join(values)})", kind)
        raise UnknownPtxError(f"{'.'.join(name)} {', '.join(a)}")

    def _bra(self, name: list[str], a: list[str], site: str) -> str:
        return f"goto {register(a[0])};"

    def _ret(self, name: list[str], a: list[str], site: str) -> str:
        return "return;"

    def _trap(self, name: list[str], a: list[str], site: str) -> str:
        return f'fault("a trap", {site});'

    def _mov(self, name: list[str], a: list[str], site: str) -> str:
        kind = name[-1]
        bits = int(kind[1:]) if kind != "pred" else 0
        if a[0].startswith("{"):  # parts, the lowest bits first
            parts = list_in(a[0])
            each = bits // len(parts)
            return f"const uint{bits}_t whole = {self.value(a[1], f'b{bits}')}; " + " ".join(
                self.put(part, f"static_cast<uint{each}_t>(whole >> {each * i})")
                for i, part in enumerate(parts)
                if part != "_"
            )
        if a[1].startswith("{"):
            parts = list_in(a[1])
            each = bits // len(parts)
            terms = [
                f"static_cast<uint{bits}_t>({self.value(part, f'b{each}')}) << {each * i}"
                for i, part in enumerate(parts)
            ]
            return self.put(a[0], f"static_cast<uint{bits}_t>({' | '.join(terms)})")
        return self.put(a[0], self.value(a[1], kind), kind)

    def _cvta(self, name: list[str], a: list[str], site: str) -> str:
        if "shared" not in name:
            return self.put(a[0], self.value(a[1], "u64"))
        if "to" in name:
            raise UnknownPtxError(".".join(name))
        return self.put(a[0], f"generic_of_shared(static_cast<uint32_t>({self.value(a[1], 'u64')}))")

    def _cvt(self, name: list[str], a: list[str], site: str) -> str:
        to, source = name[-2:]
        words = [word for word in name[1:-2] if word not in IGNORED]
        if {to, source} & {"f16", "bf16", "tf32"}:
            return self.put(a[0], f"{'_'.join(['cvt', *words, to, source])}({self.value(a[1], source)})")
        function = "_".join(["cvt", *words])
        return self.put(a[0], f"{function}<{TYPES[to]}, {TYPES[source]}>({self.value(a[1], source)})", to)

    def _setp(self, name: list[str], a: list[str], site: str) -> str:
        kind, compare = name[-1], {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(name[1], name[1])
        result = f"{compare}<{TYPES[kind]}>({self.value(a[1], kind)}, {self.value(a[2], kind)})"
        combined = [word for word in name[2:-1] if word in ("and", "or", "xor")]
        if combined:
            result = f"{combined[0]}_<bool>({result}, {self.value(a[3], 'pred')})"
        return self.put(a[0], result, "pred")

    def _selp(self, name: list[str], a: list[str], site: str) -> str:
        kind = name[-1]
        return self.put(a[0], f"{register(a[3])} ? {self.value(a[1], kind)} : {self.value(a[2], kind)}", kind)

    def _ld(self, name: list[str], a: list[str], site: str) -> str:
        words, kind = name[1:-1], name[-1]
        space = next((word for word in words if word in ("global", "shared", "param")), "generic")
        if "acquire" in words or "relaxed" in words:
            acquires = str("acquire" in words and "cta" not in words).lower()
            where = f"reinterpret_cast<const uint32_t*>({self.address(a[1], space)})"
            return self.put(a[0], f"poll_flag({where}, {acquires}, {site})")
        count = next((int(word[1]) for word in words if word in ("v2", "v4")), 1)
        known = {"global", "shared", "param", "v2", "v4"} | IGNORED
        if set(words) - known:
            raise UnknownPtxError(".".join(name))
        where = self.address(a[1], space)
        if count == 1:
            return self.put(a[0], f"load<{TYPES[kind]}>({where})", kind)
        parts = [self.put(part, f"loaded.at[{i}]", kind) for i, part in enumerate(list_in(a[0])) if part != "_"]
        return f"const auto loaded = load<Vector<{TYPES[kind]}, {count}>>({where}); {' '.join(parts)}"

    def _st(self, name: list[str], a: list[str], site: str) -> str:
        words, kind = name[1:-1], name[-1]
        if "async" in words:
            values = ", ".join(self.value(word, "b32") for word in list_in(a[1]))
            if "v4" not in words:
                raise UnknownPtxError(".".join(name))
            return (
                f"const uint32_t words[4] = {{{values}}}; "
                f"st_async({self.number_in(a[0])}, words, {self.number_in(a[2])}, {site});"
            )
        space = next((word for word in words if word in ("global", "shared")), "generic")
        where = self.address(a[0], space)
        if "release" in words or "relaxed" in words:
            releases = str("release" in words and "cta" not in words).lower()
            return f"raise_flag(reinterpret_cast<uint32_t*>({where}), {self.value(a[1], kind)}, {releases});"
        if set(words) - {"global", "shared", "v2", "v4"} - IGNORED:
            raise UnknownPtxError(".".join(name))
        parts = list_in(a[1]) if a[1].startswith("{") else [a[1]]
        values = ", ".join(self.value(part, kind) for part in parts)
        if len(parts) == 1:
            return f"store<{TYPES[kind]}>({where}, {values});"
        vector = f"Vector<{TYPES[kind]}, {len(parts)}>"
        return f"store<{vector}>({where}, {vector}{{{{{values}}}}});"

    def _prefetch(self, name: list[str], a: list[str], site: str) -> str:
        return f"load<volatile uint8_t>({self.address(a[0], 'global')});"

    def _cp(self, name: list[str], a: list[str], site: str) -> str:
        if name[:3] == ["cp", "async", "wait_all"]:
            return "copy_async_wait();"
        to, source = self.address(a[0], "shared"), self.address(a[1], "global")
        return f"copy_async({to}, {source}, {a[2]}, {site});"

    def _bar(self, name: list[str], a: list[str], site: str) -> str:
        if name[1:] != ["sync"] or a != ["0"]:
            raise UnknownPtxError(f"{'.'.join(name)} {a}")
        return f"block_barrier({site});"

    def _barrier(self, name: list[str], a: list[str], site: str) -> str:
        if name[1] != "cluster":
            raise UnknownPtxError(".".join(name))
        if name[2] == "wait":
            return f"cluster_wait({site});"
        return f"cluster_arrive({site}, {str('relaxed' not in name).lower()});"

    def _fence(self, name: list[str], a: list[str], site: str) -> str:
        if name[1:] != ["mbarrier_init", "release", "cluster"]:
            raise UnknownPtxError(".".join(name))
        return "publish_mbarriers();"

    def _mbarrier(self, name: list[str], a: list[str], site: str) -> str:
        if name[1] == "init":
            if a[1] != "1":
                raise UnknownPtxError("an mbarrier of several arrivals")
            return f"init_mbarrier({self.address(a[0], 'shared')}, {site}, false);"
        if name[1] == "arrive":
            return f"expect_bytes({self.address(a[1], 'shared')}, {self.value(a[2], 's32')}, {site});"
        scope = str("cluster" in name).lower()
        waits = f"wait_mbarrier({self.address(a[1], 'shared')}, {self.value(a[2], 's32')}, {site}, {scope});"
        return f"{waits} {self.put(a[0], 'true')}"

    def _mapa(self, name: list[str], a: list[str], site: str) -> str:
        return self.put(a[0], f"mapa({self.value(a[1], 'u32')}, {self.value(a[2], 'u32')})")

    def _shfl(self, name: list[str], a: list[str], site: str) -> str:
        if name[1:] not in (["sync", "bfly", "b32"], ["sync", "idx", "b32"]):
            raise UnknownPtxError(f"{'.'.join(name)} {a}")
        values = ", ".join(self.value(operand, "u32") for operand in a[1:])
        return self.put(a[0].partition("|")[0], f"shfl_sync_{name[2]}({values}, {site})")

    def _mma(self, name: list[str], a: list[str], site: str) -> str:
        to, first, second, sums = map(list_in, a)
        values = {
            "float sum": [self.value(x, "f32") for x in sums],
            "const uint32_t a": [self.value(x, "b32") for x in first],
            "const uint32_t b": [self.value(x, "b32") for x in second],
        }
        if name[4:6] != ["row", "col"]:
            raise UnknownPtxError(".".join(name))
        declared = " ".join(f"{what}[{len(of)}] = {{{', '.join(of)}}};" for what, of in values.items())
        if "tf32" in name:
            call = f"mma_m16n8k8_tf32(sum, a, b, {site});"
        else:
            widen = "float_of_bfloat16" if "bf16" in name else "float_of_float16"
            call = f"mma_m16n8k16(sum, a, b, {widen}, {site});"
        return f"{declared} {call} " + " ".join(self.put(register_, f"sum[{i}]") for i, register_ in enumerate(to))


def register(name: str) -> str:
    """A register or label as a C++ name."""
    return name.replace("%", "").replace("$", "")


def list_in(operand: str) -> list[str]:
    """The operands in braces."""
    return [part.strip() for part in operand.strip("{} ").split(",")]


def operands(text: str) -> list[str]:
    """The operands of an instruction; those in braces are one."""
    return [part.strip() for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", text)]


def kernels_of(text: str) -> list[Kernel]:
    """The kernels in a file of PTX."""
    head = re.compile(r"\.entry (\w+)\(\s*\.param \.align (\d+) \.b8 \w+\[(\d+)\]\s*\)[^{]*")
    found = []
    for match in head.finditer(text):
        end = text.index("\n}\n", match.end())
        line = text.count("\n", 0, match.end()) + 1
        found.append(Kernel(match[1], int(match[3]), int(match[2]), line, text[match.end() + 1 : end]))
    return found


def pieces_of(kernel: Kernel) -> Iterator[tuple[str, int]]:
    """Statements, braces and labels (ending in a colon) of a body, with their lines."""
    text = re.sub(r"//[^\n]*", "", kernel.body)
    for match in re.finditer(r"\s*([{}]|[\w$]+:(?!:)|[^;{}\s][^;]*;)", text):
        piece = match[1]
        # A statement of nvcc is on a line of its own: a brace within it belongs to operands.
        yield piece.rstrip(";").strip(), kernel.line + text.count("\n", 0, match.start(1))


def translate(kernel: Kernel, local: str, file: str) -> str:
    """A kernel as a C++ file. `local` replaces the name that nvcc gives to unnamed namespaces."""
    work = Translation(kernel, file, {f"{kernel.name}_param_0": "reinterpret_cast<uint64_t>(parameter.at)"})
    work.symbols["_ZN7llm_ext4cuda5bytesE"] = "kSharedBase"
    if kernel.bytes <= 16:
        raise UnknownPtxError(f"the parameter of {kernel.name} is passed in registers")
    lines = [
        '#include "ptx.h"',
        "using namespace emulator;",
        "using namespace emulator::ptx;",
        f"struct Parameter {{ alignas({kernel.align}) unsigned char at[{kernel.bytes}]; }};",
        f'void kernel(Parameter) asm("{host_name(kernel.name, local)}");',
        "void kernel(Parameter parameter) {",
    ]
    for piece, line in pieces_of(kernel):
        if piece in "{}":
            code = piece
        elif piece.endswith(":"):
            code = f"{register(piece)};"
        else:
            code = work.statement(piece, line)
        if code:
            lines += [f'#line {line} "{file}"', code]
    return "\n".join([*lines, "}", ""])


HEAD = '#include "ptx.h"\n'


def absent(kernel: Kernel, local: str, number: int) -> str:
    """The definition of a kernel that is not translated, and must not run."""
    return (
        f"struct Parameter{number} {{ alignas({kernel.align}) unsigned char at[{kernel.bytes}]; }};\n"
        f'void kernel{number}(Parameter{number}) asm("{host_name(kernel.name, local)}");\n'
        f'void kernel{number}(Parameter{number}) {{ emulator::fault("this kernel is not translated", {{}}); }}\n'
    )


def host_name(name: str, local: str) -> str:
    """The name that g++ gives to a kernel whose unnamed namespace is called `local`."""
    found = re.search(r"(\d+)_GLOBAL__N_", name)
    if found is None:
        return name
    begin = found.start() + len(found[1])
    rest = name[begin + int(found[1]) :]
    return f"{name[: found.start()]}{len(local)}{local}{rest}"


def without_kernels(text: str) -> str:
    """A file of csrc/cuda whose kernels are only declared, and whose unnamed namespaces have a name."""
    text = text.replace("namespace {", "inline namespace LLM_EXT_LOCAL {")
    begin = 0
    while (match := re.compile(r"^LLM_EXT_(?:SHARING_)?KERNEL\(.*", re.MULTILINE).search(text, begin)) is not None:
        if "#define" in text[text.rfind("\n", 0, match.start()) : match.start()]:
            begin = match.end()
            continue
        opened = text.index(") {\n", match.start()) + 2
        closed = text.index("\n}\n", opened)
        text = f"{text[:opened].rstrip()};{text[closed + 2 :]}"
        begin = opened
    return text
