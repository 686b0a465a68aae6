"""The errors of a user's data: which file or folder, what is wrong with it, what to do."""

from __future__ import annotations

from pathlib import Path

from pipelines.basics.text import as_text


class DataError(ValueError):
    """A fault of the user's data or options; the message gives path or value, rule and remedy."""

    def __str__(self) -> str:
        return as_text(super().__str__())


class CaseError(DataError):
    """A fault in the files of one case.

    Args:
        path: the file at fault; kept in a form that any log and table can hold (`pipelines.basics.text`).
        problem: what is wrong with it, with the value and the rule.
        remedy: what the user can do.
    """

    def __init__(self, path: Path, problem: str, remedy: str) -> None:
        super().__init__(path, problem, remedy)  # args: pickle needs them to bring the error from a worker process
        self.path = Path(as_text(str(path)))
        self.problem = as_text(problem)
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}. {self.remedy}."


class CaseFailure(CaseError):
    """A case that could not be processed, though its scans may be sound: it may succeed another time."""


class StoreError(DataError):
    """The store's folder can't be written; `needed` is the size in bytes of the case that was being written."""

    def __init__(self, folder: Path, problem: str, needed: int) -> None:
        super().__init__(folder, problem, needed)
        self.folder = folder
        self.problem = problem
        self.needed = needed

    def __str__(self) -> str:
        size = f" It needs about {self.needed / 1e6:.1f} MB more." if self.needed else ""
        return (
            f"store {self.folder}: {self.problem}.{size} Free space there or change its permissions, or choose another "
            "folder with --data.store_dir. Cases already prepared are kept."
        )
