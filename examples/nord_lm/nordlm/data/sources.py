"""Read text from files, from a dataset of the Hugging Face hub, or from CPython's own documentation.

``Documents.notes`` counts what is left out: links to folders (they are not followed), broken links, pipes, files of other kinds,
files of white space only, and records without text. A folder or text file that cannot be read, an empty text file, and a source
without any text raise :class:`DataError`.
"""

import ast
import inspect
import json
import os
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nordlm.cli import shorten
from nordlm.errors import DataError
from nordlm.reading import exists

__all__ = [
    "Documents",
    "first_line",
    "python_files",
    "read_documents",
]

TEXT_FIELDS = ("text", "content", "passage")

IN_MEMORY_BYTES = 1 << 30  # local text up to this size is kept in memory; larger text is streamed

#: A .txt file has no document boundaries. It is cut at line ends into sections of about this size.
SECTION_CHARACTERS = 4096


@dataclass
class Documents:
    """A source of documents.

    Attributes:
        name: description of the source, for messages.
        read: starts a new pass over the documents.
        streamed: whether each pass reads the source again; otherwise all documents are in memory.
        skipped: number of files and records that were left out in one pass, by reason.
        first_skipped: location of the first of them, by reason.
    """

    name: str
    read: Callable[[], Iterator[str]]
    streamed: bool
    skipped: Counter[str] = field(default_factory=Counter)
    first_skipped: dict[str, str] = field(default_factory=dict)

    def skip(self, reason: str, where: str) -> None:
        """Count a file or record that is left out."""
        self.skipped[reason] += 1
        self.first_skipped.setdefault(reason, where)

    def notes(self) -> list[str]:
        """Return one sentence for each reason why files or records were left out."""
        return [f"left out {n}: {reason} (first: {self.first_skipped[reason]})" for reason, n in self.skipped.items()]


def read_documents(source: str | None = None) -> Documents:
    """Open a source of text.

    Args:
        source: None for CPython's own documentation; a ``.txt``, ``.jsonl`` or ``.parquet`` file, or a folder of these;
            else the name of a Hugging Face dataset, ``owner/name`` or ``owner/name:config``, which is streamed.

    Raises:
        DataError: the source does not exist, or is not text.
    """
    if source is None:
        return _in_memory(Documents("the documentation inside CPython", python_documentation, streamed=False))
    if not source:
        raise DataError("the name of the text is empty; expected a file, a folder or a dataset owner/name")
    path = Path(source)
    if exists(path):
        return _local(path)
    if path.suffix in READERS or path.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1:
        raise DataError(
            f"{shorten(source)}: no such file or folder; expected .txt, .jsonl or .parquet, or a dataset owner/name"
        )
    return _from_hub(source)


def python_documentation() -> Iterator[str]:
    """Yield documents of the running Python: topics of ``help()``, and docstrings of each standard-library module.

    The modules are parsed, not imported. The text differs slightly between Python releases.
    """
    library = Path(sysconfig.get_path("stdlib"))
    topics = ast.parse((library / "pydoc_data" / "topics.py").read_text(encoding="utf-8"))
    yield from next(ast.literal_eval(node.value) for node in topics.body if isinstance(node, ast.Assign)).values()
    for path in python_files(library):
        if text := _docstrings(path):
            yield text


def python_files(folder: Path) -> Iterator[Path]:
    """Yield the Python files in a folder in a fixed order, without tests and installed packages."""
    excluded = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"}
    for path in sorted(folder.rglob("*.py")):
        if excluded.isdisjoint(path.relative_to(folder).parts):
            yield path


def _docstrings(path: Path) -> str:
    with tokenize.open(path) as file:
        tree = ast.parse(file.read())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
    return "\n\n".join(inspect.cleandoc(text) for text in texts if text)


def _local(path: Path) -> Documents:
    """Open a file, or all files of a folder and its subfolders."""
    if not path.is_dir():
        usable, left_out = [path], list[tuple[str, Path]]()
        if path.suffix in READERS and not path.is_file():
            raise DataError(f"{path}: expected a regular file, got a pipe or a device")
    else:
        usable, left_out = _files_of(path)
    if not usable or usable[0].suffix not in READERS:
        reasons = "; ".join(sorted({f"{reason}, as {where.name}" for reason, where in left_out}))
        found = (f"files in it (it has {reasons})" if reasons else "files in it") if path.is_dir() else ""
        raise DataError(f"{path}: expected .txt, .jsonl or .parquet {found}".rstrip())
    documents = Documents(str(path), read=lambda: iter(()), streamed=_size(usable) > IN_MEMORY_BYTES)

    def read() -> Iterator[str]:
        documents.skipped.clear()  # each pass has its own counts
        for reason, where in left_out:
            documents.skip(reason, str(where))
        for file in usable:
            yield from READERS[file.suffix](file, documents)

    documents.read = read
    for file in usable:
        if file.stat().st_size == 0:
            raise DataError(f"{file}: the file is empty; expected text")
    return documents if documents.streamed else _in_memory(documents)


