"""Where ``dfformer show`` writes."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


class Output:
    """A folder to write to; says what it has written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def figure(self, name: str, figure: Figure) -> None:
        figure.savefig(self.folder / f"{name}.png", dpi=110)
        print(f"wrote {self.folder / name}.png")

    def table(self, name: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Floats with nine digits, which give a float32 back exactly."""
        with (self.folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows([f"{v:.9g}" if isinstance(v, float) else v for v in row] for row in rows)
        print(f"wrote {self.folder / name}.csv")
