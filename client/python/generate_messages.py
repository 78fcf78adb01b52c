"""Writes structkv/messages.py: a dataclass for each message that a caller has to do with, with the
comments of the public API as its documentation.

    generate_messages.py DESCRIPTOR_SET OUT    of protoc --include_source_info --descriptor_set_out
"""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorSet,
)

# What a caller builds or gets; the messages and enums of their fields follow.
ROOTS = ["Open", "Opened", "Summary", "LayerMetrics", "GetCapabilitiesResponse", "CacheInfo"]
ENUM_ROOTS = ["Tensor", "PivotMode"]

HEADER = '''"""Messages of the public API: what compression.proto and held_cache.proto say, word for word.

Of what a caller builds, None leaves a field unset; the server's default is then in force. An
enum's values are their names in lower case: DTYPE_BF16 is "bf16", an unspecified one is None.

Generated from the .proto files by generate_messages.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias
'''

SCALARS = {
    FieldDescriptorProto.TYPE_UINT32: ("int", "0"),
    FieldDescriptorProto.TYPE_UINT64: ("int", "0"),
    FieldDescriptorProto.TYPE_FIXED64: ("int", "0"),
    FieldDescriptorProto.TYPE_DOUBLE: ("float", "0.0"),
    FieldDescriptorProto.TYPE_BOOL: ("bool", "False"),
    FieldDescriptorProto.TYPE_STRING: ("str", '""'),
    FieldDescriptorProto.TYPE_BYTES: ("bytes", 'b""'),
}


class Schema:
    def __init__(self, files: FileDescriptorSet) -> None:
        self.messages: dict[str, DescriptorProto] = {}
        self.enums: dict[str, EnumDescriptorProto] = {}
        self.comments: dict[tuple[str, int | None], str] = {}  # by type, and field
        for file in files.file:
            comments = {
                tuple(location.path): location.leading_comments
                for location in file.source_code_info.location
            }
            for i, message in enumerate(file.message_type):
                self.messages[message.name] = message
                self.comments[message.name, None] = comments.get((4, i), "")
                for k in range(len(message.field)):
                    self.comments[message.name, k] = comments.get((4, i, 2, k), "")
            for i, enum in enumerate(file.enum_type):
                self.enums[enum.name] = enum
                self.comments[enum.name, None] = comments.get((5, i), "")
                for k in range(len(enum.value)):
                    self.comments[enum.name, k] = comments.get((5, i, 2, k), "")

    def reachable(self) -> tuple[list[str], list[str]]:
        """Names of messages, those that others need first, and of enums."""
        messages: list[str] = []
        enums = list(ENUM_ROOTS)

        def visit(name: str) -> None:
            if name in messages:
                return
            for field in self.messages[name].field:
                type_name = field.type_name.rpartition(".")[2]
                if field.type == FieldDescriptorProto.TYPE_MESSAGE:
                    visit(type_name)
                elif field.type == FieldDescriptorProto.TYPE_ENUM and type_name not in enums:
                    enums.append(type_name)
            messages.append(name)

        for root in ROOTS:
            visit(root)
        return messages, enums


def text(comment: str, indent: str) -> str:
    """A comment's paragraphs, wrapped."""
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", comment.strip())]
    return "\n\n".join(
        textwrap.fill(part.replace("\\", "\\\\"), 99, initial_indent=indent, subsequent_indent=indent)
        for part in paragraphs
    )


def is_union(message: DescriptorProto) -> bool:
    """One of several other messages: written as them, without a class of its own."""
    return len(message.oneof_decl) == 1 and all(
        field.HasField("oneof_index") and not field.proto3_optional for field in message.field
    )


def enum_text(schema: Schema, enum: EnumDescriptorProto) -> str:
    prefix = enum.value[0].name.removesuffix("UNSPECIFIED")
    names = [value.name.removeprefix(prefix).lower() for value in enum.value]
    values = ", ".join(f'"{name}"' for name in names[1:])
    docs = [schema.comments[enum.name, None]]
    docs += [
        f"{name}: {schema.comments[enum.name, k]}"
        for k, name in enumerate(names)
        if k > 0 and schema.comments[enum.name, k]
    ]
    doc = "\n\n".join(text(part, "") for part in docs if part.strip())
    return f'{enum.name}: TypeAlias = Literal[{values}]\n"""{doc}"""\n'


def field_text(message: str, field: FieldDescriptorProto) -> str:
    type_name = field.type_name.rpartition(".")[2]
    name, default = SCALARS.get(field.type, (type_name, "None"))
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"    {field.name}: Sequence[{name}] = ()"
    if field.proto3_optional:
        default = "None"
    return f"    {field.name}: {name}{' | None' if default == 'None' else ''} = {default}"


def message_text(schema: Schema, message: DescriptorProto) -> str:
    comment = schema.comments[message.name, None]
    if is_union(message):
        members = [field.type_name.rpartition(".")[2] for field in message.field]
        return f'{message.name}: TypeAlias = {" | ".join(members)}\n"""{text(comment, "")}"""\n'
    lines = ["@dataclass(frozen=True, kw_only=True)", f"class {message.name}:"]
    if comment:
        lines += [f'    """{text(comment, "    ").strip()}"""', ""]
    for k, field in enumerate(message.field):
        lines.append(field_text(message.name, field))
        if schema.comments[message.name, k]:
            lines.append(f'    """{text(schema.comments[message.name, k], "    ").strip()}"""')
    return "\n".join(lines) + ("\n" if message.field or comment else "\n    pass\n")


def main(descriptors: str, out: str) -> None:
    schema = Schema(FileDescriptorSet.FromString(Path(descriptors).read_bytes()))
    messages, enums = schema.reachable()
    parts = [HEADER, *(enum_text(schema, schema.enums[name]) for name in enums)]
    parts += [message_text(schema, schema.messages[name]) for name in messages]
    Path(out).write_text("\n".join(parts))


if __name__ == "__main__":
    main(*sys.argv[1:])
