"""Write the README's table from the records of `make bench`.

python benchmarks/readme.py bench bench-results/results.json    # take over new records, then write
python benchmarks/readme.py                                     # write from the committed records
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import click

from verbtune.report import table
from verbtune.summary import Record, summarize

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
BLOCK = re.compile(r"(?<=<!-- (?P<name>\w{5}) -->\n).*?(?=<!-- /(?P=name) -->)", re.DOTALL)


def block(name: str) -> str:
    """The README's part between the marks of that name, as `records/NAME.json` says it."""
    records = [Record(**record) for record in json.loads((HERE / "records" / f"{name}.json").read_text("utf-8"))]
    minutes = sum(record.fit_seconds + record.predict_seconds for record in records) / 60
    tables = table(summarize(records)).replace("## ", "### ")
    return f"{len(records)} measurements, {minutes:.0f} minutes of fitting and predicting.\n\n{tables}\n"


def written() -> str:
    """The README as the records want it."""
    return BLOCK.sub(lambda match: block(match["name"]), README.read_text("utf-8"))


@click.command()
@click.argument("name", required=False)
@click.argument("results", required=False, type=click.Path(exists=True, path_type=Path))
def main(name: str | None, results: Path | None) -> None:
    """Write the README's tables."""
    if name and results:
        records = json.loads(results.read_text("utf-8"))["records"]
        lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
        (HERE / "records" / f"{name}.json").write_text(f"[\n{lines}\n]\n", "utf-8")
    README.write_text(written(), "utf-8")


if __name__ == "__main__":
    main()
