"""Write finished runs to one table, a row a run: `python benchmarks/record.py RUN [RUN ...] FILE.csv`.

Columns: the settings (args.*, without paths of this machine), then the figures of summary.json. This is the
form that results/ has and that `python evaluate.py FILE.csv` reads.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import data
import evaluate

LEFT_OUT = ("command", "out", "resume", "data_dir", "device")


def main() -> str:
    """Read all runs, then write; what was done."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("table", metavar="FILE.csv")
    given, rows = parser.parse_args(), []
    for args, summary in (run for folder in given.runs for run in evaluate.read_runs(folder)):
        settings = {f"args.{key}": value for key, value in args.items() if key not in LEFT_OUT}
        rows.append(settings | {key: value for key, value in summary.items() if key[:5] != "args."})
    cells = [{k: v if isinstance(v, str | None) else json.dumps(v) for k, v in row.items()} for row in rows]
    data.write_csv(given.table, cells)
    return f"{len(rows)} runs: {given.table}"


if __name__ == "__main__":
    try:
        print(main())
    except (ValueError, OSError) as error:
        sys.exit(f"record.py: error: {error}")