def _files_of(folder: Path) -> tuple[list[Path], list[tuple[str, Path]]]:
    """Return the text files in a folder in a fixed order, and all other files with the reason why they are left out.

    Raises:
        DataError: a subfolder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: the folder cannot be read ({error.strerror})") from error

    usable: list[Path] = []
    left_out: list[tuple[str, Path]] = []
    for parent, subfolders, names in os.walk(folder, onerror=refuse):
        links = [name for name in subfolders if Path(parent, name).is_symlink()]
        for path in (Path(parent, name) for name in names + links):
            try:
                reason = _reason_to_leave_out(path)
            except OSError as error:
                refuse(error)
            if reason is None:
                usable.append(path)
            else:
                left_out.append((reason, path))
    return sorted(usable), sorted(left_out, key=lambda entry: entry[1])


def _reason_to_leave_out(path: Path) -> str | None:
    if path.is_dir():
        return "links to folders, which are not followed"
    if path.is_symlink() and not path.exists():
        return "broken links"
    if not path.is_file():
        return "pipes, sockets and devices"
    return None if path.suffix in READERS else "files that are not .txt, .jsonl or .parquet"


def _in_memory(documents: Documents) -> Documents:
    """Load all documents into memory: the training of the tokenizer and both parts of the split read them again."""
    texts = list(documents.read())
    if not texts:
        notes = "; ".join(documents.notes())
        raise DataError(f"{documents.name}: no text found" + (f" ({notes})" if notes else ""))
    documents.read = lambda: iter(texts)
    return documents


def _size(files: list[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # keep line ends, drop a byte order mark
            for line in file:
                if "\0" in line:
                    raise DataError(f"{path}: the file is binary; expected UTF-8 text")
                yield line
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: the file is not UTF-8 text ({error.reason})") from error


def _read_txt(path: Path, documents: Documents) -> Iterator[str]:
    if not any(line.strip() for line in _lines(path)):  # ends at the first line with text
        documents.skip("files of white space only", str(path))
        return
    section: list[str] = []
    length = 0
    for line in _lines(path):
        # a line can be longer than a section, even a whole book
        for start in range(0, len(line), SECTION_CHARACTERS):
            section.append(line[start : start + SECTION_CHARACTERS])
            length += len(section[-1])
            if length >= SECTION_CHARACTERS:
                yield "".join(section)
                section, length = [], 0
    if "".join(section).strip():
        yield "".join(section)


def _read_jsonl(path: Path, documents: Documents) -> Iterator[str]:
    if not any(line.strip() for line in _lines(path)):
        documents.skip("files of white space only", str(path))
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # RecursionError: nesting that is too deep
            documents.skip("lines that are not JSON", f"{path}:{number}")
            continue
        yield from _text_of(record, documents, f"{path}:{number}")


def _read_parquet(path: Path, documents: Documents) -> Iterator[str]:
    import datasets  # slow, since it imports pandas

    try:
        records = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        for number, record in enumerate(records):
            yield from _text_of(record, documents, f"{path} row {number}")
    except DataError:
        raise
    except Exception as error:  # pyarrow and datasets raise many types for a broken file
        raise DataError(f"{path}: not a readable Parquet file ({first_line(error)})") from error


READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _text_of(record: Any, documents: Documents, where: str) -> Iterator[str]:
    for name in TEXT_FIELDS:
        text = record.get(name) if isinstance(record, dict) else None
        if isinstance(text, str) and text.strip():
            if _is_unicode(text):
                yield text
            else:
                documents.skip("records that are not valid Unicode", where)
            return
    documents.skip(f"records without text in a field {', '.join(TEXT_FIELDS[:-1])} or {TEXT_FIELDS[-1]}", where)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can encode half a surrogate pair
        return False
    return True


def _from_hub(source: str) -> Documents:
    import datasets

    name, _, config = source.partition(":")
    try:
        records = datasets.load_dataset(name, config or None, split="train", streaming=True)
    except Exception as error:  # no network, no such name, no permission
        raise DataError(
            f"{source}: neither a file nor a dataset that can be opened ({type(error).__name__}: {first_line(error)})"
        ) from error
    documents = Documents(source, read=lambda: iter(()), streamed=True)

    def read() -> Iterator[str]:
        documents.skipped.clear()
        try:
            for number, record in enumerate(records):
                yield from _text_of(record, documents, f"{source} record {number}")
        except Exception as error:  # any network error during the stream
            raise DataError(
                f"{source}: the stream ended with an error ({type(error).__name__}: {first_line(error)})"
            ) from error

    documents.read = read
    return documents


def first_line(error: Exception) -> str:
    """Return the first line of an error message."""
    return next(iter(str(error).splitlines()), type(error).__name__)
