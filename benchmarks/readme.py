"""Write the README's table from the records of `make bench`.

python benchmarks/readme.py bench-results/results.json    # take over new records, then write
python benchmarks/readme.py                               # write from the committed records
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import click

from verbtune.bench import Record, summarize
from verbtune.report import table

HERE = Path(__file__).parent
RECORDS = HERE / "records" / "bench.json"
README = HERE.parent / "README.md"
BLOCK = re.compile(r"(?<=<!-- bench -->\n).*?(?=<!-- /bench -->)", re.DOTALL)


def block() -> str:
    """The README's part between its two marks, as the records say it."""
    records = [Record(**record) for record in json.loads(RECORDS.read_text("utf-8"))]
    fits = [record.fit_seconds + record.predict_seconds for record in records]
    return (
        f"What `make bench` printed on two CPU cores ({len(records)} measurements, {sum(fits) / 60:.0f} minutes of "
        f"fitting and predicting):\n\n{table(summarize(records))}\n"
    )


@click.command()
@click.argument("results", required=False, type=click.Path(exists=True, path_type=Path))
def main(results: Path | None) -> None:
    """Write the README's table."""
    if results:
        records = json.loads(results.read_text("utf-8"))["records"]
        lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
        RECORDS.write_text(f"[\n{lines}\n]\n", "utf-8")
    README.write_text(BLOCK.sub(lambda _: block(), README.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
