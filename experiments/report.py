"""Show what is in run folders: one HTML file to open in a browser, without a network, and its charts as PNGs.

One run is shown in full: bits, search, certificates, the images whose certificate changed most. Several are compared, with their
Pareto curve. What a folder does not hold is said. Certifies nothing and downloads nothing.
"""

from pathlib import Path

from arq_agents import command_line


def parse():
    parser = command_line.parser(__doc__)
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="run folder of a search, or a folder that finalize.py wrote"
    )
    parser.add_argument("--output", type=Path, help="folder for the files (default: RUN/report; of several, runs/report)")
    return parser.parse_args()


options = command_line.start(__name__, parse)

from arq_agents.trace import read_trace
from arq_env.datasets import load_if_here
from arq_env.report.page import write_report
from arq_env.report.run import read_run


def main(options):
    runs = [read_run(folder, read_trace(folder / "trace.jsonl")) for folder in options.runs]
    folder = options.output or (Path("runs") if len(runs) > 1 else options.runs[0]) / "report"
    print(write_report(runs, folder, load_if_here))


if __name__ == "__main__":
    command_line.run(main, options)
