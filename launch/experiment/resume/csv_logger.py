"""The metrics of a run as `metrics.csv`, which a resumed run continues."""

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

from experiment.training.atomic_files import write_file


class ResumableCSVLogger(CSVLogger):
    """Write what Lightning's CSVLogger writes, row by row. That one starts over in a folder with rows; this continues.

    Args:
        save_dir: The run directory.
        name: Name of a folder in it.
    """

    def __init__(self, save_dir: str | Path, name: str = "csv") -> None:
        super().__init__(save_dir, name, version="")
        self.path = Path(self.log_dir) / "metrics.csv"
        self.columns: list[str] = []
        self.num_rows = 0

    @property
    def experiment(self) -> Any:
        """Return this logger: the property of Lightning's class would delete the rows written so far."""
        return self

    @rank_zero_only
    def resume(self, num_rows: int) -> None:
        """Keep the rows that a checkpoint counted; what came after it is trained again.

        Raises:
            ValueError: the file has fewer.
        """
        rows = self._rows()[:num_rows]
        if len(rows) < num_rows:
            raise ValueError(
                f"expected the {num_rows} rows that the checkpoint counts in {self.path}, found {len(rows)}: put the "
                "file back, or start a new run from the checkpoint with ckpt_path"
            )
        self.columns, self.num_rows = sorted({key for row in rows for key, value in row.items() if value}), num_rows
        self._write([{key: row[key] for key in self.columns} for row in rows])

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write one row."""
        row = {key: float(value) if hasattr(value, "item") else value for key, value in metrics.items()}
        row["step"] = self.num_rows if step is None else step
        if row.keys() <= set(self.columns):
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(row)
        else:
            rows = self._rows()[: self.num_rows]
            self.columns = sorted({*self.columns, *row})
            self._write([*rows, row])
        self.num_rows += 1

    @rank_zero_only
    def sync(self) -> None:
        """Wait until the rows are on the disk, as a checkpoint that counts them will be."""
        if self.path.is_file():
            with self.path.open("ab") as file:
                os.fsync(file.fileno())

    @rank_zero_only
    def save(self) -> None:
        """Do nothing: every row has been written."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Do nothing: every row has been written."""

    def _rows(self) -> list[dict[str, Any]]:
        """Read; the last line may be cut short."""
        if not self.path.is_file():
            return []
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file))

    def _write(self, rows: list[dict[str, Any]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns)
        writer.writeheader()
        writer.writerows(rows)
        write_file(self.path, text.getvalue())
